"""What charges cost together: for whom, under which relation, and what is claimed."""

import itertools
from collections.abc import Sequence
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from intramural.privacy.accountant import ACCOUNTANT, Event, Relation, epsilon_pld
from intramural.privacy.charges import Charge, Composition, Spending, Unit
from intramural.privacy.told import told
from tests.privacy.ledgers import charge, step_sum

KINDS: list[tuple[Unit, Relation]] = [
    (unit, relation) for unit in get_args(Unit) for relation in get_args(Relation)
]


def spending(*charges: Charge, real: bool = False) -> Spending:
    spending = Spending() if real else Spending(step_sum)
    for one in charges:
        spending.add(one)
    return spending


def kinds(*named: str) -> list[Charge]:
    """Return a charge of 20 steps for each name, such as 'person add-remove'."""
    return [charge(unit=name.split()[0], relation=name.split()[1]) for name in named]


def test_epsilon_is_that_of_one_long_run_and_not_a_sum() -> None:
    # 2000 steps at rate 0.01, noise 1, delta 1e-5: PLD of dp-accounting 2.584, Opacus' PRV 2.594
    charges = [charge(round=r, steps=250, manifest=f"sha256:{r % 2}") for r in range(1, 9)]
    spent = spending(*charges, real=True).spent(1e-5)
    assert spent.epsilon == pytest.approx(2.584, abs=1e-3)
    assert (spent.charges, spent.runs, spent.unit, spent.relation) == (8, 2, "record", "add-remove")
    assert (spent.sampler, spent.accountant) == ("poisson", ACCOUNTANT)


def test_replace_one_costs_what_dp_accounting_says() -> None:
    # the same steps under replace-one: 4.193
    one = charge(steps=2000, relation="replace-one")
    assert spending(one, real=True).epsilon(1e-5) == pytest.approx(4.193, abs=2e-3)


def test_unlike_charges_are_composed_once_each() -> None:
    train = charge(sample_rate=0.02, noise_multiplier=4.0)
    metrics = charge(purpose="metrics", sample_rate=1.0, noise_multiplier=20.0, steps=1)
    found = spending(train, metrics, train, metrics, train, real=True).epsilon(1e-5)
    own = [
        Event(sample_rate=0.02, noise_multiplier=4.0, steps=60),
        Event(sample_rate=1.0, noise_multiplier=20.0, steps=2),
    ]
    assert found == pytest.approx(epsilon_pld(own, delta=1e-5, relation="add-remove"), rel=1e-6)


@pytest.mark.parametrize(
    ("charges", "unit", "relation", "person", "record"),
    [  # epsilon of 20 steps is 2 under add-remove, 4 under replace-one
        (kinds("record add-remove"), "record", "add-remove", None, 2.0),
        (kinds("record replace-one"), "record", "replace-one", None, 4.0),
        (kinds("record add-remove", "record replace-one"), "record", "replace-one", None, 8.0),
        (kinds("person add-remove"), "person", "add-remove", 2.0, 4.0),
        (kinds("person replace-one"), "person", "replace-one", 4.0, 4.0),
        (kinds("person add-remove", "person replace-one"), "person", "replace-one", 8.0, 8.0),
        (kinds("record add-remove", "person add-remove"), "record", "add-remove", None, 8.0),
    ],
)
def test_units_and_relations_that_differ_are_composed_as_the_table_says(
    charges: list[Charge], unit: str, relation: str, person: float | None, record: float
) -> None:
    spent = spending(*charges).spent(1e-5)
    assert (spent.unit, spent.relation) == (unit, relation)
    assert (spent.epsilon_person, spent.epsilon_record) == (person, record)
    assert spent.epsilon == (record if person is None else person)


def test_one_more_charge_of_any_kind_never_lowers_epsilon() -> None:
    for path in itertools.product(KINDS, repeat=3):
        seen = 0.0
        own = spending()
        for unit, relation in path:
            foreseen = own.epsilon(1e-5, after=[charge(unit=unit, relation=relation)])
            own.add(charge(unit=unit, relation=relation))
            assert own.epsilon(1e-5) == foreseen > seen
            seen = foreseen


