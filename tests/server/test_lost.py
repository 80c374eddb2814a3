"""Deployed manners: what is lost is asked again, who refused is greeted again, the newest wins."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from intramural.core.errors import RoundError
from intramural.core.layout import Vector
from intramural.core.messages import (
    EvaluateRequest,
    Hello,
    Refusal,
    Reply,
    Request,
    TrainRequest,
    Welcome,
)
from intramural.server.directory import Directory, Manners
from intramural.server.lost import Again
from intramural.server.post import Arrival, Post
from tests.server.fakes import BASE, LAYOUT, SlowGrid, app_of, coordinate, honest, small

AGAIN = Again(pause_s=2.0, times_max=2)


class Dying:
    """Honest sites, of which one dies the first `deaths` times it is asked to train."""

    def __init__(self, site: str, deaths: int, kind: type = TrainRequest) -> None:
        self.site, self.deaths, self.kind, self.asked = site, deaths, kind, 0

    def __call__(self, site: str, request: Request) -> Reply:
        if site == self.site and isinstance(request, self.kind):
            self.asked += 1
            if self.asked <= self.deaths:
                raise RuntimeError("killed")
        return honest(site, request)


def ticking() -> Callable[[], float]:
    """Return a clock that goes on by a fifth of a second at every look."""
    looks = itertools.count()
    return lambda: next(looks) * 0.2


def run(folder: Path, answer: Dying, *, again: Again | None = AGAIN) -> tuple[list[str], Vector]:
    grid = SlowGrid(app_of(answer), 3, run_config={}, slow={})
    done = coordinate(folder, small(), grid, clock=ticking(), again=again)
    return [entry.kind for entry in done.journal], done.outcome.vector


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_site_that_died_is_asked_again_and_the_result_is_the_same(
    tmp_path: Path, deaths: int
) -> None:
    calm, expected = run(tmp_path / "calm", Dying("site-2", 0))
    kinds, vector = run(tmp_path / "dying", Dying("site-2", deaths))
    assert kinds.count("asked-again") == deaths
    assert "discarded" not in kinds
    assert np.array_equal(vector, expected)
    assert [k for k in kinds if k != "asked-again"] == calm


def test_a_site_that_dies_in_evaluation_is_asked_again(tmp_path: Path) -> None:
    dying = Dying("site-1", 1, EvaluateRequest)
    grid = SlowGrid(app_of(dying), 3, run_config={}, slow={})
    done = coordinate(tmp_path, small(), grid, clock=ticking(), again=AGAIN)
    assert len(done.outcome.history[0]["metrics"]) > 0
    # sites hold 1, 2 and 3 examples, all of which are in the sum
    assert done.outcome.history[0]["metrics"]["examples"] == 6


def test_a_site_that_dies_too_often_counts_as_failed(tmp_path: Path) -> None:
    with pytest.raises(RoundError, match="2 good answers, 3 needed"):
        run(tmp_path, Dying("site-3", 99))


def test_without_again_a_death_is_a_failure_at_once(tmp_path: Path) -> None:
    dying = Dying("site-2", 1)
    kinds, _ = run(tmp_path, dying, again=None)
    assert "asked-again" not in kinds
    assert kinds.count("discarded") == 1


def directory_of(grid: SlowGrid, manners: Manners) -> Directory:
    return Directory(
        Post(grid, lambda _: LAYOUT),
        small(),
        run="",
        layout=LAYOUT,
        base=BASE,
        manners=manners,
        clock=lambda: grid.now_s,
    )


def greet(directory: Directory) -> bool:
    def receive(arrival: Arrival) -> None:
        assert directory.took(arrival)

    return directory.greet(receive)


def test_a_site_that_waits_for_approval_is_greeted_again_after_the_pause() -> None:
    approved: list[bool] = []

    def answer(site: str, request: Request) -> Reply:
        if not approved:
            return Refusal(site=site, reason="awaits-approval", detail="approve it")
        return honest(site, request)

    grid = SlowGrid(app_of(answer), 1, run_config={}, slow={})
    directory = directory_of(grid, Manners(again_s=15.0))
    greet(directory)
    assert directory.nodes == {}
    approved.append(True)
    grid.now_s += 10
    greet(directory)
    assert directory.nodes == {}  # not yet
    grid.now_s += 10
    greet(directory)
    assert directory.nodes == {"site-1": 1}
    assert directory.refusals == {}


def test_a_node_whose_greeting_was_lost_is_greeted_again_and_nobody_waits_for_it() -> None:
    grid = SlowGrid(app_of(honest), 2, run_config={}, slow={}, silent={2})
    directory = directory_of(grid, Manners(silent_s=120.0))

    def under_way() -> list[str]:
        return [i for i, m in grid._queue.items() if m.metadata.dst_node_id == 2]

    assert not greet(directory)
    directory.give_up()
    (lost,) = under_way()
    del grid._queue[lost]
    grid.now_s += 100
    assert greet(directory)
    assert under_way() == []  # not yet
    grid.now_s += 30
    assert greet(directory)  # it is greeted, and a round can open without it
    assert len(under_way()) == 1
    grid.now_s += 130
    assert greet(directory)
    assert len(under_way()) == 2
    grid.silent = set()
    greet(directory)
    assert directory.nodes == {"site-1": 1, "site-2": 2}
    assert directory.refusals == {}
    grid.silent, grid.now_s = {2}, grid.now_s + 1000
    assert greet(directory)
    assert under_way() == []  # it has answered


def test_a_silent_node_that_left_and_comes_back_is_waited_for_as_a_new_one() -> None:
    grid = SlowGrid(app_of(honest), 1, run_config={}, slow={}, silent={1})
    directory = directory_of(grid, Manners())
    greet(directory)
    directory.give_up()
    grid.connected = set()
    assert greet(directory)
    grid.connected = {1}
    assert not greet(directory)


def test_of_two_nodes_of_one_site_the_newer_wins() -> None:
    def answer(site: str, request: Request) -> Reply:
        reply = honest(site, request)
        return replace(reply, site="site-1") if isinstance(reply, Welcome) else reply

    grid = SlowGrid(app_of(answer), 2, run_config={}, slow={})
    directory = directory_of(grid, Manners())
    grid.connected = {1}
    greet(directory)
    grid.connected = {1, 2}  # the killed agent's node lingers until its heartbeat is missed
    greet(directory)
    assert directory.nodes == {"site-1": 2}


def test_a_site_that_misses_too_often_must_answer_a_greeting_first() -> None:
    grid = SlowGrid(app_of(honest), 1, run_config={}, slow={})
    directory = directory_of(grid, Manners(misses_max=2))
    greet(directory)
    directory.missed("site-1")
    assert directory.nodes == {"site-1": 1}
    directory.missed("site-1")
    assert directory.nodes == {}
    greet(directory)
    assert directory.nodes == {"site-1": 1}


def test_an_answer_in_between_forgives_misses() -> None:
    grid = SlowGrid(app_of(honest), 1, run_config={}, slow={})
    directory = directory_of(grid, Manners(misses_max=2))
    greet(directory)
    directory.missed("site-1")
    directory.answered("site-1")
    directory.missed("site-1")
    assert directory.nodes == {"site-1": 1}


def test_a_site_that_says_no_by_its_own_rules_is_waited_for_and_uses_up_no_attempt(
    tmp_path: Path,
) -> None:
    noes = ["night"] * 4  # one to round 2's request, three to greetings: its hours have ended

    def answer(site: str, request: Request) -> Reply:
        in_round_2 = isinstance(request, TrainRequest) and request.round == 2
        greeted = isinstance(request, Hello) and len(noes) < 4
        if site == "site-2" and noes and (in_round_2 or greeted):
            return Refusal(site=site, reason="refused", detail=f"policy.hours: {noes.pop()}")
        return honest(site, request)

    grid = SlowGrid(app_of(answer), 3, run_config={}, slow={})
    done = coordinate(
        tmp_path,
        small(),
        grid,
        clock=ticking(),
        again=AGAIN,
        manners=Manners(again_s=15.0),
        patience_s=float("inf"),
    )
    kinds = [entry.kind for entry in done.journal]
    assert kinds.count("discarded") == 1  # three in a row would have ended the run
    assert kinds.count("committed") == 2
    told = [line for line in done.seen.lines if "waits" in line]
    assert any("2 of 3 sites are ready (site-2: policy.hours" in line for line in told)
