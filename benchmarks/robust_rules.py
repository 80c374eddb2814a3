"""What do robust rules cost, next to the same arithmetic in plain NumPy, and how much memory?

Ours sets each update aside as it arrives, in memory or in a file, and works chunk by chunk once all
are there. Plain NumPy has the whole matrix of updates in memory, and takes distances in float64 as
ours does: float32 loses those of updates that nearly agree. Both make the step of a round; the two
take turns, so that a busy machine slows both. Ours is timed once all updates are set aside: that
is what a round waits for; setting aside is a row of its own. Each figure of memory comes from a
process of its own: the most it ever held beyond what it held when the current arrays existed.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from shutil import disk_usage
from statistics import median
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from benchmarks.harness import Row, machine_facts, publish
from intramural.core.layout import Vector
from intramural.core.messages import Update
from intramural.strategies.centred_clipping import CentredClipping
from intramural.strategies.robust import Before, Combiner, Robust
from intramural.strategies.robust_coordinate import Median, TrimmedMean
from intramural.strategies.robust_distance import GeometricMedian, Krum, MultiKrum
from intramural.strategies.rule import Fold

COMBINERS: dict[str, Combiner] = {
    "median": Median(),
    "trimmed-mean": TrimmedMean(),
    "krum": Krum(),
    "multi-krum": MultiKrum(),
    "geometric-median": GeometricMedian(),
    "centred-clipping": CentredClipping(radius=1.0),
}
CASES: tuple[tuple[str, Before], ...] = (
    *((name, "none") for name in COMBINERS),
    ("trimmed-mean", "nnm"),
    ("geometric-median", "nnm"),
    ("median", "bucketing"),
)
COST_S = {
    "median": 6.3,
    "trimmed-mean": 4.2,
    "krum": 0.4,
    "multi-krum": 0.4,
    "geometric-median": 0.9,
    "centred-clipping": 7.0,
}
"""Seconds of plain NumPy for 10 x 22M on the two cores where this was planned; Krum's are of the
distances alone."""
SLOWER_MAX = 1.5
"""Ours takes at most so many times as long as plain NumPy."""
REPLIES_MAX = 1.3
"""Most memory for ten sites, in all replies together ..."""
MODELS_MAX = 2.5
"""... and for a hundred, in models: the next arrays and the next centre ..."""
SCRATCH_MAX = 32 << 20
"""... and bytes of scratch beside either, whatever the size of the model."""
LARGE_SITES = 100
LARGE_CASES: tuple[tuple[str, Before], ...] = (
    ("median", "none"),
    ("trimmed-mean", "nnm"),
    ("centred-clipping", "none"),
)


def rule_of(name: str, before: Before, sites: int) -> Robust:
    """Return the rule with a fifth of the sites hostile; behind bucketing, a tenth."""
    hostile = sites // (10 if before == "bucketing" else 5)
    return Robust(name, COMBINERS[name], hostile_max=hostile, before=before)


def update_of(site: int, delta: Vector) -> Update:
    """Return a site's update."""
    return Update(
        site=f"site-{site:03d}",
        round=1,
        layout="",
        weight=1,
        loss=1.0,
        seconds=1.0,
        delta=delta,
    )


def random_row(size: int, site: int) -> Vector:
    """Return an update of L2 norm 1, give or take."""
    row = np.random.default_rng(site).standard_normal(size, dtype=np.float32)
    row *= np.float32(1 / np.sqrt(size))
    return row


def plain(name: str, rows: NDArray[np.float32], hostile: int) -> NDArray[Any]:
    """Return the step as a few lines of NumPy on the whole matrix make it."""
    count = len(rows)
    if name == "median":
        return np.asarray(np.median(rows, axis=0))
    if name == "trimmed-mean":
        ends = (hostile, count - hostile - 1)
        return np.asarray(np.partition(rows, ends, axis=0)[hostile : count - hostile].mean(axis=0))
    if name == "centred-clipping":
        centre = np.zeros(rows.shape[1], np.float32)
        for _ in range(3):
            apart = rows - centre
            lengths = np.linalg.norm(apart, axis=1)
            centre = centre + (apart * np.minimum(1, 1 / lengths)[:, None]).mean(axis=0)
        return centre
    wide = rows.astype(np.float64)
    products = wide @ wide.T
    del wide
    combiner = COMBINERS[name]
    if isinstance(combiner, GeometricMedian):
        weights = combiner.weights(products)
    else:
        assert isinstance(combiner, Krum | MultiKrum)
        weights = combiner.weights(products, hostile)
    return np.asarray(weights.astype(np.float32) @ rows)


def time_rows(size: int, sites: int, repeats: int) -> list[Row]:
    """Measure each rule and its plain counterpart in turn."""
    rows = np.stack([random_row(size, site) for site in range(sites)])
    current, shown = np.zeros(size, np.float32), []
    kept, seconds = filled(rule_of("median", "none", sites), current, rows)
    name = f"{sites} sites: setting aside all updates but the last"
    shown.append(Row(name=name, value=seconds, unit="s", samples=[seconds]))
    for name, before in CASES:
        rule, ours, peer = rule_of(name, before, sites), [], []
        for _ in range(repeats):
            fold = Fold(round=1, current=current, state={}, work=kept.work)
            began = time.perf_counter()
            result, _ = rule.finish(fold)
            ours.append(time.perf_counter() - began)
            if before == "none":
                began = time.perf_counter()
                expected = plain(name, rows, rule.hostile_max)
                peer.append(time.perf_counter() - began)
                assert np.allclose(result, expected, rtol=1e-3, atol=1e-6 * np.abs(expected).max())
        shown += rows_of_case(name, before, sites, ours, peer)
    return shown


