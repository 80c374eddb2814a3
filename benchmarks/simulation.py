"""What does a simulator add to the loop a researcher would write by hand, in time and in memory?

Each engine, Flower on Ray and pfl train the workloads of `simulation_work`, every process with one
thread. An engine's rounds take turns with the loop by hand in one process; another simulator has
runs of that loop before and after its own. The first round of each run is not counted.

    python -m benchmarks.simulation --json benchmarks/results/simulation.json
    python -m benchmarks.simulation --only w1 --rounds 3
"""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.harness import Row, machine_facts, publish
from benchmarks.peers.workload import HANDED
from benchmarks.simulation_memory import CellFailed, Outcome, run_cell

ROUNDS = {"w1": 21, "w2": 6, "w3": 11}
"""Of a run that is timed, the first one not counted."""
ROUNDS_OF_MEMORY = 2
STARTS = 3
"""Turns of the two that start."""
APART_MAX = 1e-5
"""Largest difference of a parameter from the loop by hand, after all rounds."""
PER_ROUND = {"w1": 50, "w2": 4, "w3": 4}
PEERS = {
    "flower": ("Flower on Ray, 2 actors", "benchmarks.peers.simulation_flower"),
    "pfl": ("pfl", "benchmarks.peers.simulation_pfl"),
}
ENGINES = {"inprocess": "in process", "batched": "batched", "pool": "pool, 2 workers"}
PFL_PYTHON = Path(".venv-peers/bin/python")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where cells find data, and what they may run."""

    folder: Path
    """Of data and base models."""
    pfl_python: Path
    rounds: int | None = None
    """Of every run; None: each cell's own number."""
    _handed: dict[str, int] = field(default_factory=dict)
    """Of each workload written for other simulators, the number of parameters that train."""

    def rounds_of(self, usual: int) -> int:
        """Return how many rounds a run has."""
        return self.rounds or usual

    def engine(self, work: str, engine: str, *words: str, rounds: int, watch: bool) -> Outcome:
        """Run an engine of ours, or the loop by hand alone."""
        given = ["--rounds", str(rounds), "--folder", str(self.folder)]
        run = [work, engine, *given, *words]
        return run_cell("benchmarks.simulation_runs", *run, watch=watch)

    def prepare(self, work: str) -> int:
        """Have data, base model and what others get; return the number of parameters."""
        if work not in self._handed:
            out = ["--out", str(self.folder / f"handed-{work}")]
            made = self.engine(work, "hand", *out, rounds=1, watch=False)
            self._handed[work] = made.told["parameters"]
        return self._handed[work]

    def peer(self, work: str, peer: str, *, rounds: int, watch: bool) -> Outcome:
        """Run another simulator, and see that it trained the same number of parameters."""
        if peer == "pfl" and not self.pfl_python.is_file():
            raise CellFailed(f"no {self.pfl_python}: `make bench-peers` makes it")
        size = self.prepare(work)
        ran = run_cell(
            PEERS[peer][1],
            *("--rounds", str(rounds)),
            watch=watch,
            env={HANDED: str((self.folder / f"handed-{work}").resolve())},
            python=self.pfl_python.absolute() if peer == "pfl" else None,
        )
        if ran.told["parameters"] != size or ran.told["threads"] != [1]:
            raise CellFailed(f"it did other work: {ran.told['parameters']} parameters, not {size}")
        return ran


def engine_rows(work: str, engine: str, target: float, *, bench: Bench) -> list[Row]:
    """Time an engine's rounds by those of the loop by hand, which follow each in its process."""
    bench.prepare(work)
    rounds = bench.rounds_of(ROUNDS[work])
    told = bench.engine(work, engine, rounds=rounds, watch=False).told
    ratios = [ours / hand for ours, hand in zip(told["engine_s"], told["floor_s"], strict=True)]
    ratios, apart = ratios[1:], told["apart"]
    same = apart <= APART_MAX
    value = median(ratios)
    floor = _update_ms(work, told["floor_s"][1:])
    words = "" if same else "; NOT THE SAME RESULT"
    row = Row(
        name=f"{work}: {ENGINES[engine]} / by hand",
        value=value,
        unit="ratio",
        target=f"<= {target:g}",
        ok=value <= target and same,
        peer=f"by hand, same process: {floor}; {_rounds(ratios)}; apart {apart:.0e}{words}",
        samples=ratios,
    )
    return [row]


