"""Statement: what a site can claim of its privacy, read off its ledger and nothing else."""

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

from intramural.privacy.accountant import epsilon_pld
from intramural.privacy.charges import Charge, composed_as, events_of, steps_of, unit_of
from intramural.privacy.ledger import Ledger

TRUST = (
    "The site samples, clips and adds noise itself: the claim holds against the coordinator, the "
    "other sites and whoever sees the model, however they join forces. The site's own machine, "
    "package and staff are trusted."
)
NOT_COVERED = (
    "what the site releases elsewhere, or learnt from these records before",
    "that the site takes part, and when: a reply's time of arrival is not hidden",
    "records of one person held by two sites: add the two sites' epsilons",
    "attacks on floating-point noise (Mironov 2012): the noise is float32, not discrete",
)


def statement_of(ledger: Ledger, *, delta: float, run: str | None = None) -> dict[str, Any]:
    """Return a site's privacy statement as a JSON value.

    Args:
        ledger: With at least one charge.
        delta: At which epsilon is told.
        run: Identity of the run to tell apart from the runs before it; None: no run is.

    Guarantees:
        `epsilon` composes every charge of the data set: all runs, aborted rounds and retries
        included. It is told with unit, delta, relation, sampler and accountant, or not at all: a
        seeded charge makes it None.
    """
    charges, spent = ledger.charges, ledger.spent(delta)
    assert charges, "nothing was charged, so there is nothing to state"
    own = [charge for charge in charges if charge.run_id == run]
    private = spent.is_private
    of_run = _number(_epsilon_of(own, charges, delta)) if private and own else None
    return {
        "site": ledger.site,
        "data": ledger.data,
        "claim": spent.claim,
        "private": private,
        "epsilon": _number(spent.epsilon) if private else None,
        "epsilon_of_this_run": of_run,
        "delta": delta,
        "unit": spent.unit,
        "records_per_person": _told(charges, "records_per_person"),
        "relation": spent.relation,
        "sampler": spent.sampler,
        "sample_rate": _told(charges, "sample_rate"),
        "clip_norm": _told(charges, "clip_norm"),
        "noise_multiplier": _told(charges, "noise_multiplier"),
        "steps": sum(charge.steps for charge in charges if charge.purpose == "train"),
        "charges": spent.charges,
        "runs": spent.runs,
        "random": _told(charges, "random"),
        "engine": _told(charges, "engine"),
        "accountant": spent.accountant,
        "ledger_head": ledger.head,
        "trust": TRUST,
        "not_covered": list(NOT_COVERED),
    }


def _epsilon_of(own: Sequence[Charge], every: Sequence[Charge], delta: float) -> float:
    """Return the epsilon of some charges, for the unit and relation that all are told for."""
    relation = composed_as(every, unit_of(every))
    return epsilon_pld(events_of(steps_of(own)), delta=delta, relation=relation)


def _number(epsilon: float) -> float | None:
    return epsilon if isfinite(epsilon) else None


def _told(charges: Iterable[Charge], name: str) -> Any:
    """Return a field's value, or all its values where charges differ."""
    values = {getattr(charge, name) for charge in charges}
    return values.pop() if len(values) == 1 else sorted(values, key=str)


def statement_markdown(statements: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the statements of all sites for people: a paragraph and a list each."""
    lines = ["# Privacy statement", ""]
    for site, told in statements.items():
        lines += [f"## {site}", "", f"**{told['claim']}**", ""]
        skipped = {"claim", "trust", "not_covered", "site", "private"}
        lines += [f"- {k}: {v}" for k, v in told.items() if k not in skipped and v is not None]
        lines += ["", told["trust"], "", "Not covered:", ""]
        lines += [f"- {item}" for item in told["not_covered"]] + [""]
    return "\n".join(lines)
