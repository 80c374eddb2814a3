"""What is kept beside a ledger spares the next load its compositions, and is never the truth."""

import gc
import hashlib
import json
import os
import stat
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from intramural.core.errors import BudgetExhausted
from intramural.core.journal import Journal
from intramural.privacy.accountant import RECORD_INTERVAL, SCREEN_INTERVAL
from intramural.privacy.book import body_of
from intramural.privacy.charges import Charge
from intramural.privacy.kept import kept_beside
from intramural.privacy.ledger import Ledger
from tests.privacy.compositions import Count, forget_all
from tests.privacy.ledgers import charge, clock
from tests.reference.pld import pld_epsilon

DELTA = 1e-5
LATE = datetime(2027, 1, 1, tzinfo=UTC)
MECHANISMS = [(0.01, 2.0, 20), (0.012, 2.2, 20), (1.0, 200.0, 1), (0.008, 1.8, 20), (0.01, 2.5, 20)]
"""Rate, noise and steps of a round of each."""


def loaded(path: Path) -> Ledger:
    """Open a ledger with the real accountant, as a process does that has composed nothing yet."""
    forget_all()
    return Ledger(path, site="st-elsewhere", data="notes", now=clock(start=LATE))


def of(mechanism: tuple[float, float, int], **changes: Any) -> Charge:
    rate, noise, steps = mechanism
    return charge(sample_rate=rate, noise_multiplier=noise, steps=steps, **changes)


def written(path: Path, *charges: Charge) -> Path:
    """Write charges to a ledger, as another process would, without composing."""
    if not path.exists():
        Ledger(path, site="st-elsewhere", data="notes", now=clock())
    journal = Journal(path, now=lambda: datetime(2026, 12, 1, tzinfo=UTC))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # a thousand of them take seconds
        for one in charges:
            journal.append("charged", **body_of(one))
    journal.close()
    return path


