"""Coordinator: bad replies are counted by reason and fail nothing; the sums are the sites'."""

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from intramural.core.errors import CheckpointError, RoundError, TrainingError
from intramural.core.layout import Layout
from intramural.core.messages import Evaluated, Refusal, Request, Update, Welcome
from intramural.core.metrics import Sums
from intramural.server.checkpoint import load_checkpoint
from intramural.strategies.fedavg import FedAvg
from intramural.strategies.rule import Fold
from tests.server.fakes import (
    LAYOUT,
    SlowGrid,
    app_of,
    coordinate,
    faulty,
    grid_of,
    honest,
    small,
    sums,
)

OTHER = Layout((("other", (7,)),))


def raising(reply: Update) -> Update:
    raise TrainingError("a text that nobody may see")


def refusing(reply: Update) -> Refusal:
    return Refusal(site=reply.site, reason="data", detail="column 'note' is missing")


def poisoned(reply: Update) -> Update:
    return replace(reply, delta=np.full(LAYOUT.size, np.nan, dtype=np.float32))


def huge(reply: Update) -> Update:
    return replace(reply, delta=np.full(LAYOUT.size, 1e38, dtype=np.float32))


def misplaced(reply: Update) -> Evaluated:
    return Evaluated(site=reply.site, round=reply.round, split="validation", sums=sums(1))


def with_layout(layout: Layout) -> Any:
    return lambda u: replace(u, layout=layout.digest, delta=np.zeros(layout.size, np.float32))


FAULTS = [
    (lambda u: replace(u, site="site-1"), "identity"),
    (lambda u: replace(u, round=u.round - 1), "stale"),
    (poisoned, "aggregation"),
    (huge, "aggregation"),
    (with_layout(OTHER), "wire"),
    (lambda u: replace(u, delta=u.delta[:-1]), "wire"),
    (lambda u: replace(u, weight=0), "wrong-content"),
    (lambda u: replace(u, weight=-1), "wire"),
    (lambda u: replace(u, loss=float("nan")), "flower-2"),
    (misplaced, "wrong-kind"),
    (refusing, "data"),
    (raising, "flower-2"),
]
NAMES = [
    "identity", "stale", "nan", "huge", "layout", "size", "no-records", "negative", "nan-loss",
    "kind", "refusal", "raises",
]  # fmt: skip


def test_the_mean_is_weighted_by_records(tmp_path: Path) -> None:
    done = coordinate(tmp_path, small(), grid_of(honest))
    # (1*1 + 2*2 + 3*3) / (1 + 2 + 3) = 14/6 a round, two rounds
    np.testing.assert_allclose(done.outcome.vector, np.full(7, 28 / 6), rtol=1e-6)
    first = done.outcome.history[0]
    assert first["sites"] == ["site-1", "site-2", "site-3"]
    assert first["train_loss"] == pytest.approx(14 / 6)
    assert first["metrics"]["accuracy"] == pytest.approx(2 / 6)  # 0 of 1, 1 of 2 and 1 of 3
    assert first["refusals"] == {}


@pytest.mark.parametrize(("fault", "reason"), FAULTS, ids=NAMES)
def test_a_bad_update_is_counted_by_reason_and_fails_nothing(
    tmp_path: Path, fault: Any, reason: str
) -> None:
    config = small(sites={"quorum": 0.6})
    done = coordinate(tmp_path, config, grid_of(faulty({"site-2": fault})))
    # site-2 is out: (1*1 + 3*3) / (1 + 3) = 2.5 a round
    np.testing.assert_allclose(done.outcome.vector, np.full(7, 5.0), rtol=1e-6)
    for record in done.seen.records:
        assert record["refusals"] == {reason: 1}
        assert record["sites"] == ["site-1", "site-3"]
    refused = [entry.body for entry in done.journal if entry.kind == "refused"]
    assert [(body["round"], body["site"], body["reason"]) for body in refused] == [
        (1, "site-2", reason),
        (2, "site-2", reason),
    ]
    assert "nobody may see" not in (tmp_path / "journal.jsonl").read_text()


def test_a_refusal_is_journalled_with_the_site_s_own_words(tmp_path: Path) -> None:
    grid = grid_of(faulty({"site-2": refusing}))
    done = coordinate(tmp_path, small(sites={"quorum": 0.6}), grid)
    details = [entry.body["detail"] for entry in done.journal if entry.kind == "refused"]
    assert details == ["column 'note' is missing"] * 2
    assert "site-2: data column 'note' is missing" in done.seen.lines


def test_without_a_quorum_the_run_fails_and_names_the_reasons(tmp_path: Path) -> None:
    grid = grid_of(faulty({"site-1": poisoned, "site-2": refusing}))
    with pytest.raises(RoundError, match=r"1 good answers, 3 needed.*'aggregation': 3, 'data': 3"):
        coordinate(tmp_path, small(), grid)
    assert load_checkpoint(tmp_path / "checkpoints") == (None, [])


