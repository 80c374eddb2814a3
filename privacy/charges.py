"""Charges: what was taken from a data set's privacy, and what they cost together."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Annotated, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

from intramural.privacy.accountant import (
    Event,
    Mechanism,
    Relation,
    answered_by,
    epsilon_pld,
)
from intramural.privacy.told import told

Unit = Literal["record", "person"]
Purpose = Literal["train", "metrics"]
"""What a charge releases: a trained update, or evaluation counts."""
Steps = Counter[Mechanism]
"""Steps of each mechanism."""

Whole = Annotated[int, Field(ge=1)]
Above0 = Annotated[float, Field(gt=0)]


class Charge(BaseModel):
    """One debit: steps that a site is about to take on a data set. A ledger's line holds it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    run: str
    """The federation's name."""
    run_id: str = ""
    """Tells the run from others of the same manifest."""
    manifest: str
    """Digest of the federation's canonical form."""
    round: Whole
    attempt: Whole
    """1 for a round's first charge, 2 for the next, after a crash or a lost reply."""
    purpose: Purpose
    sample_rate: Annotated[float, Field(gt=0, le=1)]
    """Probability with which a step draws each unit; 1: every unit is always used."""
    noise_multiplier: Above0
    """Noise's standard deviation / clip_norm."""
    steps: Whole
    """Steps about to be taken; charged in full even if fewer are."""
    clip_norm: Above0
    """L2 bound of what one unit adds to a step's sum."""
    unit: Unit
    relation: Relation
    """Neighbouring relation of the claim that the charge was planned for."""
    records_per_person: Whole | None = None
    """unit = 'person': most records of a person that are used."""
    delta: Annotated[float, Field(gt=0, lt=1)]
    """The federation's delta; the data set's lifetime epsilon is read at the site's own."""
    sampler: Literal["poisson"]
    random: str
    """Kind of generator, as `SecureRandom.kind`."""
    is_private: bool
    """False: sampling and noise came from a test's seed, and nothing is claimed."""
    engine: str
    accountant: str
    """The accountant the plan was made with; epsilon is recomputed, not read from here."""
    version: str
    """Of this package."""

    @model_validator(mode="after")
    def _has_a_bound_if_of_persons(self) -> "Charge":
        if (self.unit == "person") != (self.records_per_person is not None):
            raise ValueError("unit = 'person' and records_per_person go together")
        return self


class Composition(Protocol):
    """What tells the cost of events together, as `epsilon_pld` does."""

    def __call__(self, events: Sequence[Event], *, delta: float, relation: Relation) -> float:
        """Return epsilon at `delta`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What so many steps of each mechanism were found to cost."""

    steps: Steps
    epsilon: float
    is_exact: bool
    """False: at most that."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a data set's charges cost together, with all that gives the number its meaning."""

    charges: int
    runs: int
    """Different runs charged."""
    epsilon: float
    """Of `unit` under `relation`, at `delta`; rests on a seed where `is_private` is False."""
    delta: float
    unit: Unit
    """Whom the claim is about: 'person' only if every charge bounded persons."""
    relation: Relation
    """What neighbouring data sets differ in; 'replace-one' where charges differ in it."""
    sampler: str
    accountant: str
    epsilon_record: float
    """Epsilon of one record."""
    record_relation: Relation
    epsilon_person: float | None
    """Epsilon of one person; None: some charge bounded records only, and nothing is claimed."""
    is_private: bool
    claim: str
    """One sentence, or why there is none."""


