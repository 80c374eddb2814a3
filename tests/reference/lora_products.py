"""LoRA aggregation a second time: plain matrices by name, in float64, as the formulas say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One layer's factors, and what its frozen weight has gained."""

    a: Matrix
    b: Matrix
    residual: Matrix

    def change(self, scale: float) -> Matrix:
        return self.residual + scale * self.b @ self.a


def mean_change(
    sites: Sequence[Mapping[str, Adapter]], weights: Sequence[float], scale: float
) -> dict[str, Matrix]:
    """Return the weighted mean of the sites' whole changes, by layer."""
    total = sum(weights)
    return {
        layer: np.sum(
            [w / total * site[layer].change(scale) for site, w in zip(sites, weights, strict=True)],
            axis=0,
        )
        for layer in sites[0]
    }


def relative_error(made: Mapping[str, Matrix], wanted: Mapping[str, Matrix]) -> float:
    """Return the Frobenius norm of the difference over that of what is wanted, of all layers."""
    off = sum(float(np.linalg.norm(made[name] - wanted[name]) ** 2) for name in wanted)
    whole = sum(float(np.linalg.norm(wanted[name]) ** 2) for name in wanted)
    return float(np.sqrt(off / whole))
