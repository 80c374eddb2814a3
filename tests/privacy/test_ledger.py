"""The ledger: charged before, never refunded, whole after a restart."""

import json
import os
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intramural.core.errors import BudgetExhausted, LedgerError
from intramural.core.journal import GENESIS, Journal, scan
from intramural.privacy.accountant import Event, Relation, epsilon_pld
from intramural.privacy.book import body_of, read_book
from intramural.privacy.charges import Charge
from intramural.privacy.ledger import Ledger
from tests.privacy.ledgers import START, charge, clock, opened, step_sum

DELTA = 1e-5


def taken(ledger: Ledger, one: Charge | None = None, *, lifetime: float | None = None) -> int:
    return ledger.charge(one or charge(), epsilon_lifetime=lifetime, delta=DELTA)


def test_a_ledger_begins_with_who_and_what(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "deep" / "ledger.jsonl")
    (entry,) = scan(ledger.path).entries
    identity = entry.body.pop("ledger")
    assert (entry.kind, entry.seq) == ("opened", 0)
    assert entry.body == {"site": "st-elsewhere", "data": "notes", "format": 1}
    assert len(bytes.fromhex(identity)) == 16
    assert opened(tmp_path / "other.jsonl").book.opened.ledger != identity
    assert (len(ledger), ledger.head, ledger.charges) == (1, entry.digest, ())
    assert opened(ledger.path).head == ledger.head  # opened again, nothing is written


def test_a_charge_is_on_disk_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = opened(tmp_path / "ledger.jsonl")
    synced: list[bytes] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        synced.append(ledger.path.read_bytes())

    monkeypatch.setattr(os, "fsync", fsync)
    one = charge(unit="person", noise_multiplier=0.9301, clip_norm=0.1)
    assert taken(ledger, one) == 1
    assert synced[-1] == ledger.path.read_bytes()
    entry = scan(ledger.path).entries[1]
    assert (entry.kind, entry.seq) == ("charged", 1)
    assert entry.body == json.loads(one.model_dump_json())
    assert opened(ledger.path).charges == (one,) == ledger.charges


def test_settling_is_a_note_and_no_refund(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "ledger.jsonl")
    first, second = taken(ledger), taken(ledger, charge(attempt=2))
    before = ledger.epsilon(DELTA)
    ledger.settle(second, outcome="done")
    ledger.settle(first, outcome="failed")
    assert ledger.epsilon(DELTA) == before == opened(ledger.path).epsilon(DELTA) == 4.0
    assert read_book(ledger.path).outcomes == {first: "failed", second: "done"}
    for no_charge in (0, 3, 99, -1):
        with pytest.raises(LedgerError, match=f"entry {no_charge} is no charge to settle"):
            ledger.settle(no_charge, outcome="done")
    assert len(ledger) == 5


def test_the_budget_is_asked_with_the_new_charge_in_it(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "ledger.jsonl")  # a charge costs 2.0
    assert [taken(ledger, lifetime=5.0), taken(ledger, lifetime=5.0)] == [1, 2]
    before = ledger.path.read_bytes()
    message = (
        r"one record would have spent epsilon 6\.0000 at delta 1e-05, of 5 for its lifetime and "
        r"4\.0000 so far"
    )
    with pytest.raises(BudgetExhausted, match=message):
        taken(ledger, lifetime=5.0)
    assert ledger.path.read_bytes() == before
    assert ledger.epsilon(DELTA) == 4.0
    taken(ledger, charge(steps=10), lifetime=5.0)  # 5.0 of 5.0
    with pytest.raises(BudgetExhausted):
        taken(ledger, charge(steps=1), lifetime=5.0)
    taken(ledger, lifetime=None)  # the site set no limit


