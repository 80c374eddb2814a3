"""LedgerWatch: a site's ledger only grows, whichever reply tells of it; a fall is for the run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intramural.core.errors import RoundError
from intramural.core.journal import scan
from intramural.core.messages import (
    Evaluated,
    EvaluateRequest,
    Reply,
    Request,
    TrainRequest,
    Update,
    Welcome,
)
from intramural.server.checkpoint import Checkpoint, load_checkpoint
from intramural.server.directory import Directory, Manners
from intramural.server.ledger_watch import ROLLED_BACK, LedgerWatch
from intramural.server.post import Arrival, Post
from tests.server.fakes import BASE, LAYOUT, Site, SlowGrid, app_of, coordinate, grid_of
from tests.server.test_private_coordinator import answering, noised, private


def updated(entries: int | None, *, round_: int = 1, head: str | None = "h") -> Update:
    return Update(
        site="site-1",
        round=round_,
        layout=LAYOUT.digest,
        weight=1,
        loss=None,
        seconds=None,
        ledger_entries=entries,
        ledger_head=head,
        delta=np.zeros(LAYOUT.size, dtype=np.float32),
    )


def evaluated(entries: int | None, *, round_: int = 1, head: str | None = "h") -> Evaluated:
    return Evaluated(
        site="site-1",
        round=round_,
        split="validation",
        sums=noised([3], [4]),
        ledger_entries=entries,
        ledger_head=head,
    )


def welcome(entries: int | None, *, head: str | None = "h") -> Welcome:
    return Welcome(
        site="site-1",
        layout=LAYOUT.digest,
        base=BASE,
        version="0",
        ledger_entries=entries,
        ledger_head=head,
    )


def watch(*told: Update | Evaluated, history: list[dict[str, Any]] | None = None) -> LedgerWatch:
    """Return a watch that took these replies in."""
    made = LedgerWatch(history or [], [])
    for reply in told:
        assert made.problem(reply) is None
        made.note(reply)
    return made


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (evaluated(6, head="i"), None),
        (evaluated(99, head="i"), None),  # another run charges the same ledger
        (evaluated(5, head="i"), ROLLED_BACK),  # an evaluation that was not charged
        (evaluated(4, head="i"), ROLLED_BACK),
        (evaluated(None, head="i"), ROLLED_BACK),
        (evaluated(7, head=None), ROLLED_BACK),
        (updated(7, round_=2, head="i"), None),
        (updated(5, round_=2, head="i"), ROLLED_BACK),
    ],
)
def test_what_was_charged_has_made_the_ledger_grow(
    reply: Update | Evaluated, problem: str | None
) -> None:
    for last in (updated(5), evaluated(5)):  # whichever reply told of it
        of = watch(last)
        assert of.problem(reply) == problem
        assert of.record()["site-1"]["rolled_back"] == (problem is not None)


def test_the_very_same_reply_counts_again_and_another_of_its_length_does_not() -> None:
    for reply in (updated(5), evaluated(5)):
        assert watch(reply).problem(reply) is None
        assert watch(reply).problem(replace(reply, ledger_head="i")) == ROLLED_BACK
        assert watch(reply).problem(replace(reply, round=2)) == ROLLED_BACK
    assert watch(evaluated(5)).problem(replace(evaluated(5), split="test")) == ROLLED_BACK
    assert watch(updated(5)).problem(evaluated(5)) == ROLLED_BACK


def test_a_fall_holds_for_the_rest_of_the_run_whatever_comes() -> None:
    of = watch(updated(5))
    assert of.problem(evaluated(3)) == ROLLED_BACK
    assert of.problem(updated(50, round_=2)) == ROLLED_BACK
    assert of.problem(evaluated(51, round_=2)) == ROLLED_BACK
    assert of.greeted(welcome(52), since=of.moment) == ROLLED_BACK


def test_an_evaluation_leaves_a_seed_noted() -> None:
    of = watch(replace(updated(5), seeded=True), evaluated(7, head="i"))
    assert of.record() == {
        "site-1": {"entries": 7, "head": "i", "seeded": True, "rolled_back": False}
    }


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (welcome(5), None),
        (welcome(6, head="i"), None),
        (welcome(5, head="i"), ROLLED_BACK),  # as long, and another
        (welcome(4, head="i"), ROLLED_BACK),
        (welcome(0), ROLLED_BACK),
        (welcome(None), ROLLED_BACK),
        (welcome(5, head=None), ROLLED_BACK),
        (welcome(6, head=None), ROLLED_BACK),
    ],
)
def test_a_greeting_tells_of_the_same_ledger_or_a_longer_one(
    answer: Welcome, problem: str | None
) -> None:
    resumed = [{"ledgers": watch(updated(5)).record()}]
    for of in (watch(updated(5)), watch(evaluated(5)), watch(history=resumed)):
        assert of.greeted(answer, since=of.moment) == problem
        # its later updates do not count either
        assert of.problem(updated(9, round_=2)) == problem


def test_the_first_greeting_of_a_run_needs_a_ledger_of_any_length() -> None:
    assert watch().greeted(welcome(1), since=0) is None
    for nothing in (welcome(0), welcome(None), welcome(1, head=None)):
        assert watch().greeted(nothing, since=0) == ROLLED_BACK


def test_a_greeting_is_held_against_what_was_known_when_it_was_asked_for() -> None:
    of = watch(updated(3))
    asked = of.moment
    for reply in (updated(5, round_=2, head="i"), updated(7, round_=3, head="j")):
        of.note(reply)
    assert of.greeted(welcome(3), since=asked) is None  # it comes late, and was true
    assert of.greeted(welcome(5, head="i"), since=asked + 1) is None
    assert of.greeted(welcome(3), since=of.moment) == ROLLED_BACK


def test_a_greeting_raises_no_bar_for_a_stored_answer_that_is_sent_again() -> None:
    # the coordinator died before the round was committed: the site's ledger is two entries on
    of = watch(history=[{"ledgers": watch(updated(3)).record()}])
    assert of.greeted(welcome(7, head="j"), since=of.moment) is None
    assert of.problem(updated(5, round_=2, head="i")) is None
    of.note(updated(5, round_=2, head="i"))
    assert of.problem(evaluated(7, round_=2, head="j")) is None


def test_only_the_greeting_that_first_shows_a_fall_is_told_of() -> None:
    fallen: list[str] = []
    of = LedgerWatch([], [], fell=fallen.append)
    of.note(updated(5))
    for _ in range(3):
        assert of.greeted(welcome(4), since=of.moment) == ROLLED_BACK
    assert fallen == ["site-1"]
    of = LedgerWatch([], [], fell=fallen.append)
    of.note(updated(5))
    assert of.problem(updated(4)) == ROLLED_BACK  # who judges it journals it
    assert of.greeted(welcome(4), since=of.moment) == ROLLED_BACK
    assert fallen == ["site-1"]


growth = st.integers(1, 4)
events = st.lists(
    st.tuples(st.sampled_from(["train", "evaluate", "greet", "others"]), growth), max_size=30
)


@given(events, st.integers(1, 9))
def test_a_ledger_that_only_grows_is_never_refused_and_a_copy_from_before_is(
    happened: list[tuple[str, int]], lost: int
) -> None:
    of, length, sent = LedgerWatch([], []), 1, [(0, 1)]

    def reply(kind: str, number: int) -> Update | Evaluated:
        make = updated if kind == "train" else evaluated
        return make(length, round_=number, head=f"head {length}")

    for number, (kind, more) in enumerate(happened):
        if kind == "others":
            length += more
        elif kind == "greet":
            sent.append((of.moment, length))
            for since, then in sent:  # all greetings so far answer now, as they were computed
                assert of.greeted(welcome(then, head=f"head {then}"), since=since) is None
        else:
            length += 2
            told = reply(kind, number)
            assert of.problem(told) is None
            of.note(told)
    heard = of.record().get("site-1", {}).get("entries", 0)
    length = heard - lost
    if heard:
        fallen = welcome(length, head="a copy")
        assert of.greeted(fallen, since=of.moment) == ROLLED_BACK
        assert of.problem(reply("train", 99)) == ROLLED_BACK


def two_rounds(folder: Path, answer: Site) -> tuple[Checkpoint, Any]:
    """Run one round privately, then the second with other answers; return what each left."""
    quorum = {"min": 2, "quorum": 0.6}
    first = private(sites=quorum, federation={"rounds": 1})
    coordinate(folder, first, grid_of(answering()))
    begin, _ = load_checkpoint(folder / "checkpoints")
    assert begin is not None
    return begin, coordinate(folder, private(sites=quorum), grid_of(answer), begin=begin)


def restored(site: str, request: Request) -> Reply:
    """Answer as sites whose ledgers had 3 entries; site-2's is a copy from before."""
    reply = answering(greets=3)(site, request)
    if isinstance(reply, Welcome) and site == "site-2":
        return replace(reply, ledger_entries=1)
    return reply


