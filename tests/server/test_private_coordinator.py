"""Coordinator under [privacy]: ledgers must grow, and nothing but updates and noise is heard."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intramural.core.errors import RoundError
from intramural.core.federation import FederationConfig
from intramural.core.journal import scan
from intramural.core.messages import (
    Evaluated,
    EvaluateRequest,
    Reply,
    Request,
    Update,
    Welcome,
)
from intramural.core.metrics import Sums
from intramural.server.checkpoint import load_checkpoint
from intramural.server.ledger_watch import LedgerWatch
from tests.server.fakes import coordinate, grid_of, honest, small

PRIVACY: dict[str, Any] = {
    "unit": "record",
    "noise_multiplier": 1.0,
    "delta": 1e-5,
    "clip_norm": 1.0,
    "nominal_records": 60,
}
Change = Callable[[Update], Update]


def private(*, metrics_noise: float | None = None, **sections: Any) -> FederationConfig:
    privacy = PRIVACY | ({"metrics_noise": metrics_noise} if metrics_noise else {})
    return small(privacy=privacy, strategy={"weights": "equal"}, **sections)


def noised(correct: list[int], examples: list[int]) -> Sums:
    counts = {"correct": correct, "examples": examples}
    return Sums(counts={name: np.array(n, dtype=np.int64) for name, n in counts.items()})


def answering(
    change: Change | None = None,
    *,
    sums: Sums | None = None,
    asked: list[Request] | None = None,
    greets: int = 1,
    measured: bool = False,
) -> Callable[[str, Request], Reply]:
    """Return sites that train privately; site-2's updates are changed, site-1 evaluates to `sums`.

    A ledger is opened, then each round charges and settles: 1 + 2 * round entries. So does each
    evaluation, if the rounds are `measured`. A greeting tells of `greets` entries.
    """

    def answer(site: str, request: Request) -> Reply:
        if asked is not None:
            asked.append(request)
        reply = honest(site, request)
        if isinstance(reply, Welcome):
            return replace(reply, ledger_entries=greets, ledger_head="h")
        assert isinstance(reply, Update | Evaluated)
        entries = 1 + (4 if measured else 2) * (reply.round - 1) + 2
        if isinstance(reply, Update):
            reply = replace(
                reply, weight=1, loss=None, seconds=None, ledger_entries=entries, ledger_head="h"
            )
            return change(reply) if change is not None and site == "site-2" else reply
        own = sums if sums is not None and site == "site-1" else noised([3], [4])
        entries += 2 if reply.split == "validation" else 4
        return replace(reply, sums=own, ledger_entries=entries, ledger_head="h")

    return answer


def test_ledgers_that_grow_are_noted_and_no_loss_or_metric_is(tmp_path: Path) -> None:
    asked: list[Request] = []
    done = coordinate(tmp_path, private(), grid_of(answering(asked=asked)))
    # site-N moves by N: the plain mean of 1, 2 and 3, twice
    np.testing.assert_allclose(done.outcome.vector, np.full(7, 4.0), rtol=1e-6)
    for record in done.seen.records:
        told = {"entries": 1 + 2 * record["round"], "head": "h", "seeded": False}
        told["rolled_back"] = False
        assert record["ledgers"] == dict.fromkeys(("site-1", "site-2", "site-3"), told)
        assert (record["metrics"], record["train_loss"], record["refusals"]) == ({}, None, {})
    assert not any(isinstance(request, EvaluateRequest) for request in asked)
    assert done.outcome.test == {}


@pytest.mark.parametrize(
    ("entries", "rounds"),
    [
        (lambda u: 3, [2]),  # a second round from a ledger as long as after the first
        (lambda u: 5 - 2 * u.round, [2]),  # 3, then 1: rolled back
        (lambda u: 0, [1, 2]),
        (lambda u: None, [1, 2]),
    ],
    ids=["same", "shorter", "empty", "untold"],
)
def test_an_update_whose_ledger_does_not_grow_is_refused(
    tmp_path: Path, entries: Callable[[Update], int | None], rounds: list[int]
) -> None:
    rolled = answering(lambda u: replace(u, ledger_entries=entries(u)))
    done = coordinate(tmp_path, private(sites={"quorum": 0.6}), grid_of(rolled))
    refused = [e.body for e in done.journal if e.kind == "refused"]
    assert [(b["site"], b["round"]) for b in refused] == [("site-2", n) for n in rounds]
    assert {b["reason"] for b in refused} == {"ledger-rolled-back"}
    # without site-2 the mean of 1 and 3 is 2, as with it
    np.testing.assert_allclose(done.outcome.vector, np.full(7, 4.0), rtol=1e-6)
    for record in done.seen.records:
        assert ("site-2" in record["sites"]) == (record["round"] not in rounds)


def test_a_ledger_rolled_back_once_counts_no_more_however_long_it_grows(tmp_path: Path) -> None:
    lengths = {1: 5, 2: 3, 3: 9}
    seen: list[Update] = []

    def told(update: Update) -> Update:
        seen.append(update)
        return replace(update, ledger_entries=lengths[update.round])

    rolled = answering(told)
    config = private(federation={"rounds": 3}, sites={"quorum": 0.6})
    done = coordinate(tmp_path, config, grid_of(rolled))
    assert [("site-2" in record["sites"]) for record in done.seen.records] == [True, False, False]
    # and another process that goes on from what was recorded
    watch = LedgerWatch(done.seen.records, [])
    update = replace(seen[-1], ledger_entries=99)
    assert watch.problem(update) == "ledger-rolled-back"
    assert watch.problem(replace(update, site="site-1")) is None


def test_a_rollback_that_ended_a_run_is_known_to_the_run_that_goes_on(tmp_path: Path) -> None:
    lengths, seen = iter([9, 3, 5, 7]), []  # rolled back after round 1; each try adds to it

    def told(update: Update) -> Update:
        seen.append(update)
        return replace(update, ledger_entries=next(lengths))

    with pytest.raises(RoundError, match="ledger-rolled-back"):  # all three sites are needed
        coordinate(tmp_path, private(), grid_of(answering(told)))
    committed, _ = load_checkpoint(tmp_path / "checkpoints")
    assert committed is not None
    watch = LedgerWatch(committed.history, scan(tmp_path / "journal.jsonl").entries)
    assert watch.problem(replace(seen[-1], ledger_entries=11)) == "ledger-rolled-back"


def test_an_update_that_names_no_ledger_head_is_refused(tmp_path: Path) -> None:
    headless = answering(lambda u: replace(u, ledger_head=None))
    done = coordinate(tmp_path, private(sites={"quorum": 0.6}), grid_of(headless))
    for record in done.seen.records:
        assert record["refusals"] == {"ledger-rolled-back": 1}


def test_a_site_that_drew_from_a_seed_is_noted(tmp_path: Path) -> None:
    done = coordinate(tmp_path, private(), grid_of(answering(lambda u: replace(u, seeded=True))))
    heard = done.seen.records[-1]["ledgers"]
    assert {site: told["seeded"] for site, told in heard.items()} == {
        "site-1": False, "site-2": True, "site-3": False
    }  # fmt: skip


def test_a_resumed_run_remembers_how_long_ledgers_were(tmp_path: Path) -> None:
    config = private(sites={"quorum": 0.6})
    short = private(sites={"quorum": 0.6}, federation={"rounds": 1})
    coordinate(tmp_path, short, grid_of(answering()))
    begin, _ = load_checkpoint(tmp_path / "checkpoints")
    assert begin is not None
    # a copy from before round 2
    restored = answering(lambda u: replace(u, ledger_entries=3), greets=3)
    rest = coordinate(tmp_path, config, grid_of(restored), begin=begin)
    assert rest.seen.records[-1]["refusals"] == {"ledger-rolled-back": 1}
    heard = {site: told["entries"] for site, told in rest.seen.records[-1]["ledgers"].items()}
    assert heard == {"site-1": 5, "site-2": 3, "site-3": 5}


def test_without_privacy_no_ledger_is_asked_for(tmp_path: Path) -> None:
    done = coordinate(tmp_path, small(), grid_of(honest))
    assert [record["ledgers"] for record in done.seen.records] == [{}, {}]


def test_noised_counts_are_added_up(tmp_path: Path) -> None:
    answer = answering(sums=noised([0], [2]), measured=True)
    done = coordinate(tmp_path, private(metrics_noise=5.0), grid_of(answer))
    # 0 of 2, and twice 3 of 4
    for record in done.seen.records:
        assert record["metrics"] == {"accuracy": 0.6, "examples": 10.0}
    assert set(done.outcome.test) == {"site-1", "site-2", "site-3"}


@pytest.mark.parametrize(
    ("sums", "reason"),
    [
        (noised([5], [4]), "aggregation"),
        (noised([], []), "aggregation"),
        (noised([3, 3], [4, 4]), "aggregation"),
        (noised([1], [2**41]), "aggregation"),
        (Sums(counts={"examples": np.array([4])}), "wrong-content"),
        (Sums(counts={"confusion": np.ones(16, dtype=np.int64)}), "wrong-content"),
    ],
    ids=["impossible", "empty", "two", "huge", "half", "exact"],
)
def test_counts_that_cannot_be_are_left_out_and_fail_nothing(
    tmp_path: Path, sums: Sums, reason: str
) -> None:
    answer = answering(sums=sums, measured=True)
    done = coordinate(tmp_path, private(metrics_noise=5.0), grid_of(answer))
    for record in done.seen.records:
        assert record["refusals"] == {reason: 1}
        assert record["metrics"] == {"accuracy": 0.75, "examples": 8.0}


def test_exact_sums_count_for_nothing_under_privacy(tmp_path: Path) -> None:
    done = coordinate(tmp_path, private(metrics_noise=5.0), grid_of(exact))
    for record in done.seen.records:
        assert record["refusals"] == {"wrong-content": 3}
        assert record["metrics"] == {}


def exact(site: str, request: Request) -> Reply:
    """Answer privately, but for evaluations, whose sums are exact."""
    reply = answering(measured=True)(site, request)
    return honest(site, request) if isinstance(reply, Evaluated) else reply


def test_a_run_of_which_every_ledger_stands_still_ends(tmp_path: Path) -> None:
    def still(site: str, request: Request) -> Reply:
        reply = answering()(site, request)
        return replace(reply, ledger_entries=0) if isinstance(reply, Update) else reply

    with pytest.raises(RoundError, match="ledger-rolled-back"):
        coordinate(tmp_path, private(), grid_of(still))