def test_other_runs_and_other_kinds_of_charges_count_too(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    taken(opened(path), charge(run="other", manifest="sha256:2"))
    opened(path).charge(charge(is_private=False), epsilon_lifetime=4.0, delta=DELTA)
    metrics = charge(purpose="metrics", steps=1, sample_rate=1.0)
    with pytest.raises(BudgetExhausted, match=r"4\.1000 at delta"):
        taken(opened(path), metrics, lifetime=4.0)


def test_what_is_foreseen_is_not_written(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "ledger.jsonl")
    before = ledger.path.read_bytes()
    rounds = [charge(round=r) for r in (1, 2, 3)]
    ledger.foresee(rounds, epsilon_lifetime=6.0, delta=DELTA)
    ledger.foresee(rounds, epsilon_lifetime=None, delta=DELTA)
    ledger.foresee([], epsilon_lifetime=1e-9, delta=DELTA)
    with pytest.raises(BudgetExhausted, match=r"6\.0000 .* of 5\.9 .* and 0\.0000 so far"):
        ledger.foresee(rounds, epsilon_lifetime=5.9, delta=DELTA)
    assert ledger.path.read_bytes() == before


def test_rounds_foreseen_are_composed_once_and_a_round_more_anew(tmp_path: Path) -> None:
    asked: list[int] = []

    def counting(events: Sequence[Event], *, delta: float, relation: Relation) -> float:
        asked.append(sum(event.steps for event in events))
        return step_sum(events, delta=delta, relation=relation)

    ledger = opened(tmp_path / "ledger.jsonl", composition=counting)
    rounds = [charge(round=r) for r in (1, 2, 3)]
    ledger.foresee(rounds, epsilon_lifetime=6.0, delta=DELTA)
    for one in rounds:
        taken(ledger, one, lifetime=6.0)
    assert asked == [60]
    with pytest.raises(BudgetExhausted):
        taken(ledger, charge(round=3, attempt=2), lifetime=6.0)
    assert asked[1:] == [80, 60]
    other = charge(round=4, noise_multiplier=9.0)  # as few steps, of a mechanism not foreseen
    with pytest.raises(BudgetExhausted):
        taken(ledger, other, lifetime=6.0)


def test_what_was_foreseen_within_one_limit_is_not_within_a_lower_one(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "ledger.jsonl")
    ledger.foresee([charge(), charge(round=2)], epsilon_lifetime=4.0, delta=DELTA)
    with pytest.raises(BudgetExhausted):
        taken(ledger, lifetime=1.9)


@pytest.mark.parametrize("answer", [float("nan"), float("inf")])
def test_an_epsilon_that_is_no_number_is_refused(tmp_path: Path, answer: float) -> None:
    def broken(events: Sequence[Event], *, delta: float, relation: Relation) -> float:
        return answer

    ledger = opened(tmp_path / "ledger.jsonl", composition=broken)
    with pytest.raises(BudgetExhausted):
        taken(ledger, lifetime=1e9)
    assert len(ledger) == 1


def test_the_budget_holds_with_the_real_accountant(tmp_path: Path) -> None:
    # dp-accounting's PLD: 2000 steps at rate 0.01, noise 1 cost 2.584 at delta 1e-5
    ledger = opened(tmp_path / "ledger.jsonl", composition=epsilon_pld)
    for half in (1, 2):
        taken(ledger, charge(steps=1000, round=half), lifetime=2.59)
    assert ledger.spent(DELTA).epsilon == pytest.approx(2.584, abs=1e-3)
    with pytest.raises(BudgetExhausted, match=r"2\.58\d\d so far"):
        taken(ledger, charge(steps=1000, round=3), lifetime=2.59)


def test_two_holders_count_each_others_charges(tmp_path: Path) -> None:
    one, other = (opened(tmp_path / "ledger.jsonl") for _ in range(2))
    assert [taken(one), taken(other), taken(one)] == [1, 2, 3]
    other.settle(3, outcome="done")
    with pytest.raises(BudgetExhausted, match=r"6\.0000 so far"):
        taken(other, lifetime=7.0)
    one.foresee([], epsilon_lifetime=1.0, delta=DELTA)  # reads
    assert (len(one), one.head) == (len(other), other.head)


def test_heads_of_the_past_are_in_the_chain(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "ledger.jsonl")
    heads = [GENESIS, ledger.head]
    for _ in range(3):
        taken(ledger)
        heads.append(ledger.head)
    again = opened(ledger.path)
    for head in heads:
        again.check_head(head)
    with pytest.raises(LedgerError, match=r"sha256:ffffffffffff is not in its chain of 4 entries"):
        again.check_head("sha256:" + "f" * 64)


class Drifting:
    """A clock that can be set."""

    def __init__(self) -> None:
        self.time = START

    def __call__(self) -> datetime:
        return self.time


STEPS = st.one_of(
    st.tuples(st.just("charge"), st.integers(1, 50), st.sampled_from(["record", "person"])),
    st.tuples(st.just("replace"), st.integers(1, 50), st.sampled_from(["record", "person"])),
    st.tuples(st.just("settle"), st.integers(0, 5), st.just("")),
    st.tuples(st.just("restart"), st.just(0), st.just("")),
    st.tuples(st.just("tear"), st.integers(1, 40), st.just("")),
    st.tuples(st.just("clock"), st.integers(-900, 900), st.just("")),
)


@settings(max_examples=25, deadline=None)
@given(steps=st.lists(STEPS, max_size=12))
def test_epsilon_never_falls_whatever_happens(
    steps: list[tuple[str, int, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, now = tmp_path_factory.mktemp("ledger") / "ledger.jsonl", Drifting()
    ledger, seen = opened(path, now=now), 0.0
    for step, number, unit in steps:
        relation = "replace-one" if step == "replace" else "add-remove"
        try:
            match step:
                case "charge" | "replace":
                    one = charge(steps=number, unit=unit, relation=relation)
                    ledger.charge(one, epsilon_lifetime=12.0, delta=DELTA)
                case "settle":
                    ledger.settle(number, outcome="failed")
                case "clock":
                    now.time += (START.replace(hour=10) - START) * (number / 3600)
                case "restart":
                    ledger = opened(path, now=now)
                case "tear":
                    whole = path.read_bytes()
                    path.write_bytes(whole + whole[: min(number, len(whole) - 1)])
                    ledger = opened(path, now=now)
        except (BudgetExhausted, LedgerError):
            pass
        spent = ledger.epsilon(DELTA)
        assert seen <= spent <= 12.0
        assert opened(path, now=now).epsilon(DELTA) == spent
        seen = spent


def test_a_thousand_rounds_are_read_and_answered_quickly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.jsonl"
    opened(path)
    journal = Journal(path, now=clock(start=datetime(2026, 12, 1, tzinfo=UTC)))
    real = charge()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # two thousand of them take seconds
        for round_ in range(1, 1001):
            entry = journal.append("charged", **body_of(real.model_copy(update={"round": round_})))
            journal.append("settled", charge=entry.seq, outcome="done")
    journal.close()
    late = clock(start=datetime(2027, 1, 1, tzinfo=UTC))
    ledger = opened(path, composition=epsilon_pld, now=late)
    ledger.charge(charge(round=1001), epsilon_lifetime=50.0, delta=DELTA)
    started = time.process_time()
    epsilon = ledger.epsilon(DELTA)
    assert time.process_time() - started < 0.05
    # 20 steps x 1001 in one composition, which grows like a root: far below 1001 x one round's
    assert 9 < epsilon < 10


@pytest.mark.parametrize("content", [b"\0" * 32, b"abc", b"", b"\xff" * 32])
def test_a_torn_name_in_the_lock_file_is_written_anew(tmp_path: Path, content: bytes) -> None:
    ledger = opened(tmp_path / "ledger.jsonl")
    lock = ledger.path.with_name("ledger.jsonl.lock")
    lock.write_bytes(content)
    assert opened(ledger.path).head == ledger.head
    assert lock.read_text() == ledger.book.opened.ledger