def rows_of_case(
    name: str, before: Before, sites: int, ours: list[float], peer: list[float]
) -> list[Row]:
    """Return what is told of one rule's times."""
    title = f"{sites} sites: {name}" + (f" behind {before}" if before != "none" else "")
    cost = COST_S.get(name) if before == "none" and sites == 10 else None
    first = Row(
        name=title,
        value=median(ours),
        unit="s",
        target=f"<= {SLOWER_MAX:g} x {cost:g} s" if cost else "",
        ok=median(ours) <= SLOWER_MAX * cost if cost else None,
        samples=ours,
    )
    if not peer:
        return [first]
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    second = Row(
        name=f"{title}: time ours / plain NumPy",
        value=median(ratios),
        unit="ratio",
        target=f"<= {SLOWER_MAX:g}",
        ok=median(ratios) <= SLOWER_MAX,
        peer=f"plain NumPy: {median(peer):.2f} s",
        samples=ratios,
    )
    return [first, second]


def filled(rule: Robust, current: Vector, rows: NDArray[np.float32]) -> tuple[Fold, float]:
    """Return a fold of all rows, and the seconds of adding all but the last."""
    fold = rule.begin({}, current, round=1)
    began = last = time.perf_counter()
    for site, row in enumerate(rows):
        last = time.perf_counter()
        rule.add(fold, update_of(site, row))
    return fold, last - began


def memory_rows(size: int, sites: int, cases: tuple[tuple[str, Before], ...]) -> list[Row]:
    """Measure each rule's peak, and its time, in a process of its own."""
    shown = []
    for name, before in cases:
        command = [sys.executable, "-m", "benchmarks.robust_rules", "--elements", str(size)]
        command += ["--sites", str(sites), "--peak-of", name, before]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        models, seconds = (float(word) for word in done.stdout.split())
        title = f"{sites} sites: {name}" + (f" behind {before}" if before != "none" else "")
        is_large = sites >= LARGE_SITES
        whole = 1 if is_large else sites
        value, limit = models / whole, MODELS_MAX if is_large else REPLIES_MAX
        shown.append(
            Row(
                name=f"{title}: peak memory",
                value=value,
                unit="models" if is_large else "replies",
                target=f"<= {limit:g} + {SCRATCH_MAX >> 20} MiB",
                ok=value <= limit + SCRATCH_MAX / (4 * size * whole),
                samples=[value],
            )
        )
        if is_large:
            shown.append(Row(name=title, value=seconds, unit="s", samples=[seconds]))
    return shown


def peak(name: str, before: Before, size: int, sites: int) -> tuple[float, float]:
    """Return the most this process held beyond the current arrays, in models; and the seconds.

    The updates come from a file, as from a socket, and differ by a shift: their making needs
    no more memory than one model.
    """
    rule = rule_of(name, before, sites)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row"
        script = (
            "import sys, numpy as n; n.random.default_rng(0)"
            ".standard_normal(int(sys.argv[1]), dtype='f4').tofile(sys.argv[2])"
        )
        subprocess.run([sys.executable, "-c", script, str(size), str(file)], check=True)
        current = np.zeros(size, np.float32)
        current += 1.0  # touched
        state = {"centre": current.copy()} if name == "centred-clipping" else {}
        before_bytes = psutil.Process().memory_info().rss
        fold = rule.begin(state, current, round=1)
        for site in range(sites):
            row = np.fromfile(file, np.float32)
            row += np.float32(site)
            rule.add(fold, update_of(site, row))
            del row
        began = time.perf_counter()
        rule.finish(fold)
        seconds = time.perf_counter() - began
    extra_bytes: int = _most_memory() - before_bytes
    return extra_bytes / (4 * size), seconds


def _most_memory() -> int:
    """Return the high-water mark of this process's resident memory, in bytes."""
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def _measured(measure: Callable[[], list[Row]], needed_bytes: int, name: str) -> list[Row]:
    """Measure, unless the file of updates would fill the disk."""
    if disk_usage(tempfile.gettempdir()).free < 2 * needed_bytes:
        return [Row(name=name, value=None, unit="s", target="too little room on the disk")]
    return measure()


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.robust_rules", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--sites", type=int, default=10)
    parser.add_argument("--elements", type=int, default=22_000_000, help="of one model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--large", action="store_true", help=f"also {LARGE_SITES} sites: 9 GB disk")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size, sites = options.elements, options.sites
    if options.peak_of:
        name, before = options.peak_of
        print(*peak(name, before, size, sites))
        return
    machine = machine_facts()
    rows = memory_rows(size, sites, CASES) + time_rows(size, sites, options.repeats)
    if options.large:
        rows += _measured(
            lambda: memory_rows(size, LARGE_SITES, LARGE_CASES),
            4 * size * LARGE_SITES,
            f"{LARGE_SITES} sites",
        )
    title = f"Robust rules on updates of {size:,} float32 ({4 * size / 1e6:.0f} MB)"
    publish(title, rows, machine=machine, path=options.json)


if __name__ == "__main__":
    main()