def peer_rows(work: str, peer: str, *, bench: Bench) -> list[Row]:
    """Time another simulator's rounds by those of the loop by hand, run before and after it."""
    rounds = bench.rounds_of(ROUNDS[work])
    bench.prepare(work)
    hand: list[float] = []
    hand += bench.engine(work, "hand", rounds=rounds, watch=False).told["floor_s"][1:]
    theirs = bench.peer(work, peer, rounds=rounds, watch=False).told
    hand += bench.engine(work, "hand", rounds=rounds, watch=False).told["floor_s"][1:]
    ratios = [seconds / median(hand) for seconds in theirs["rounds_s"][1:]]
    told = f"by hand, before and after: {_update_ms(work, hand)}"
    row = Row(
        name=f"{work}: {PEERS[peer][0]} / by hand",
        value=median(ratios),
        unit="ratio",
        peer=f"{told}; {_rounds(ratios)}; {theirs['versions']}",
        samples=ratios,
    )
    return [row]


def _update_ms(work: str, rounds_s: Sequence[float]) -> str:
    return f"{1000 * median(rounds_s) / PER_ROUND[work]:,.2f} ms an update"


def _rounds(rounds: Sequence[float]) -> str:
    return f"{len(rounds)} round{'s' if len(rounds) > 1 else ''}, 1 thread"


def peak_rows(
    name: str,
    target: float,
    ours: Callable[[Bench, int], Outcome],
    theirs: Callable[[Bench, int], Outcome],
    labels: tuple[str, str],
    *,
    bench: Bench,
) -> list[Row]:
    """Compare the most that two trees of processes ever held, by PSS."""
    rounds = bench.rounds_of(ROUNDS_OF_MEMORY)
    peaks = [one(bench, rounds).peak for one in (ours, theirs)]
    value = peaks[0].best_mb / peaks[1].best_mb
    told = "; ".join(f"{label}: {peak}" for label, peak in zip(labels, peaks, strict=True))
    row = Row(
        name=f"{name} (peak of the process tree, {'PSS' if peaks[0].pss_mb else 'RSS'})",
        value=value,
        unit="ratio",
        target=f"<= {target:g}",
        ok=value <= target,
        peer=f"{told}; {rounds} rounds, 1 thread a process",
    )
    return [row]


def alone(work: str, engine: str, *words: str, times: int = 1) -> Callable[[Bench, int], Outcome]:
    """Return what runs an engine without the loop by hand, and watches its memory.

    `times` as many rounds, for as many updates as what it is held against: a peak lasts for less
    than the time between two looks, and more looks find more of it.
    """

    def run(bench: Bench, rounds: int) -> Outcome:
        bench.prepare(work)
        return bench.engine(work, engine, "--alone", *words, rounds=times * rounds, watch=True)

    return run


def on_ray(work: str) -> Callable[[Bench, int], Outcome]:
    """Return what runs Flower on Ray and watches its memory."""
    return lambda bench, rounds: bench.peer(work, "flower", rounds=rounds, watch=True)


def start_rows(work: str, target: float, *, bench: Bench) -> list[Row]:
    """Compare the time from a process's start to its first forward pass of training."""
    bench.prepare(work)
    ways = {
        "in process": partial(bench.engine, work, "inprocess", "--alone", rounds=1, watch=False),
        "by hand": partial(bench.engine, work, "hand", rounds=1, watch=False),
    }
    starts: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(STARTS):
        for name, run in ways.items():
            ran = run()
            starts[name].append(ran.told["first_s"] - ran.since_s)
    try:
        ran = bench.peer(work, "flower", rounds=1, watch=False)
        ray = f"{ran.told['first_s'] - ran.since_s:.3g} s"
    except CellFailed as failure:
        ray = f"not run: {failure}"
    more = [a - b for a, b in zip(starts["in process"], starts["by hand"], strict=True)]
    told = "; ".join(f"{name}: {median(seconds):.3g} s" for name, seconds in starts.items())
    row = Row(
        name=f"{work}: start to first training, in process - by hand",
        value=median(more),
        unit="s",
        target=f"<= {target:g}",
        ok=median(more) <= target,
        peer=f"{told}; Flower on Ray: {ray}; {STARTS} starts, 1 thread",
        samples=more,
    )
    return [row]


