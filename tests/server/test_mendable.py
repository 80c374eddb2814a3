"""Refusals that a site's people can mend: a deployed round waits them out, however many come."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from intramural.core.errors import RoundError
from intramural.core.messages import Refusal, Reply, Request, TrainRequest, Welcome
from intramural.server.directory import MENDABLE, Directory, Manners
from intramural.server.post import Arrival, Post
from tests.server.fakes import BASE, LAYOUT, Done, SlowGrid, app_of, coordinate, honest, small

AGAIN_S = 15.0
WHY = "replies: cannot store an answer: No space left on device; free space"


class Refusing:
    """Honest sites, of which some pass every greeting and refuse to train so many times."""

    def __init__(self, times: dict[str, int], reason: str) -> None:
        self.left, self.reason = dict(times), reason
        self.asked_at_s: list[float] = []
        """When site-2 was asked to train."""
        self.grid = SlowGrid(app_of(self), 3, run_config={}, slow={})

    def __call__(self, site: str, request: Request) -> Reply:
        if not isinstance(request, TrainRequest):
            return honest(site, request)
        if site == "site-2":
            self.asked_at_s.append(self.grid.now_s)
        if self.left.get(site, 0):
            self.left[site] -= 1
            return Refusal(site=site, reason=self.reason, detail=WHY)
        return honest(site, request)


def run(folder: Path, sites: Refusing, *, manners: Manners | None) -> Done:
    grid = sites.grid

    def sleep(_: float) -> None:
        grid.now_s += 1.0

    return coordinate(
        folder,
        small(federation={"rounds": 1}),
        grid,
        clock=lambda: grid.now_s,
        sleep=sleep,
        manners=manners,
        patience_s=float("inf"),
    )


@pytest.mark.parametrize("reason", sorted(MENDABLE))
def test_a_site_that_refuses_five_times_in_a_row_and_is_mended_ends_the_run_well(
    tmp_path: Path, reason: str
) -> None:
    sites = Refusing({"site-2": 5}, reason)
    done = run(tmp_path, sites, manners=Manners(again_s=AGAIN_S))
    opened = [entry.body["attempt"] for entry in done.journal if entry.kind == "opened"]
    assert opened == [1, 2, 3, 4, 5, 6]
    (record,) = done.seen.records
    assert (record["sites"], record["refusals"]) == (["site-1", "site-2", "site-3"], {reason: 5})
    # (1*1 + 2*2 + 3*3) / (1 + 2 + 3): each site once
    np.testing.assert_allclose(done.outcome.vector, np.full(7, 14 / 6), rtol=1e-6)
    pauses = [after - before for before, after in itertools.pairwise(sites.asked_at_s)]
    assert min(pauses) >= AGAIN_S  # no busy loop


def test_a_refusal_that_nobody_can_mend_ends_the_run_at_its_third_attempt(tmp_path: Path) -> None:
    sites = Refusing({"site-2": 5}, "data")
    with pytest.raises(RoundError, match=r"2 good answers, 3 needed; reasons: \{'data': 3\}"):
        run(tmp_path, sites, manners=Manners(again_s=AGAIN_S))


def test_a_mendable_refusal_does_not_excuse_another_site_s_failures(tmp_path: Path) -> None:
    sites = Refusing({"site-2": 99}, "journal")

    def broken(site: str, request: Request) -> Reply:
        reply = sites(site, request)
        if site == "site-3" and isinstance(request, TrainRequest):
            return Refusal(site=site, reason="data", detail="column 'note' is missing")
        return reply

    sites.grid = SlowGrid(app_of(broken), 3, run_config={}, slow={})
    with pytest.raises(RoundError, match=r"reasons: \{'journal': 3, 'data': 3\}"):
        run(tmp_path, sites, manners=Manners(again_s=AGAIN_S))


@pytest.mark.parametrize("reason", sorted(MENDABLE))
def test_a_simulated_site_has_no_people_and_its_refusals_count(tmp_path: Path, reason: str) -> None:
    with pytest.raises(RoundError, match=rf"reasons: \{{'{reason}': 3\}}"):
        run(tmp_path, Refusing({"site-2": 99}, reason), manners=None)


def test_a_site_that_refused_through_its_old_node_is_greeted_anew_through_the_new_one() -> None:
    asked: list[str] = []

    def same_site(site: str, request: Request) -> Reply:
        asked.append(site)
        reply = honest(site, request)
        return replace(reply, site="site-1") if isinstance(reply, Welcome) else reply

    grid = SlowGrid(app_of(same_site), 2, run_config={}, slow={})
    directory = Directory(
        Post(grid, lambda _: LAYOUT), small(), run="", layout=LAYOUT, base=BASE,
        manners=Manners(again_s=AGAIN_S), clock=lambda: grid.now_s,
    )  # fmt: skip

    def receive(arrival: Arrival) -> None:
        assert directory.took(arrival)

    def greet() -> None:
        directory.greet(receive)

    grid.connected = {1}
    greet()
    grid.connected = {1, 2}
    greet()
    assert directory.nodes == {"site-1": 2}
    directory.refused("site-1", 1, Refusal(site="site-1", reason="journal", detail=WHY))
    grid.connected = {2}
    greet()
    assert directory.nodes == {}
    grid.now_s += AGAIN_S
    greet()
    assert directory.nodes == {"site-1": 2}
    assert asked == ["site-1", "site-2", "site-2"]  # the nodes, by number
