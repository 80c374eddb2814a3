"""Federated averaging as the papers write it, in float64, one line a formula."""

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


def server_step(
    current: F64, velocity: F64, deltas: list[F64], weights: list[float], *, lr: float, beta: float
) -> tuple[F64, F64]:
    """Return the next parameters and velocity.

    McMahan et al. 2017, Algorithm 1 (mean weighted by records); Hsu et al. 2019, Section 4.3:
    v <- beta v + mean; w <- w + lr v.
    """
    pairs = list(zip(weights, deltas, strict=True))
    mean = np.sum([w * d for w, d in pairs], axis=0) / sum(weights)
    velocity = beta * velocity + mean
    return current + lr * velocity, velocity
