"""Run many worlds: `python -m tests.simworld --seeds 10000`; one again: `--seed 17 --show`."""

import argparse
import logging
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from tests.simworld.plan import planned
from tests.simworld.world import Broken, Result, simulate

CHUNK = 25
BROKEN_MAX = 10
"""Broken worlds shown before the rest is left."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simworld", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many worlds")
    parser.add_argument("--first", type=int, default=0, help="the first one's seed")
    parser.add_argument("--seed", type=int, help="this world alone")
    parser.add_argument("--show", action="store_true", help="print what happened in it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    chosen = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if chosen.seed is not None:
        return one(chosen.seed, show=chosen.show)
    return many(range(chosen.first, chosen.first + chosen.seeds), jobs=chosen.jobs)


def one(seed: int, *, show: bool) -> int:
    try:
        result = simulate(planned(seed))
    except Broken as broken:
        print(broken)
        return 1
    if show:
        print("\n".join(result.lines))
    print(f"seed {seed}: {result.end}, {result.digest[:19]}, trace {result.trace[:12]}")
    return 0


def batch(seeds: range) -> tuple[Counter[str], list[str]]:
    """Return what happened in some worlds, and the broken ones."""
    logging.disable(logging.CRITICAL)
    told: Counter[str] = Counter()
    broken: list[str] = []
    for seed in seeds:
        try:
            told.update(counts(simulate(planned(seed))))
        except Broken as error:
            broken.append(f"seed {seed}: {error}")
    return told, broken


def counts(result: Result) -> Counter[str]:
    """Return a world's figures."""
    told = Counter({result.end: 1, "worlds": 1})
    told.update({f"processes that {end}": n for end, n in Counter(result.ends).items()})
    for name in ("asked_again", "discarded", "resent"):
        told[name.replace("_", " ")] = getattr(result, name)
    return told


def many(seeds: range, *, jobs: int) -> int:
    begun_s = time.monotonic()
    chunks = [seeds[start : start + CHUNK] for start in range(0, len(seeds), CHUNK)]
    told: Counter[str] = Counter()
    broken: list[str] = []
    with ProcessPoolExecutor(jobs) as pool:
        for one_told, one_broken in pool.map(batch, chunks):
            told.update(one_told)
            broken += one_broken
            for line in one_broken[: max(0, BROKEN_MAX - len(broken) + len(one_broken))]:
                print(line, end="\n\n", flush=True)
            if len(broken) >= BROKEN_MAX:
                pool.shutdown(cancel_futures=True)
                break
    took_s = time.monotonic() - begun_s
    print(f"{told['worlds']} worlds in {took_s:.0f} s, {told['worlds'] / took_s:.0f} a second")
    print("  ".join(f"{name}: {count}" for name, count in sorted(told.items())))
    print(f"broken: {len(broken)}")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
