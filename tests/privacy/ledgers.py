"""Charges and ledgers for tests."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from intramural.privacy.accountant import Event, Relation
from intramural.privacy.charges import Charge
from intramural.privacy.ledger import Ledger

START = datetime(2026, 11, 22, 9, 0, tzinfo=UTC)


def charge(**changes: Any) -> Charge:
    """Return a charge of 20 steps on records; fields named are changed."""
    fields: dict[str, Any] = {
        "run": "icd-chapters",
        "run_id": "one",
        "manifest": "sha256:" + "1" * 64,
        "round": 1,
        "attempt": 1,
        "purpose": "train",
        "sample_rate": 0.01,
        "noise_multiplier": 1.0,
        "steps": 20,
        "clip_norm": 1.0,
        "unit": "record",
        "relation": "add-remove",
        "delta": 1e-5,
        "sampler": "poisson",
        "random": "aes-256-ctr",
        "is_private": True,
        "engine": "bookkeeping",
        "accountant": "PLD, dp-accounting 0.6.0",
        "version": "0.1.0",
    }
    if changes.get("unit") == "person":
        fields["records_per_person"] = 4
    return Charge(**fields | changes)


def step_sum(events: Sequence[Event], *, delta: float, relation: Relation) -> float:
    """Stand in for an accountant where its figure does not matter: epsilon is steps / 10.

    Under replace-one it is twice that.
    """
    return (0.1 if relation == "add-remove" else 0.2) * sum(event.steps for event in events)


def clock(*, start: datetime = START, step_s: float = 60.0) -> Callable[[], datetime]:
    """Return a clock that goes on by `step_s` each time it is read."""
    ticks = iter(range(10**9))
    return lambda: start + timedelta(seconds=step_s * next(ticks))


def opened(path: Path, **changes: Any) -> Ledger:
    """Open the ledger of data set 'notes' at site 'st-elsewhere', with the quick accountant."""
    settings: dict[str, Any] = {
        "site": "st-elsewhere",
        "data": "notes",
        "now": clock(),
        "composition": step_sum,
        "lock_wait_s": 0.0,
    }
    return Ledger(path, **settings | changes)