def test_a_site_that_greets_with_an_older_ledger_is_not_admitted(tmp_path: Path) -> None:
    asked: list[str] = []

    def answer(site: str, request: Request) -> Reply:
        if isinstance(request, TrainRequest):
            asked.append(site)
        return restored(site, request)

    _, done = two_rounds(tmp_path, answer)
    assert asked == ["site-1", "site-3"]
    (record,) = done.seen.records
    assert (record["round"], record["sites"]) == (2, ["site-1", "site-3"])
    assert record["ledgers"]["site-2"] == {
        "entries": 3, "head": "h", "seeded": False, "rolled_back": True
    }  # fmt: skip
    refused = [entry.body for entry in done.journal if entry.kind == "refused"]
    assert [(b["site"], b["phase"], b["reason"]) for b in refused] == [
        ("site-2", "hello", ROLLED_BACK)
    ]
    assert any("site-2: ledger-rolled-back" in line for line in done.seen.lines)


def test_a_run_that_goes_on_knows_who_greeted_with_an_older_ledger(tmp_path: Path) -> None:
    begin, _ = two_rounds(tmp_path, restored)
    entries = scan(tmp_path / "journal.jsonl").entries
    again = LedgerWatch(begin.history, entries)  # as if the second round had never been committed
    mended = replace(welcome(99), site="site-2")
    assert again.greeted(mended, since=0) == ROLLED_BACK
    assert again.problem(replace(updated(99, round_=2), site="site-2")) == ROLLED_BACK
    assert again.greeted(welcome(99), since=0) is None


