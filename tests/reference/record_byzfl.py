"""Record what byzfl 0.0.11 makes of random updates: `tests/fixtures/byzfl_vectors.npz`.

byzfl (MIT licence) is not a dependency. Unpack its wheel and name the folder:

    python -m tests.reference.record_byzfl FOLDER

Its package imports plotting and vision libraries; only its arithmetic is loaded here, in float64.
The updates are not stored: `case(k)` makes them again.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from intramural.core.seeds import generator

FILE = Path(__file__).parents[1] / "fixtures" / "byzfl_vectors.npz"
CASES = 1000
"""Random inputs of every rule."""
CASES_MIXED = 200
"""The first so many, also behind 'nnm' and 'bucketing'."""
RULES = (
    "median",
    "trimmed-mean",
    "krum",
    "multi-krum",
    "geometric-median",
    "centred-clipping",
)
BEFORE = ("none", "nnm", "bucketing")
HISTORY = "centred-clipping/second"
"""Centred clipping's second round, where nothing goes before it."""
SEED, ROUND = 7, 1
"""Of the order of bucketing."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Two rounds of updates and the settings of the rules."""

    rounds: tuple[NDArray[np.float32], NDArray[np.float32]]
    """Each of shape `(sites, elements)`; the second is for the rule with history alone."""
    hostile: int
    hostile_bucketed: int
    """So many are borne behind bucketing."""
    bucket: int
    smoothing: float
    weiszfeld: int
    """Iterations of the geometric median."""
    radius: float
    clippings: int
    """Iterations of centred clipping."""

    def hostile_behind(self, before: str) -> int:
        """Return how many hostile sites the rule is told of."""
        return self.hostile_bucketed if before == "bucketing" else self.hostile


def case(number: int) -> Case:
    """Return one case: 5 to 15 sites, 1 to 20 elements, up to what Krum bears hostile."""
    rng = np.random.default_rng(number)
    sites = int(rng.integers(5, 16))
    elements = 1 + int(20 * rng.random() ** 2)
    hostile = int(rng.integers(0, (sites - 3) // 2 + 1))
    bucket = 3 if sites >= 9 and number % 2 else 2
    rounds = []
    for _ in range(2):
        rows = rng.normal(rng.normal(size=elements), 0.7, size=(sites, elements))
        rows[sites - hostile :] *= (1.0, -3.0, 30.0)[number % 3]
        rounds.append(rows.astype(np.float32))
    return Case(
        rounds=(rounds[0], rounds[1]),
        hostile=hostile,
        hostile_bucketed=min(hostile, (-(-sites // bucket) - 3) // 2),
        bucket=bucket,
        smoothing=(0.1, 1e-6)[number % 2],
        weiszfeld=(3, 32)[number % 2],
        radius=float(rng.uniform(0.2, 3.0)),
        clippings=1 + number % 3,
    )


def _load(folder: Path) -> tuple[Any, Any]:
    """Return byzfl's modules of rules and of what goes before them."""
    package = ModuleType("byzfl")
    package.__path__ = [str(folder / "byzfl")]
    sys.modules["byzfl"] = package
    from byzfl.aggregators import aggregators, preaggregators  # type: ignore[import-not-found]

    # rows come in our random order already
    here = SimpleNamespace(permutation=lambda rows: rows)
    preaggregators.random_tool = lambda rows: here
    return aggregators, preaggregators


def _makers(rules: Any, one: Case, hostile: int) -> dict[str, Callable[[Any], Any]]:
    return {
        "median": rules.Median(),
        "trimmed-mean": rules.TrMean(hostile),
        "krum": rules.Krum(hostile),
        "multi-krum": rules.MultiKrum(hostile),
        "geometric-median": rules.GeometricMedian(one.smoothing, one.weiszfeld),
        "centred-clipping": rules.CenteredClipping(None, one.clippings, one.radius),
    }


def _record(folder: Path) -> None:
    rules, befores = _load(folder)
    found: dict[str, list[Any]] = {f"{r}/{b}": [] for r in RULES for b in BEFORE} | {HISTORY: []}
    for number in range(CASES):
        one = case(number)
        for before in BEFORE if number < CASES_MIXED else BEFORE[:1]:
            hostile = one.hostile_behind(before)
            rows = one.rounds[0].astype(np.float64)
            if before == "nnm":
                rows = befores.NNM(hostile)(rows)
            elif before == "bucketing":
                order = generator(SEED, "bucketing", ROUND).permutation(len(rows))
                rows = befores.Bucketing(one.bucket)(rows[order])
            makers = _makers(rules, one, hostile)
            for rule in RULES:
                found[f"{rule}/{before}"].append(makers[rule](rows))
            if before == "none":
                again = makers["centred-clipping"](one.rounds[1].astype(np.float64))
                found[HISTORY].append(again)
    arrays: dict[str, Any] = {
        name: np.concatenate(rows).astype(np.float32) for name, rows in found.items()
    }
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    _record(Path(sys.argv[1]))