@pytest.mark.parametrize(
    ("reasons", "exit_code"),
    [
        (["budget-exhausted", "budget-exhausted"], 3),
        (["budget-exhausted", "refused"], 3),
        (["budget-exhausted", "data"], 1),  # something is to be mended, not decided
        (["at-site", "at-site"], 1),
    ],
)
def test_a_run_ended_by_the_sites_own_rules_has_their_exit_code(
    tmp_path: Path, reasons: list[str], exit_code: int
) -> None:
    def refusal(reason: str) -> Any:
        return lambda update: Refusal(site=update.site, reason=reason, detail="no")

    answers = {f"site-{n}": refusal(reason) for n, reason in enumerate(reasons, start=1)}
    with pytest.raises(RoundError, match="1 good answers, 3 needed") as error:
        coordinate(tmp_path, small(), grid_of(faulty(answers)))
    assert error.value.exit_code == exit_code


def test_a_round_s_record_tells_of_all_its_attempts(tmp_path: Path) -> None:
    tries: list[int] = []

    def once(update: Update) -> Update:
        tries.append(update.round)
        return poisoned(update) if len(tries) == 1 else update

    done = coordinate(tmp_path, small(), grid_of(faulty({"site-2": once})))
    first, second = done.seen.records
    assert first["refusals"] == {"aggregation": 1}
    assert second["refusals"] == {}
    assert first["sites"] == second["sites"]
    # two attempts of training and one evaluation, against one and one
    assert first["bytes_down"] > 1.2 * second["bytes_down"]
    assert [e.kind for e in done.journal] == [
        "opened", "refused", "discarded", "opened", "committed", "opened", "committed",
    ]  # fmt: skip


def other_base(welcome: Welcome) -> Welcome:
    return replace(welcome, base="sha256:" + "c" * 64)


def other_layout(welcome: Welcome) -> Welcome:
    return replace(welcome, layout=OTHER.digest)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (other_base, "has another base model"),
        (other_layout, "derives another layout"),
        (lambda w: replace(w, site="site-1"), "two nodes say they are site 'site-1'"),
        (lambda w: Refusal(site=w.site, reason="refused", detail="not today"), "not today"),
        (raising, "flower-2"),
    ],
)
def test_a_site_that_does_not_fit_takes_no_part(tmp_path: Path, fault: Any, words: str) -> None:
    answer = faulty({"site-3": fault}, kind=Welcome)
    done = coordinate(tmp_path, small(sites={"min": 2}), grid_of(answer))
    assert [record["sites"] for record in done.seen.records] == [["site-1", "site-2"]] * 2
    again = tmp_path / "again"
    with pytest.raises(RoundError, match=f"2 of 3 sites can take part .*{words}"):
        coordinate(again, small(), grid_of(answer))


def overflowing(reply: Evaluated) -> Evaluated:
    counts = reply.sums.counts | {"loss": np.array([2**63 - 1])}
    return replace(reply, sums=Sums(counts=counts))


def cells(count: int) -> Any:
    confusion = np.zeros(count, dtype=np.int64)
    confusion[0] = 1
    return lambda e: replace(e, sums=Sums(counts=e.sums.counts | {"confusion": confusion}))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (cells(9), "wrong-content"),
        (cells(16), None),
        (lambda e: replace(e, split="train"), "wrong-content"),
        (lambda e: replace(e, sums=Sums(counts={})), "wrong-content"),
        (lambda e: replace(e, sums=sums(0)), "aggregation"),
    ],
    ids=["other-labels", "good", "split", "no-sums", "no-examples"],
)
def test_a_bad_evaluation_is_left_out(tmp_path: Path, fault: Any, reason: str | None) -> None:
    # site-1 answers first: its shapes must not decide what the others' may be
    answer = faulty({"site-1": fault}, kind=Evaluated)
    done = coordinate(tmp_path, small(), grid_of(answer))
    for record in done.seen.records:
        assert record["refusals"] == ({} if reason is None else {reason: 1})
        assert record["metrics"]["examples"] == (6 if reason is None else 5)
    assert ("site-1" in done.outcome.test) == (reason is None)


def test_evaluations_that_overflow_together_do_not_stop_the_run(tmp_path: Path) -> None:
    answer = faulty({"site-1": overflowing, "site-2": overflowing}, kind=Evaluated)
    done = coordinate(tmp_path, small(), grid_of(answer))
    assert sorted(done.outcome.test) == ["site-1"]
    assert done.seen.records[0]["refusals"] == {"aggregation": 2}


def test_losses_whose_sum_overflows_do_not_stop_the_run(tmp_path: Path) -> None:
    every = {f"site-{n}": (lambda u: replace(u, loss=1e308)) for n in (1, 2, 3)}
    done = coordinate(tmp_path, small(), grid_of(faulty(every)))
    assert done.seen.records[0]["train_loss"] == pytest.approx(1e308)