def cells() -> dict[str, Callable[..., list[Row]]]:
    """Return what there is to measure, by name, in the order it is run."""
    drawn = ("--draw", "20", "--per-round", "100")
    found: dict[str, Callable[..., list[Row]]] = {}
    for work, engine, target in (
        ("w1", "inprocess", 1.5),
        ("w1", "batched", 0.5),
        ("w2", "inprocess", 1.03),
        ("w2", "pool", 0.53),
        ("w3", "inprocess", 1.05),
        ("w3", "pool", 0.57),
    ):
        found[f"{work} {engine}"] = partial(engine_rows, work, engine, target)
    for work in ROUNDS:
        for peer in PEERS:
            found[f"{work} {peer}"] = partial(peer_rows, work, peer)
    found["memory w3 pool flower"] = partial(
        peak_rows,
        "w3: pool of 2 / Flower on Ray, 2 actors",
        0.55,
        alone("w3", "pool"),
        on_ray("w3"),
        ("pool", "Ray"),
    )
    found["memory w3 cohort"] = partial(
        peak_rows,
        "w3: in process, 100 / 10 clients a round",
        1.05,
        alone("w3", "inprocess", "--per-round", "100"),
        alone("w3", "inprocess", "--per-round", "10", times=10),
        ("100", "10, in ten times the rounds"),
    )
    found["memory w1 population"] = partial(
        peak_rows,
        "w1: in process, population of 1,000,000 / 1,000",
        1.05,
        alone("w1", "inprocess", "--clients", "1000000", *drawn),
        alone("w1", "inprocess", "--clients", "1000", *drawn),
        ("1,000,000", "1,000"),
    )
    found["start w2"] = partial(start_rows, "w2", 1.5)
    return dict(sorted(found.items(), key=lambda item: _place(item[0])))


def _place(name: str) -> tuple[bool, bool, str]:
    """Sort by kind and workload, so that what is compared is measured close together."""
    return name.startswith("start"), name.startswith("memory"), name.split()[0]


def measure(names: Sequence[str], bench: Bench) -> list[Row]:
    """Run the cells one after the other, with a line on each, and return their rows."""
    rows: list[Row] = []
    everything = cells()
    for number, name in enumerate(names, start=1):
        print(f"[{number}/{len(names)}] {name} ...", end=" ", file=sys.stderr, flush=True)
        began = time.perf_counter()
        try:
            new = everything[name](bench=bench)
        except CellFailed as failure:
            new = [Row(name=name, value=None, unit="", target=str(failure))]
        rows += new
        values = ", ".join("not run" if r.value is None else f"{r.value:.3g}" for r in new)
        print(f"{values} ({time.perf_counter() - began:.0f} s)", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Run the benchmark from the command line."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all is brought down
    names = list(cells())
    parser = argparse.ArgumentParser(
        prog="benchmarks.simulation",
        description=__doc__,
        epilog=f"Cells: {'; '.join(names)}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="WORDS",
        help="run the cells whose names begin so: w1, 'w3 pool', memory",
    )
    parser.add_argument("--rounds", type=int, help="rounds of every run, the first not counted")
    parser.add_argument("--pfl-python", type=Path, default=PFL_PYTHON)
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 2:
        parser.error("--rounds: the first is not counted; give at least 2")
    if options.only:
        names = [name for name in names if name.startswith(tuple(options.only))]
    if not names:
        parser.error("--only: no cell has such a name; --help lists them")
    machine = machine_facts()
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(folder=Path(temporary), pfl_python=options.pfl_python, rounds=options.rounds)
        rows = measure(names, bench)
    publish("Simulating by an engine, and by hand", rows, machine=machine, path=options.json)


if __name__ == "__main__":
    main()