def rounds(count: int) -> list[Charge]:
    return [of(MECHANISMS[r % len(MECHANISMS)], round=r + 1) for r in range(count)]


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a ledger of a thousand rounds of five mechanisms."""
    return written(tmp_path_factory.mktemp("thousand") / "ledger.jsonl", *rounds(1000))


def test_a_thousand_rounds_of_five_mechanisms_answer_at_once_after_a_load(
    thousand: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [(rate, noise, 200 * steps) for rate, noise, steps in MECHANISMS]
    expected = pld_epsilon(*parts, delta=DELTA)
    count = Count(monkeypatch)
    for is_kept in (False, True):
        assert kept_beside(thousand).exists() == is_kept
        ledger = loaded(thousand)
        narrow = count.taken(RECORD_INTERVAL)
        assert bool(narrow.get("repeated")) != is_kept  # the second load composes none of it anew
        gc.collect()  # now and not in the midst: the other tests left much behind
        began = time.process_time()
        found = ledger.epsilon(DELTA)
        assert time.process_time() - began < 0.05
        assert count.taken() == {}
        assert found == pytest.approx(expected, rel=1e-6)


def test_a_ledger_that_grew_is_composed_with_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "ledger.jsonl", *rounds(50))
    loaded(path)
    written(path, of(MECHANISMS[0]), of((0.02, 3.0, 10)))
    count = Count(monkeypatch)
    ledger = loaded(path)
    # two mechanisms have new steps, which are composed with each other, with what is kept, and
    # that with the Gaussian of the evaluations, which costs nothing to make
    assert count.taken(RECORD_INTERVAL) == {"composed": 3, "repeated": 2, "step": 3}
    parts = [(rate, noise, 10 * steps) for rate, noise, steps in MECHANISMS]
    parts[0] = (0.01, 2.0, 220)
    expected = pld_epsilon(*parts, (0.02, 3.0, 10), delta=DELTA)
    assert ledger.epsilon(DELTA) == pytest.approx(expected, rel=1e-6)
    count.taken()
    loaded(path)
    assert count.taken(RECORD_INTERVAL) == {"composed": 1, "step": 1}  # it is kept in turn


def test_a_charge_of_a_known_mechanism_costs_one_composition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "ledger.jsonl", *rounds(40))
    ledger = loaded(path)
    ledger.charge(of(MECHANISMS[0]), epsilon_lifetime=None, delta=DELTA)
    ledger.epsilon(DELTA)
    count = Count(monkeypatch)
    ledger.charge(of(MECHANISMS[0], round=2), epsilon_lifetime=None, delta=DELTA)
    ledger.epsilon(DELTA)
    assert count.taken() == {"composed": 2}  # with what stands, and that with the Gaussian


def test_what_a_charge_would_cost_is_looked_up_in_wide_bins_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "ledger.jsonl", *rounds(40))
    ledger, count = loaded(path), Count(monkeypatch)
    run = [of(MECHANISMS[0], round=round_) for round_ in range(1, 11)]
    ledger.foresee(run, epsilon_lifetime=9.0, delta=DELTA)
    assert count.taken(RECORD_INTERVAL) == {}
    ledger.foresee([*run, of((0.02, 3.0, 10))], epsilon_lifetime=9.0, delta=DELTA)
    # what stands in wide bins, a new mechanism, the Gaussian: nothing else
    assert count.taken(SCREEN_INTERVAL)["repeated"] == 1
    for one in run:
        ledger.charge(one, epsilon_lifetime=9.0, delta=DELTA)
    assert count.taken() == {}


def test_a_limit_that_only_narrow_bins_keep_is_kept(tmp_path: Path) -> None:
    path = written(tmp_path / "ledger.jsonl", *rounds(4))
    one = of(MECHANISMS[0])
    parts = [(0.01, 2.0, 40), *MECHANISMS[1:4]]
    cost = pld_epsilon(*parts, delta=DELTA)
    with pytest.raises(BudgetExhausted):
        loaded(path).charge(one, epsilon_lifetime=cost * (1 - 1e-6), delta=DELTA)
    assert loaded(path).charge(one, epsilon_lifetime=cost * (1 + 1e-6), delta=DELTA) == 5


def content_of(path: Path) -> tuple[dict[str, Any], bytes]:
    line, _, numbers = kept_beside(path).read_bytes().partition(b"\n")[2].partition(b"\n")
    return json.loads(line), numbers


def forge(path: Path, header: dict[str, Any], numbers: bytes) -> None:
    """Write what is kept anew, with a digest that is right."""
    content = json.dumps(header).encode() + b"\n" + numbers
    digest = hashlib.sha256(content).hexdigest().encode()
    kept_beside(path).write_bytes(digest + b"\n" + content)


def torn(path: Path) -> None:
    kept_beside(path).write_bytes(kept_beside(path).read_bytes()[:-9])


def emptied(path: Path) -> None:
    kept_beside(path).write_bytes(b"")


def altered(path: Path) -> None:
    content = bytearray(kept_beside(path).read_bytes())
    content[-1000] ^= 1
    kept_beside(path).write_bytes(content)


def no_text(path: Path) -> None:
    kept_beside(path).write_bytes(b"\xff" * 64 + b"\n{}")


def pickled(path: Path) -> None:
    forge(path, {"format": "pickle"}, b"cos\nsystem\n")


def a_folder(path: Path) -> None:
    kept_beside(path).unlink()
    kept_beside(path).mkdir()


def with_header(**changes: Any) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        header, numbers = content_of(path)
        forge(path, header | changes, numbers)

    return changed


def with_part(**changes: Any) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        header, numbers = content_of(path)
        header["parts"][0] |= changes
        forge(path, header, numbers)

    return changed


def with_pmf(**changes: Any) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        header, numbers = content_of(path)
        header["parts"][0]["pmfs"][0] |= changes
        forge(path, header, numbers)

    return changed


def of_a_cheaper_ledger(path: Path) -> None:
    """Exchange the distribution for that of a ledger with a third of the steps."""
    other = written(path.parent / "other" / "ledger.jsonl", *[of((0.01, 2.0, 10))] * 20)
    loaded(other)
    cheaper, numbers = content_of(other)
    header, _ = content_of(path)
    header["parts"][0]["pmfs"] = cheaper["parts"][0]["pmfs"]
    forge(path, header, numbers)


DAMAGES: list[Callable[[Path], None]] = [
    torn,
    emptied,
    altered,
    no_text,
    pickled,
    a_folder,
    of_a_cheaper_ledger,
    with_header(accountant="PLD, dp-accounting 0.1"),
    with_header(interval=1e-3),
    with_header(head="sha256:" + "0" * 64),
    with_header(entries=10**9),
    with_header(entries=0),
    with_header(parts=[]),
    with_header(format=2),
    with_header(more=1),
    with_part(steps=[20]),
    with_part(sample_rates=[0.01, 0.02]),
    with_part(relation="replace-one"),
    with_part(pmfs=[]),
    with_pmf(size=10),
    with_pmf(lower_loss=1 << 40),
    with_pmf(lower_loss=-(1 << 30)),
    with_pmf(infinity_mass=0.5),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """Return a ledger of thirty charges, and what is kept beside it."""
    path = written(tmp_path_factory.mktemp("sound") / "ledger.jsonl", *[of(MECHANISMS[0])] * 30)
    loaded(path)
    return path.read_bytes(), kept_beside(path).read_bytes()


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_kept_and_wrong_is_composed_anew(
    tmp_path: Path, sound: tuple[bytes, bytes], damage: Callable[[Path], None]
) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(sound[0])
    kept_beside(path).write_bytes(sound[1])
    damage(path)
    expected = pld_epsilon((0.01, 2.0, 600), delta=DELTA)
    assert loaded(path).epsilon(DELTA) == pytest.approx(expected, rel=1e-6)
    if damage is not a_folder:
        assert kept_beside(path).read_bytes() == sound[1]  # and is written anew


def test_what_is_kept_of_a_ledger_that_was_rolled_back_says_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "ledger.jsonl", of(MECHANISMS[0]))
    older = path.read_bytes()
    loaded(written(path, *[of(MECHANISMS[0])] * 30))
    ahead = kept_beside(path).read_bytes()
    path.write_bytes(older)
    written(path, *[of(MECHANISMS[3])] * 30)  # another past, as long
    expected = pld_epsilon((0.01, 2.0, 20), (0.008, 1.8, 600), delta=DELTA)
    assert loaded(path).epsilon(DELTA) == pytest.approx(expected, rel=1e-6)
    assert kept_beside(path).read_bytes() != ahead


def test_a_budget_is_never_decided_by_what_is_kept(
    tmp_path: Path, sound: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if it were trusted: here it is, and says that next to nothing was spent."""
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(sound[0])
    kept_beside(path).write_bytes(sound[1])
    of_a_cheaper_ledger(path)
    monkeypatch.setattr("intramural.privacy.composer.BELOW_MAX", 1.0)
    ledger = loaded(path)
    cost = pld_epsilon((0.01, 2.0, 620), delta=DELTA)
    assert ledger.epsilon(DELTA) < 0.7 * cost
    with pytest.raises(BudgetExhausted, match="would have spent"):
        ledger.charge(of(MECHANISMS[0]), epsilon_lifetime=0.99 * cost, delta=DELTA)
    assert ledger.charge(of(MECHANISMS[0]), epsilon_lifetime=1.01 * cost, delta=DELTA) == 31


