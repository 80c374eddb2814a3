"""Statement: what a site claims is read off its ledger, and no epsilon stands alone."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from intramural.privacy.accountant import ACCOUNTANT, Event, epsilon_pld
from intramural.privacy.charges import Charge
from intramural.privacy.ledger import Ledger
from intramural.privacy.statement import statement_markdown, statement_of
from tests.privacy.ledgers import charge, clock

DELTA = 1e-5
FIRST, SECOND = "sha256:" + "1" * 64, "sha256:" + "2" * 64
PERSON: dict[str, Any] = {"unit": "person", "records_per_person": 4}


def written(folder: Path, *charges: Charge) -> Ledger:
    """Return the ledger of data set 'notes', read anew from disk, with these charges."""
    path = folder / "ledger.jsonl"
    ledger = Ledger(path, site="st-elsewhere", data="notes", now=clock())
    for one in charges:
        ledger.charge(one, epsilon_lifetime=None, delta=DELTA)
    return Ledger(path, site="st-elsewhere", data="notes", now=clock())


@cache
def alone(steps: int, noise: float = 1.0) -> float:
    """Return dp-accounting's epsilon of so many of the builder's steps."""
    one = Event(sample_rate=0.01, noise_multiplier=noise, steps=steps)
    return epsilon_pld([one], delta=DELTA, relation="add-remove")


def test_the_terms_are_those_that_were_charged(tmp_path: Path) -> None:
    ledger = written(tmp_path, charge(steps=20), charge(steps=30, round=2))
    told = statement_of(ledger, delta=DELTA, run="one")
    assert told["epsilon"] == pytest.approx(alone(50), rel=1e-6)
    assert told["epsilon_of_this_run"] == told["epsilon"]
    expected = {
        "site": "st-elsewhere",
        "data": "notes",
        "private": True,
        "delta": DELTA,
        "unit": "record",
        "relation": "add-remove",
        "sampler": "poisson",
        "sample_rate": 0.01,
        "clip_norm": 1.0,
        "noise_multiplier": 1.0,
        "steps": 50,
        "charges": 2,
        "runs": 1,
        "random": "aes-256-ctr",
        "engine": "bookkeeping",
        "accountant": ACCOUNTANT,
        "ledger_head": ledger.head,
        "records_per_person": None,
    }
    assert {key: told[key] for key in expected} == expected
    assert "one record added or removed" in told["claim"]


def test_an_aborted_round_and_its_retry_are_both_told(tmp_path: Path) -> None:
    ledger = written(tmp_path, charge(), charge(attempt=2))
    ledger.settle(1, outcome="failed")
    told = statement_of(ledger, delta=DELTA, run="one")
    assert told["steps"] == 40
    assert told["epsilon"] == pytest.approx(alone(40), rel=1e-6)


def test_two_runs_compose_to_less_than_their_sum(tmp_path: Path) -> None:
    ledger = written(tmp_path, charge(steps=100), charge(steps=100, run_id="two"))
    told = statement_of(ledger, delta=DELTA, run="two")
    assert told["epsilon_of_this_run"] == pytest.approx(alone(100), rel=1e-6)
    assert told["epsilon"] == pytest.approx(alone(200), rel=1e-6)
    assert alone(100) < told["epsilon"] < 2 * alone(100)
    assert told["runs"] == 2


def test_terms_that_differ_between_charges_are_all_told(tmp_path: Path) -> None:
    other = charge(round=2, noise_multiplier=2.0, clip_norm=0.5, engine="opacus")
    told = statement_of(written(tmp_path, charge(), other), delta=DELTA)
    assert told["noise_multiplier"] == [1.0, 2.0]
    assert told["clip_norm"] == [0.5, 1.0]
    assert told["engine"] == ["bookkeeping", "opacus"]
    assert told["epsilon_of_this_run"] is None  # no run is told apart


@pytest.mark.parametrize("seeded_first", [True, False])
def test_one_seeded_charge_takes_the_claim_and_every_epsilon(
    tmp_path: Path, seeded_first: bool
) -> None:
    seeded = charge(is_private=False, random="aes-256-ctr from a seed: NOT PRIVATE", round=2)
    charges = [charge(), seeded]
    ledger = written(tmp_path, *(reversed(charges) if seeded_first else charges))
    told = statement_of(ledger, delta=DELTA, run="one")
    assert (told["private"], told["epsilon"], told["epsilon_of_this_run"]) == (False, None, None)
    assert told["claim"] == "none: seeded randomness"
    text = statement_markdown({"st-elsewhere": told})
    assert "NOT PRIVATE" in text
    assert "epsilon:" not in text


def test_persons_are_told_with_their_bound_and_mixed_units_claim_records_only(
    tmp_path: Path,
) -> None:
    told = statement_of(written(tmp_path / "a", charge(**PERSON)), delta=DELTA)
    assert (told["unit"], told["records_per_person"]) == ("person", 4)
    mixed = statement_of(written(tmp_path / "b", charge(**PERSON), charge(round=2)), delta=DELTA)
    assert (mixed["unit"], mixed["relation"]) == ("record", "add-remove")
    assert "no claim for persons" in mixed["claim"]


def test_a_cost_without_bound_claims_nothing_and_can_be_written(tmp_path: Path) -> None:
    told = statement_of(written(tmp_path, charge()), delta=1e-300)
    assert told["epsilon"] is None
    assert told["claim"] == "none: no finite epsilon at delta 1e-300"
    json.dumps(told, allow_nan=False)


def test_steps_are_those_of_training(tmp_path: Path) -> None:
    metrics = charge(purpose="metrics", sample_rate=1.0, steps=1)
    told = statement_of(written(tmp_path, charge(steps=7), metrics), delta=DELTA)
    assert told["steps"] == 7


def test_the_page_for_people_has_every_term_beside_epsilon(tmp_path: Path) -> None:
    told = statement_of(written(tmp_path, charge()), delta=DELTA, run="one")
    text = statement_markdown({"st-elsewhere": told, "county": told | {"epsilon": 0.5}})
    parts = text.split("\n## ")
    assert [part.splitlines()[0] for part in parts[1:]] == ["st-elsewhere", "county"]
    for part in parts[1:]:
        for term in ("epsilon", "delta", "unit", "relation", "sampler", "accountant"):
            assert f"\n- {term}: " in part
        for item in [told["trust"], *told["not_covered"]]:
            assert item in part
    assert "- epsilon: 0.5\n" in parts[2]


@pytest.mark.parametrize(
    ("earlier", "unit", "relation"),
    [
        (charge(run_id="old", relation="replace-one"), "record", "replace-one"),
        (charge(run_id="old", **PERSON), "record", "add-remove"),
    ],
    ids=["another relation", "another unit"],
)
def test_a_runs_own_epsilon_is_for_the_unit_and_relation_told_beside_it(
    tmp_path: Path, earlier: Charge, unit: str, relation: str
) -> None:
    own = charge(steps=2000)
    told = statement_of(written(tmp_path, earlier, own), delta=DELTA, run="one")
    assert (told["unit"], told["relation"]) == (unit, relation)
    # 2000 steps at rate 0.01, noise 1: 2.584 to add or remove a record, 4.193 to replace one, as
    # which a record is composed beside persons
    assert told["epsilon_of_this_run"] == pytest.approx(4.193, abs=2e-3)