def test_what_is_told_decides_nothing_and_a_bound_is_asked_first() -> None:
    asked: list[str] = []

    def saying(name: str, per_step: float) -> Composition:
        def told(events: Sequence[Event], *, delta: float, relation: Relation) -> float:
            asked.append(name)
            return per_step * sum(event.steps for event in events)

        return told

    own = Spending(saying("exact", 0.1), told=saying("told", 0.01), bound=saying("bound", 0.11))
    own.add(charge())
    assert (own.epsilon(1e-5), own.epsilon(1e-5)) == (0.2, 0.2)
    assert asked == ["told"]
    more = [charge(round=2)]  # 4.0 with the first; at most 4.4
    assert own.within(4.4, 1e-5, after=more)
    assert own.within(4.4, 1e-5, after=more)
    assert asked == ["told", "bound"]
    assert own.within(4.0, 1e-5, after=more)
    assert not own.within(3.9, 1e-5, after=more)
    assert own.epsilon(1e-5, after=more) == 4.0
    assert asked == ["told", "bound", "bound", "exact", "bound"]
    own.add(more[0])
    assert own.epsilon(1e-5) == 0.4
    assert not own.within(3.9, 1e-5, after=[charge(round=3)])


def test_replace_one_is_never_cheaper_than_add_remove() -> None:
    """The table rests on it; here for the accountant itself."""
    for rate, noise in ((0.01, 2.0), (0.2, 5.0), (1.0, 9.0)):
        settings: dict[str, Any] = {"sample_rate": rate, "noise_multiplier": noise, "steps": 5}
        one = spending(charge(**settings), real=True).epsilon(1e-5)
        other = spending(charge(**settings, relation="replace-one"), real=True).epsilon(1e-5)
        assert one <= other


def test_the_claim_says_all_that_gives_epsilon_its_meaning() -> None:
    claim = spending(charge()).spent(1e-5).claim
    assert claim == (
        "(2.0000, 1e-05)-differential privacy for one record added or removed; Poisson sampling; "
        f"{ACCOUNTANT}"
    )
    mixed = spending(*kinds("record add-remove", "person replace-one")).spent(1e-5).claim
    assert "one record added or removed" in mixed
    assert "no claim for persons: some charges bound records only" in mixed
    assert "composed as replace-one" in mixed
    both = spending(*kinds("record add-remove", "record replace-one")).spent(1e-5).claim
    assert "one record replaced" in both
    assert "composed as replace-one" in both


def test_persons_bounds_claim_no_replaced_record() -> None:
    """A record put in the place of another person's moves two clipped vectors, by 2C each.

    Under q = 1 and noise 4 that is a shift of 4C against noise 4C: epsilon 4.377 at 1e-5 (Gaussian
    mechanism, Balle and Wang 2018), above what replacing one person costs.
    """
    one = charge(unit="person", relation="replace-one", sample_rate=1.0, noise_multiplier=4.0,
                 steps=1)  # fmt: skip
    spent = spending(one, real=True).spent(1e-5)
    assert spent.epsilon_record < 4.377
    assert spent.record_relation == "add-remove"
    assert spending(one, charge(), real=True).spent(1e-5).relation == "add-remove"


def test_one_seeded_charge_voids_the_claim() -> None:
    spent = spending(charge(), charge(is_private=False), charge()).spent(1e-5)
    assert (spent.is_private, spent.claim) == (False, "none: seeded randomness")
    assert spent.epsilon == 6.0  # what it would be


def test_nothing_charged_is_nothing_spent() -> None:
    spent = spending().spent(1e-5)
    assert (spent.epsilon, spent.claim, spent.epsilon_person) == (0, "nothing was charged", None)


@pytest.mark.parametrize(
    ("epsilon", "text"),
    [
        (1.0, "1.0000"),
        (1.00001, "1.0001"),
        (0.00001, "0.0001"),
        (2.99999, "3.0000"),
        (float("inf"), "inf"),
    ],
)
def test_epsilon_is_told_rounded_up(epsilon: float, text: str) -> None:
    assert told(epsilon) == text


@pytest.mark.parametrize(
    "changes",
    [
        {"sample_rate": 0.0},
        {"sample_rate": 1.1},
        {"sample_rate": float("nan")},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": float("inf")},
        {"steps": 0},
        {"steps": 1.5},
        {"steps": True},
        {"clip_norm": -1.0},
        {"delta": 0.0},
        {"unit": "person", "records_per_person": None},
        {"unit": "record", "records_per_person": 3},
        {"unit": "patient"},
        {"relation": "substitute"},
        {"sampler": "shuffle"},
        {"purpose": "sale"},
        {"more": 1},
    ],
)
def test_a_charge_that_means_nothing_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        charge(**changes)