def test_only_the_owner_may_read_it_and_no_half_of_it_is_ever_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "ledger.jsonl", of(MECHANISMS[0]))
    left_over = tmp_path / f".ledger.jsonl.composed.{os.getpid()}.partial"
    left_over.write_bytes(b"of a process that was killed")
    left_over.chmod(0o666)
    loaded(path)
    assert stat.S_IMODE(kept_beside(path).stat().st_mode) == 0o600
    assert not left_over.exists()
    kept = kept_beside(path).read_bytes()
    written(path, of(MECHANISMS[0]))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    loaded(path)  # a load that cannot keep anything is a load
    assert kept_beside(path).read_bytes() == kept
    assert {file.name for file in tmp_path.iterdir()} == {
        "ledger.jsonl", "ledger.jsonl.lock", "ledger.jsonl.composed",
    }  # fmt: skip


@pytest.mark.parametrize("charges", [[], [of(MECHANISMS[2])], [of((0.01, 0.02, 20))]])
def test_what_costs_nothing_to_compose_is_not_kept(tmp_path: Path, charges: list[Charge]) -> None:
    path = written(tmp_path / "ledger.jsonl", *charges)
    loaded(path)
    assert not kept_beside(path).exists()


def test_units_and_relations_that_differ_are_kept_under_each_relation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "ledger.jsonl", of(MECHANISMS[0], unit="person"))
    first = loaded(path).spent(DELTA)
    count = Count(monkeypatch)
    assert loaded(path).spent(DELTA) == first
    assert count.taken(RECORD_INTERVAL) == {}
    assert first.epsilon_person == pytest.approx(pld_epsilon((0.01, 2.0, 20), delta=DELTA))
    replaced = pld_epsilon((0.01, 2.0, 20), delta=DELTA, relation="replace-one")
    assert first.epsilon_record == pytest.approx(replaced)
