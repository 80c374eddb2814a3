"""Centred clipping: what the last rounds agreed on, moved by updates cut to a radius around it."""

from dataclasses import dataclass

import numpy as np

from intramural.core.layout import Vector
from intramural.strategies.robust_distance import Weights
from intramural.strategies.robust_rows import Matrix, Rows
from intramural.strategies.rule import State

CENTRE = "centre"
"""Name of the last round's step in the rule's memory."""


@dataclass(frozen=True, kw_only=True)
class CentredClipping:
    """v <- v + mean_i (delta_i - v) min(1, radius / |delta_i - v|), `iterations` times; step = v.

    v starts at the last round's step, and at 0 in the first. A hostile site moves v by at most
    radius / n in an iteration, wherever its update is. An attacker who knows the history can add
    up such moves, round after round, in one direction.

    Without a `radius`, each iteration takes the median of the updates' distances from v (of an even
    number the lower one in the middle): with fewer than half of the sites hostile, that is no more
    than an honest update's. This choice is ours; the paper's radius follows from the deviation
    of the honest updates, which nobody knows here.

    v moves within the span of the updates and the start, so that all distances follow from the
    inner products: one pass finds these, a second one writes v.

    Source: Karimireddy et al. 2021, equation CC, https://arxiv.org/abs/2012.10333.
    """

    radius: float | None = None
    iterations: int = 3

    def least(self, hostile: int) -> int:
        """Return the fewest updates with which so many hostile ones are borne."""
        return 2 * hostile + 1

    def weights(self, products: Matrix) -> Weights:
        """Return c, where v - start = sum_i c_i row_i, from the rows less the start."""
        weights, norms = np.zeros(len(products)), np.diagonal(products)
        for _ in range(self.iterations):
            seen = products @ weights
            distances = np.sqrt(np.maximum(norms - 2.0 * seen + weights @ seen, 0.0))
            radius = self.radius
            if radius is None:
                radius = float(np.sort(distances)[(len(distances) - 1) // 2])
            within = distances <= radius  # at a radius of 0, the start itself is within
            shares = np.where(within, 1.0, radius / np.where(within, 1.0, distances))
            # v + mean(s_i (row_i - v)), where v = sum_i c_i row_i
            weights = weights + (shares - shares.sum() * weights) / len(shares)
        return weights

    def combine(self, rows: Rows, hostile: int, state: State, out: Vector) -> State:
        """Write the step, and remember it."""
        del hostile, state
        rows.combine(self.weights(rows.products), out)
        return {CENTRE: out.copy()}
