"""Record what byzfl 0.0.11 makes of random updates: `tests/fixtures/byzfl_attacks.npz`.

byzfl (MIT licence) is not a dependency. Unpack its wheel and name the folder:

    python -m tests.reference.record_byzfl_attacks FOLDER

The updates are not stored: `case(k)` makes them again.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

FILE = Path(__file__).parents[1] / "fixtures" / "byzfl_attacks.npz"
CASES = 200
ATTACKS = ("sign-flip", "ipm", "alie")


@dataclass(frozen=True, kw_only=True)
class Case:
    """The honest updates of a round, and the settings of the attacks."""

    known: NDArray[np.float32]
    """Shape `(sites, elements)`."""
    factor: float
    """Epsilon of IPM; byzfl's ALIE adds so many deviations, so its sign is turned here."""


def case(number: int) -> Case:
    """Return one case: 2 to 12 sites, 1 to 20 elements."""
    rng = np.random.default_rng(number)
    sites, elements = int(rng.integers(2, 13)), int(rng.integers(1, 21))
    known = rng.normal(rng.normal(size=elements), 0.7, size=(sites, elements))
    return Case(
        known=known.astype(np.float32),
        factor=float(rng.uniform(0.1, 3.0)),
    )


def _load(folder: Path) -> Any:
    """Return byzfl's module of attacks, without the package's plotting and vision libraries."""
    package = ModuleType("byzfl")
    package.__path__ = [str(folder / "byzfl")]
    sys.modules["byzfl"] = package
    inner = ModuleType("byzfl.attacks")
    inner.__path__ = [str(folder / "byzfl" / "attacks")]
    sys.modules["byzfl.attacks"] = inner
    from byzfl.attacks import attacks  # type: ignore[import-not-found]

    return attacks


def _record(folder: Path) -> None:
    attacks = _load(folder)
    found: dict[str, list[Any]] = {name: [] for name in ATTACKS}
    for number in range(CASES):
        one = case(number)
        known = one.known.astype(np.float64)
        found["sign-flip"].append(attacks.SignFlipping()(known))
        found["ipm"].append(attacks.InnerProductManipulation(one.factor)(known))
        found["alie"].append(attacks.ALittleIsEnough(-one.factor)(known))
    arrays: dict[str, Any] = {
        name: np.concatenate(rows).astype(np.float32) for name, rows in found.items()
    }
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    _record(Path(sys.argv[1]))