class Spending:
    """All charges of one data set, composed.

    Units and relations may differ between charges; the rule is the simplest that is sound:

    | charges                   | a person           | a record                            |
    |---------------------------|--------------------|-------------------------------------|
    | all record, one relation  | no claim           | that relation                       |
    | all record, relations mix | no claim           | replace-one                         |
    | all person, one relation  | that relation      | add-remove, composed as replace-one |
    | all person, relations mix | replace-one        | add-remove, composed as replace-one |
    | units mix                 | no claim           | add-remove, composed as replace-one |

    A record that comes or goes changes its person's clipped vector but does not remove it: for a
    person's mechanism that is a replacement, and no more is claimed, for a record put in the place
    of another person's changes two persons. And replace-one covers add-remove, since a replaced
    unit's vector may be zero. So adding a charge of any kind never lowers the epsilon told.

    Guarantees:
        `epsilon` is that of every charge together, for the `unit` and `relation` told with it.
        Void for charges whose steps were not taken as they say, see `epsilon_pld`.
    """

    def __init__(
        self,
        composition: Composition = epsilon_pld,
        *,
        told: Composition | None = None,
        bound: Composition | None = None,
    ) -> None:
        """Start with nothing spent.

        Args:
            composition: What charges that are not yet spent would cost, to decide by.
            told: What was spent, to be told; None: the same. What is told decides nothing.
            bound: Quicker than `composition` and never lower; asked before it. None: there is none.
        """
        self._composition = composition
        self._teller = composition if told is None else told
        self._bound = bound
        self._charges: list[Charge] = []
        self._answers: dict[tuple[Relation, float], Answer] = {}
        self._foreseen: dict[tuple[Relation, float], Answer] = {}

    @property
    def charges(self) -> tuple[Charge, ...]:
        """Every charge, in order."""
        return tuple(self._charges)

    def add(self, charge: Charge) -> None:
        """Count a charge as spent."""
        self._charges.append(charge)

    def epsilon(self, delta: float, *, after: Sequence[Charge] = ()) -> float:
        """Return epsilon at `delta` of all charges, and of `after` on top of them.

        It is that of a person if every charge bounded persons, else that of a record.
        """
        charges = [*self._charges, *after]
        if not charges:
            return 0.0
        return self._decided(charges, delta) if after else self._told(unit_of(charges), delta)

    def within(self, limit: float, delta: float, *, after: Sequence[Charge]) -> bool:
        """Return whether `epsilon` is at most `limit`; at once if more was found to be.

        A run is foreseen whole when it is admitted, so its rounds cost no new composition.
        """
        charges = [*self._charges, *after]
        relation, steps = composed_as(charges, unit_of(charges)), steps_of(charges)
        foreseen = self._foreseen.get((relation, delta))
        if foreseen is not None and foreseen.epsilon <= limit and steps <= foreseen.steps:
            return True
        if self._bound is not None:
            most = self._bound(events_of(steps), delta=delta, relation=relation)
            if most <= limit:
                self._foreseen[relation, delta] = Answer(steps=steps, epsilon=most, is_exact=False)
                return True
        return self._decided(charges, delta) <= limit  # a NaN is not

    def spent(self, delta: float) -> Spent:
        """Return what was spent, with what it means."""
        charges = self._charges
        unit = unit_of(charges)
        epsilon = self.epsilon(delta)
        is_private = all(charge.is_private for charge in charges)
        return Spent(
            charges=len(charges),
            runs=len({(charge.manifest, charge.run_id) for charge in charges}),
            epsilon=epsilon,
            delta=delta,
            unit=unit,
            relation=relation_of(charges, unit),
            sampler="poisson",
            accountant=answered_by(events_of(steps_of(charges)), delta=delta),
            epsilon_record=self._told("record", delta),
            record_relation=relation_of(charges, "record"),
            epsilon_person=epsilon if unit == "person" else None,
            is_private=is_private,
            claim=claim_of(charges, epsilon, delta),
        )

    def _decided(self, charges: Sequence[Charge], delta: float) -> float:
        """Return what charges would cost, by what decides."""
        relation, steps = composed_as(charges, unit_of(charges)), steps_of(charges)
        known = self._foreseen.get((relation, delta))
        if known is None or not known.is_exact or known.steps != steps:
            epsilon = self._composition(events_of(steps), delta=delta, relation=relation)
            known = Answer(steps=steps, epsilon=epsilon, is_exact=True)
            self._foreseen[relation, delta] = known
        return known.epsilon

    def _told(self, unit: Unit, delta: float) -> float:
        """Return what was spent, for a unit."""
        relation, steps = composed_as(self._charges, unit), steps_of(self._charges)
        known = self._answers.get((relation, delta))
        if known is None or known.steps != steps:
            epsilon = self._teller(events_of(steps), delta=delta, relation=relation)
            known = Answer(steps=steps, epsilon=epsilon, is_exact=True)
            self._answers[relation, delta] = known
        return known.epsilon


def steps_of(charges: Sequence[Charge]) -> Steps:
    """Return the steps of each mechanism that charges paid for; a composition needs no more."""
    steps: Steps = Counter()
    for charge in charges:
        steps[charge.sample_rate, charge.noise_multiplier] += charge.steps
    return steps


def events_of(steps: Steps) -> list[Event]:
    """Return an event for each mechanism."""
    return [
        Event(sample_rate=rate, noise_multiplier=noise, steps=count)
        for (rate, noise), count in steps.items()
    ]


def unit_of(charges: Sequence[Charge]) -> Unit:
    """Return whom a claim about all the charges can be about."""
    return "person" if charges and all(c.unit == "person" for c in charges) else "record"


def relation_of(charges: Sequence[Charge], unit: Unit) -> Relation:
    """Return the relation under which the epsilon of a unit is told; see `Spending`."""
    if unit == "record" and any(charge.unit == "person" for charge in charges):
        return "add-remove"
    return composed_as(charges, unit)


def relations_of(charges: Sequence[Charge]) -> list[Relation]:
    """Return the relations under which `Spending.spent` composes all the charges."""
    return sorted({composed_as(charges, unit_of(charges)), composed_as(charges, "record")})


def composed_as(charges: Sequence[Charge], unit: Unit) -> Relation:
    """Return the relation under which all the charges are composed for a unit."""
    kinds = {(charge.unit, charge.relation) for charge in charges}
    if len(kinds) == 1:
        ((charged, relation),) = kinds
        if charged == unit:
            return relation
    return "replace-one" if kinds else "add-remove"


def claim_of(charges: Sequence[Charge], epsilon: float, delta: float) -> str:
    """Return what the charges let a site claim, in one sentence."""
    if not charges:
        return "nothing was charged"
    if not all(charge.is_private for charge in charges):
        return "none: seeded randomness"
    if not isfinite(epsilon):
        return f"none: no finite epsilon at delta {delta:g}"
    unit = unit_of(charges)
    relation = relation_of(charges, unit)
    change = "added or removed" if relation == "add-remove" else "replaced"
    claim = (
        f"({told(epsilon)}, {delta:g})-differential privacy for one {unit} {change}; "
        f"Poisson sampling; {answered_by(events_of(steps_of(charges)), delta=delta)}"
    )
    if len({charge.unit for charge in charges}) > 1:
        claim += "; no claim for persons: some charges bound records only"
    if composed_as(charges, unit) != relation or len({c.relation for c in charges}) > 1:
        claim += "; composed as replace-one"
    return claim