def test_sites_that_tell_no_ledger_under_privacy_cannot_take_part(tmp_path: Path) -> None:
    def silent(site: str, request: Request) -> Reply:
        reply = answering()(site, request)
        if isinstance(reply, Welcome):
            return replace(reply, ledger_entries=None, ledger_head=None)
        return reply

    with pytest.raises(RoundError, match="its privacy ledger is not as long as it was"):
        coordinate(tmp_path, private(), grid_of(silent))


@pytest.mark.parametrize(
    "changes",
    [{"ledger_entries": 3}, {"ledger_entries": 1}, {"ledger_entries": None}, {"ledger_head": None}],
    ids=["uncharged", "shorter", "untold", "headless"],
)
def test_an_evaluation_whose_ledger_does_not_grow_does_not_count(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    def answer(site: str, request: Request) -> Reply:
        reply = answering(measured=True)(site, request)
        if isinstance(request, EvaluateRequest) and site == "site-2" and request.round == 1:
            return replace(reply, **changes)
        return reply

    config = private(metrics_noise=5.0, sites={"quorum": 0.6})
    done = coordinate(tmp_path, config, grid_of(answer))
    first, second = done.seen.records
    # three sites say 3 of 4 each; site-2's update of the first round came before, and counts
    assert first["metrics"] == second["metrics"] == {"accuracy": 0.75, "examples": 8.0}
    assert first["sites"] == ["site-1", "site-2", "site-3"]
    assert second["sites"] == ["site-1", "site-3"]
    assert first["refusals"] == second["refusals"] == {ROLLED_BACK: 1}
    assert set(done.outcome.test) == {"site-1", "site-3"}
    assert first["ledgers"]["site-2"]["rolled_back"] is True
    assert first["ledgers"]["site-1"] == {
        "entries": 5, "head": "h", "seeded": False, "rolled_back": False
    }  # fmt: skip


def directory_of(grid: SlowGrid, of: LedgerWatch) -> Directory:
    return Directory(
        Post(grid, lambda _: LAYOUT),
        private(),
        run="",
        layout=LAYOUT,
        base=BASE,
        manners=Manners(again_s=15.0),
        clock=lambda: grid.now_s,
        ledgers=of,
    )


def greet(directory: Directory) -> None:
    def receive(arrival: Arrival) -> None:
        assert directory.took(arrival)

    directory.greet(receive)


def test_a_site_whose_ledger_fell_is_let_in_by_no_node_and_no_later_greeting() -> None:
    lengths = [5, 3, 9]

    def answer(site: str, request: Request) -> Reply:
        return replace(welcome(lengths.pop(0)), site="site-1")

    grid = SlowGrid(app_of(answer), 2, run_config={}, slow={})
    grid.connected = {1}
    directory = directory_of(grid, watch(updated(5)))
    greet(directory)
    assert directory.nodes == {"site-1": 1}
    grid.connected = {1, 2}  # its agent was restarted, on an older ledger; the old node lingers
    greet(directory)
    greet(directory)
    assert directory.nodes == {}
    assert directory.reasons_of(1) == {ROLLED_BACK}
    grid.now_s += 20  # greeted anew, with a ledger that has grown meanwhile
    greet(directory)
    greet(directory)
    assert directory.nodes == {}
    assert lengths == []