def test_one_reply_at_a_time_is_alive(tmp_path: Path) -> None:
    alive: list[weakref.ref[Any]] = []
    counts: list[int] = []
    nodes = 8

    def counting(site: str, request: Request) -> Any:
        counts.append(sum(ref() is not None for ref in alive))
        reply = honest(site, request)
        if isinstance(reply, Update):
            alive.append(weakref.ref(reply.delta))
        return reply

    grid = grid_of(counting, nodes)
    deliver = grid._deliver

    def watched(message: Message) -> Message:
        reply = deliver(message)
        alive.append(weakref.ref(reply))
        return reply

    class Watched(FedAvg):
        def add(self, fold: Fold, update: Update) -> None:
            alive.append(weakref.ref(update))
            super().add(fold, update)

    grid._deliver = watched  # type: ignore[method-assign]
    coordinate(tmp_path, small(sites={"min": nodes}), grid, rule=Watched())
    assert len(counts) == nodes * (1 + 2 + 2 + 1)  # greeting, training, evaluation, test
    assert max(counts) == 0  # when a site works, no reply of another is left


def test_a_slow_site_is_left_behind_and_its_late_update_is_stale(tmp_path: Path) -> None:
    grid = SlowGrid(app_of(honest), 3, run_config={}, slow={2: 6})
    config = small(sites={"quorum": 0.6, "deadline_s": 3.0}, federation={"rounds": 4})
    done = coordinate(tmp_path, config, grid, clock=lambda: grid.now_s)
    assert [record["sites"] for record in done.seen.records] == [["site-1", "site-3"]] * 4
    stale = [e.body for e in done.journal if e.kind == "refused"]
    assert {body["reason"] for body in stale} == {"stale"}
    assert {body["site"] for body in stale} == {"site-2"}
    assert done.journal[-1].kind == "committed"


def test_a_silent_site_does_not_hold_the_first_round_up(tmp_path: Path) -> None:
    grid = SlowGrid(app_of(honest), 4, run_config={}, slow={}, silent=[4])
    config = small(sites={"deadline_s": 5.0})
    done = coordinate(tmp_path, config, grid, clock=lambda: grid.now_s)
    assert [len(record["sites"]) for record in done.seen.records] == [3, 3]


def test_a_run_waits_for_its_sites_and_says_so_once(tmp_path: Path) -> None:
    grid = SlowGrid(app_of(honest), 3, run_config={}, slow={})
    grid.connected = {1, 2}
    looks: list[float] = []

    def sleep(_: float) -> None:
        looks.append(grid.now_s)
        if len(looks) == 5:
            grid.connected = {1, 2, 3}

    done = coordinate(tmp_path, small(), grid, sleep=sleep, patience_s=float("inf"))
    assert done.seen.lines == ["round 1 waits: 2 of 3 sites are ready (they did not connect)"]
    assert len(done.seen.records) == 2


def test_a_share_of_the_sites_is_drawn_and_the_draw_depends_on_the_seed_alone(
    tmp_path: Path,
) -> None:
    config = small(sites={"min": 2, "share": 0.5}, federation={"rounds": 6})
    cohorts = [
        [e.body["sites"] for e in coordinate(folder, config, grid_of(honest, 5)).journal
         if e.kind == "opened"]
        for folder in (tmp_path / "a", tmp_path / "b")
    ]  # fmt: skip
    assert cohorts[0] == cohorts[1]
    assert all(len(cohort) == 3 for cohort in cohorts[0])  # ceil(0.5 * 5)
    assert len({tuple(cohort) for cohort in cohorts[0]}) > 1


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_a_resumed_run_ends_at_the_same_arrays(tmp_path: Path, rounds: int) -> None:
    config = small(strategy={"momentum": 0.5}, federation={"rounds": 4})
    whole = coordinate(tmp_path / "whole", config, grid_of(honest))
    short = small(strategy={"momentum": 0.5}, federation={"rounds": rounds})
    coordinate(tmp_path / "part", short, grid_of(honest))
    begin, problems = load_checkpoint(tmp_path / "part" / "checkpoints")
    assert begin is not None
    assert problems == []
    rest = coordinate(tmp_path / "part", config, grid_of(honest), begin=begin)
    assert rest.outcome.vector.tobytes() == whole.outcome.vector.tobytes()
    ours, theirs = ([r["round"] for r in d.outcome.history] for d in (rest, whole))
    assert ours == theirs == [1, 2, 3, 4]


def test_a_full_disk_stops_the_run_and_the_round_is_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("intramural.server.checkpoint.save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left.*free space there"):
        coordinate(tmp_path, small(), grid_of(honest))
    assert "committed" not in (tmp_path / "journal.jsonl").read_text()
    assert load_checkpoint(tmp_path / "checkpoints") == (None, [])
    assert list((tmp_path / "checkpoints").glob("round-*")) == []


def test_without_evaluation_a_run_has_no_metrics_and_still_ends(tmp_path: Path) -> None:
    done = coordinate(tmp_path, small(evaluation={"every": 0}), grid_of(honest))
    assert [record["metrics"] for record in done.seen.records] == [{}, {}]
    assert done.outcome.test == {}
