"""How long does a site's privacy ledger of a thousand rounds take to load, and to answer?

Each measurement is a process of its own, so that nothing is composed beforehand; loading Python's
packages is outside. Times are processor time, which neighbours on the machine disturb less.
`no file`: nothing was kept beside the ledger by an earlier load.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import Row, machine_facts, publish
from intramural.core.journal import Journal
from intramural.privacy.book import body_of
from intramural.privacy.charges import Charge
from intramural.privacy.kept import kept_beside
from intramural.privacy.ledger import Ledger

DELTA = 1e-5
STEPS = 20
ANSWER_MS_MAX = 50.0
TURNS = 5
MECHANISMS = [(0.01, 1.0), (0.02, 1.2), (1.0, 60.0), (0.005, 0.8), (0.03, 1.5)]
"""Sample rates and noise multipliers; the third is an evaluation's. Together they cost epsilon 11:
more than a site would spend, and so more bins than it would have."""
NEW = (0.004, 0.9)
FILE = "ledger-notes.jsonl"


def charge_of(mechanism: tuple[float, float], round_: int) -> Charge:
    """Return a round's charge of one mechanism."""
    rate, noise = mechanism
    return Charge(
        run="benchmark",
        manifest="sha256:" + "1" * 64,
        round=round_,
        attempt=1,
        purpose="train" if rate < 1 else "metrics",
        sample_rate=rate,
        noise_multiplier=noise,
        steps=STEPS if rate < 1 else 1,
        clip_norm=1.0,
        unit="record",
        relation="add-remove",
        delta=DELTA,
        sampler="poisson",
        random="aes-256-ctr",
        is_private=True,
        engine="bookkeeping",
        accountant="PLD",
        version="0.1.0",
    )


def opened(path: Path) -> Ledger:
    """Open the benchmark's ledger."""
    return Ledger(path, site="st-elsewhere", data="notes")


def write_rounds(path: Path, mechanisms: list[tuple[float, float]], *, rounds: int) -> None:
    """Write so many rounds, charged and settled, to a ledger that is begun if there is none."""
    opened(path)
    journal = Journal(path)
    for round_ in range(1, rounds + 1):
        charge = charge_of(mechanisms[round_ % len(mechanisms)], round_)
        entry = journal.append("charged", **body_of(charge))
        journal.append("settled", charge=entry.seq, outcome="done")
    journal.close()


def measured(path: Path) -> dict[str, float]:
    """Return how long loading, answering, foreseeing and charging take in this process, in ms."""
    found: dict[str, float] = {}

    def timed(what: str, work: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = work()
        found[what] = 1000 * (time.process_time() - began)
        return result

    ledger: Ledger = timed("load", lambda: opened(path))
    timed("answer", lambda: ledger.epsilon(DELTA))
    timed("answer, other delta", lambda: ledger.epsilon(DELTA / 10))
    rounds = [charge_of(MECHANISMS[0], round_) for round_ in range(1, 21)]
    limits: dict[str, float] = {"epsilon_lifetime": 1000.0, "delta": DELTA}
    timed("foresee 20 rounds", lambda: ledger.foresee(rounds, **limits))
    for one in rounds[:2]:  # the first may have to build the mechanism's step; the second tells
        timed("charge", partial(ledger.charge, one, **limits))
        timed("answer, a charge more", lambda: ledger.epsilon(DELTA))
    return found


def in_a_process(path: Path) -> dict[str, float]:
    """Return `measured` of a fresh process."""
    words = [sys.executable, "-m", "benchmarks.ledger", "--measure", str(path)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def rows_of(mechanisms: list[tuple[float, float]], folder: Path, *, rounds: int) -> list[Row]:
    """Return the rows of a ledger of these mechanisms."""
    path = folder / FILE
    write_rounds(path, mechanisms, rounds=rounds)
    kinds = {
        "no file": (None, 0),
        "kept": (mechanisms, 0),
        "kept, a round more since": ([mechanisms[0]], 1),
        "kept, a new mechanism since": ([NEW], 20),
    }
    rows: list[Row] = []
    whole, kept = path.read_bytes(), b""
    for kind, (more, count) in kinds.items():
        path.write_bytes(whole)
        if more is not None and count:
            write_rounds(path, more, rounds=count)
        grown = path.read_bytes()
        times: list[dict[str, Any]] = []
        for _ in range(TURNS):
            path.write_bytes(grown)
            kept_beside(path).unlink(missing_ok=True)
            if more is not None:
                kept_beside(path).write_bytes(kept)
            times.append(in_a_process(path))
        kept = kept or kept_beside(path).read_bytes()
        name = f"{len(mechanisms)} mechanism(s), {kind}"
        rows += [_row(f"{name}: {what}", [one[what] for one in times]) for what in times[0]]
    size = len(kept) / 1e6
    return [*rows, Row(name=f"{len(mechanisms)} mechanism(s): file", value=size, unit="MB")]


def _row(name: str, samples: list[float]) -> Row:
    value, limited = median(samples), name.endswith((": answer", "other delta"))
    return Row(
        name=name,
        value=value,
        unit="ms",
        target=f"< {ANSWER_MS_MAX:g}" if limited else "",
        ok=value < ANSWER_MS_MAX if limited else None,
        samples=samples,
    )


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.ledger", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(options.measure)))
        return
    machine, rows = machine_facts(), []
    for mechanisms in (MECHANISMS[:1], MECHANISMS):
        folder = Path(tempfile.mkdtemp())
        rows += rows_of(mechanisms, folder, rounds=options.rounds)
        shutil.rmtree(folder)
    title = f"A ledger of {options.rounds:,} rounds, PLD in bins of 1e-4"
    publish(title, rows, machine=machine, path=options.json)


if __name__ == "__main__":
    main()
