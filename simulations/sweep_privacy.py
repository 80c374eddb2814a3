"""What tuning costs in privacy: every cell of a sweep was trained on the same records."""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from intramural.core.site import load_site
from intramural.privacy.accountant import (
    RECORD_INTERVAL,
    SCREEN_INTERVAL,
    Relation,
    answered_by,
    epsilon_pld,
)
from intramural.privacy.book import read_book
from intramural.privacy.charges import (
    Charge,
    Steps,
    composed_as,
    events_of,
    relation_of,
    steps_of,
    unit_of,
)
from intramural.privacy.told import told

MECHANISMS_EXACT_MAX = 8
"""So many different mechanisms are composed in narrow bins; more in wide ones, never lower."""


def tuning_cost(folders: Mapping[str, Path], *, best: str | None) -> dict[str, Any] | None:
    """Return what the cells have spent, each and together; None: no cell charged anything.

    A cell's cost is that of its dearest site: for each mechanism the most steps that any of its
    sites charged, retries and failed cells included. So it does not matter how records were dealt:
    no record is at two sites of one cell, and wherever it was, it paid no more.

    Args:
        folders: Of every cell, by name, finished or not.
        best: Name of the cell that won; None: none did.

    Guarantees:
        `epsilon` is that of all cells together, at `delta`, for one `unit` under `relation`: it
        covers whatever is made of the cells' updates, a choice among them too. It does not cover a
        choice by metrics that were measured without noise; nor a person whose records lie at two
        sites of one cell. A seeded charge makes it None, and nothing is claimed.
    """
    charges = {name: _charges(folder) for name, folder in folders.items()}
    every = [c for sites in charges.values() for site in sites for c in site]
    if not every:
        return None
    unit, delta = unit_of(every), min(charge.delta for charge in every)
    relation = composed_as(every, unit)
    private = all(charge.is_private for charge in every)
    steps = {name: _dearest(sites) for name, sites in charges.items()}
    together = sum(steps.values(), Steps())
    epsilons = {
        name: _epsilon(own, delta, relation) if private and own else None
        for name, own in steps.items()
    }
    found: dict[str, Any] = {
        "epsilon": _epsilon(together, delta, relation) if private else None,
        "delta": delta,
        "unit": unit,
        "relation": relation_of(every, unit),
        "sampler": "poisson",
        "accountant": answered_by(events_of(together), delta=delta),
        "private": private,
        "cells": epsilons,
        "charged": sum(own != Steps() for own in steps.values()),
    }
    return found | {"words": _words(found, best)}


def _charges(folder: Path) -> list[Sequence[Charge]]:
    """Return each site's charges in a cell, from the sites' own ledgers."""
    found: list[Sequence[Charge]] = []
    for file in sorted((folder / "sites").glob("*/site.toml")):
        ledger = load_site(file).ledger_file
        if ledger.is_file():
            found.append(list(read_book(ledger).charges.values()))
    return found


def _dearest(sites: Sequence[Sequence[Charge]]) -> Steps:
    """Return for each mechanism the most steps that a site charged."""
    most = Steps()
    for charges in sites:
        most |= steps_of(charges)  # the larger count of each
    return most


def _epsilon(steps: Steps, delta: float, relation: Relation) -> float | None:
    interval = RECORD_INTERVAL if len(steps) <= MECHANISMS_EXACT_MAX else SCREEN_INTERVAL
    found = epsilon_pld(events_of(steps), delta=delta, relation=relation, interval=interval)
    return found if isfinite(found) else None


def _words(found: Mapping[str, Any], best: str | None) -> str:
    """Return what tuning spent, in sentences that a reader cannot take for the winner's cost."""
    if not found["private"]:
        return "NOT PRIVATE: sampling and noise came from a test's seed."
    if found["epsilon"] is None:
        return "The cells together have no finite epsilon: nothing is claimed."
    terms = (
        f"at delta {found['delta']:g}, one {found['unit']}, {found['relation']}, "
        f"{found['sampler']} sampling; {found['accountant']}"
    )
    count = found["charged"]
    cells = "1 cell was" if count == 1 else f"{count} cells were"
    words = [
        f"{cells} trained on the same records, so their costs add up: epsilon "
        f"{told(found['epsilon'])} together ({terms})."
    ]
    own = found["cells"].get(best) if best is not None else None
    if own is not None and count > 1:
        words.append(
            f"Cell {best} alone is epsilon {told(own)}; that is not what was spent, for it was "
            "chosen by looking at the others."
        )
    words.append(
        "Tune on public records of the same kind, then run once on the private ones: that spends "
        "one cell's epsilon."
    )
    return " ".join(words)
