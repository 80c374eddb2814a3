"""kill -9 at any point of charge, noise and settlement never under-counts epsilon."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from intramural.core.journal import utc_now
from intramural.privacy.book import read_book
from tests.privacy.crash_site import POINTS
from tests.privacy.ledgers import charge, opened

DELTA = 1e-5
ROOT = Path(__file__).parents[2]
EACH = 2.0
"""Epsilon of a charge of `ledgers.charge`, by the quick accountant."""


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int]]:
    """Kill a site at every point, each time with a ledger that holds a charge already."""
    base = tmp_path_factory.mktemp("crash")
    folders = {point: base / str(number) for number, point in enumerate((*POINTS, "never"))}
    for folder in folders.values():
        ledger = opened(folder / "ledger.jsonl", now=utc_now)
        ledger.charge(charge(), epsilon_lifetime=None, delta=DELTA)
    words = [sys.executable, "-m", "tests.privacy.crash_site"]
    places = json.dumps({point: str(folder) for point, folder in folders.items()})
    done = subprocess.run([*words, places], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    codes: dict[str, int] = json.loads(done.stdout)
    return {point: (folders[point], code) for point, code in codes.items()}


@pytest.mark.parametrize("point", POINTS)
def test_epsilon_is_at_least_the_truth_wherever_a_site_is_killed(
    ends: dict[str, tuple[Path, int]], point: str
) -> None:
    folder, code = ends[point]
    assert code == -signal.SIGKILL, "the point was passed"
    path, released = folder / "ledger.jsonl", folder / "released"
    noised = len(released.read_bytes()) if released.exists() else 0
    truth = EACH * (1 + noised)
    ledger = opened(path, now=utc_now)
    spent = ledger.epsilon(DELTA)
    assert truth <= spent <= EACH * 2
    returned = POINTS.index(point) >= POINTS.index("charge returned")
    assert not returned or spent == EACH * 2
    # nobody holds the lock, the torn record is gone, and the round is taken again at its price
    ledger.settle(ledger.charge(charge(), epsilon_lifetime=None, delta=DELTA), outcome="done")
    assert read_book(path).head == ledger.head
    assert opened(path, now=utc_now).epsilon(DELTA) == spent + EACH


def test_a_site_that_is_not_killed_settles(ends: dict[str, tuple[Path, int]]) -> None:
    folder, code = ends["never"]
    book = read_book(folder / "ledger.jsonl")
    assert (code, len(book.charges), book.outcomes) == (0, 2, {2: "done"})
    assert (folder / "released").read_bytes() == b"*"
    assert len(POINTS) >= 12
