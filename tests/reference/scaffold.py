"""SCAFFOLD and FedNova a second time, on small problems, as the papers write them.

Karimireddy et al. 2020, Algorithm 1 with option II: sites keep c_i and send both differences.
Wang et al. 2020: sites send their change and their steps.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Point = NDArray[np.float64]
Gradient = Callable[[Point], Point]


def scaffold_round(
    x: Point,
    c: Point,
    own: list[Point],
    gradients: Sequence[Gradient],
    asked: Sequence[int],
    *,
    steps: int,
    rate: float,
    server_rate: float,
) -> tuple[Point, Point]:
    """Return x and c after a round; `own`, each site's c_i, is changed in place."""
    moves, changes = [], []
    for site in asked:
        y = x.copy()
        for _ in range(steps):
            y = y - rate * (gradients[site](y) - own[site] + c)
        new = own[site] - c + (x - y) / (steps * rate)
        moves.append(y - x)
        changes.append(new - own[site])
        own[site] = new
    share = len(asked) / len(gradients)
    return x + server_rate * np.mean(moves, axis=0), c + share * np.mean(changes, axis=0)


def fednova_step(
    deltas: Sequence[Point], weights: Sequence[float], lengths: Sequence[float]
) -> Point:
    """Return the step of a round: normalised changes, times the mean length."""
    p = np.array(weights) / np.sum(weights)
    normalised = [d / a for d, a in zip(deltas, lengths, strict=True)]
    mean_length = float(np.dot(p, lengths))
    step: Point = mean_length * np.sum([w * d for w, d in zip(p, normalised, strict=True)], axis=0)
    return step
