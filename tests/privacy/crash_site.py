"""A site's charge, noise and settlement, killed at each named point: a program of its own.

It loads the code once and forks for each point, since loading takes a second.
"""

import json
import os
import signal
import sys
from pathlib import Path

from intramural.core import journal as journal_module
from intramural.core.journal import Journal, utc_now
from intramural.privacy.ledger import Ledger
from intramural.privacy.random import SecureRandom
from tests.privacy.ledgers import charge, opened

POINTS = (
    "before the charge",
    "lock held",
    "journal read",
    "budget checked",
    "charge half written",
    "charge written, not synced",
    "charge synced",
    "charge returned",
    "in the midst of noise",
    "noise drawn",
    "settlement half written",
    "settlement written, not synced",
    "settled",
)


def take_round(path: Path, released: Path, point: str) -> None:
    """Take one round's charge, noise and settlement; die at `point`."""

    def at(here: str) -> None:
        if here == point:
            os.kill(os.getpid(), signal.SIGKILL)

    ledger = opened(path, now=utc_now, lock_wait_s=5.0)
    phase = ["charge"]
    instrument(at, phase)
    at("before the charge")
    place = ledger.charge(charge(), epsilon_lifetime=100.0, delta=1e-5)
    at("charge returned")
    with open(released, "ab", buffering=0) as file:  # the truth: noise is about to be drawn
        file.write(b"*")
        os.fsync(file.fileno())
    random = SecureRandom.secret()
    random.normal(100, std=1.0)
    at("in the midst of noise")
    random.normal(100, std=1.0)
    at("noise drawn")
    phase[0] = "settlement"
    ledger.settle(place, outcome="done")
    at("settled")


def instrument(at: object, phase: list[str]) -> None:
    """Let the code pass the points inside a charge and a settlement."""
    assert callable(at)
    read, check, sync = Ledger._catch_up, Ledger._check_budget, os.fsync
    locked = Ledger._locked

    def locked_then(self: Ledger) -> object:
        return _After(locked(self), lambda: at("lock held"))

    def read_then(self: Ledger, journal: Journal) -> None:
        read(self, journal)
        at("journal read")

    def check_then(*words: object) -> None:
        check(*words)  # type: ignore[arg-type]
        at("budget checked")

    def write_in_halves(self: Journal, line: bytes) -> None:
        half = len(line) // 2
        self._file.write(line[:half])
        at(f"{phase[0]} half written")
        self._file.write(line[half:])
        at(f"{phase[0]} written, not synced")
        sync(self._file.fileno())
        at(f"{phase[0]} synced")

    Ledger._locked = locked_then  # type: ignore[method-assign, assignment]
    Ledger._catch_up = read_then  # type: ignore[method-assign]
    Ledger._check_budget = check_then  # type: ignore[assignment]
    journal_module.Journal._write = write_in_halves  # type: ignore[method-assign]


class _After:
    """A context that calls something once it is entered."""

    def __init__(self, inner: object, then: object) -> None:
        self.inner, self.then = inner, then

    def __enter__(self) -> object:
        entered: object = self.inner.__enter__()  # type: ignore[attr-defined]
        self.then()  # type: ignore[operator]
        return entered

    def __exit__(self, *words: object) -> object:
        return self.inner.__exit__(*words)  # type: ignore[attr-defined]


def ended(folder: Path, point: str) -> int:
    """Take a round in a process of its own; return how it ended, as `subprocess` does."""
    child = os.fork()
    if child == 0:
        take_round(folder / "ledger.jsonl", folder / "released", point)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    places: dict[str, str] = json.loads(sys.argv[1])
    print(json.dumps({point: ended(Path(place), point) for point, place in places.items()}))
