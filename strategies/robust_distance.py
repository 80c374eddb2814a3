"""Robust rules by distance: Krum, Multi-Krum and geometric median; nearest neighbours, buckets.

All of them follow from the inner products of the updates, a small matrix, and end in weights.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from intramural.core.layout import Vector
from intramural.strategies.robust_rows import Matrix, Rows, squared_distances
from intramural.strategies.rule import State

Weights = NDArray[np.float64]
"""Of the rows in their combination, shape `(rows,)`."""


def krum_scores(products: Matrix, *, hostile: int, left_out: int) -> Weights:
    """Return each row's sum of squared distances to the n - hostile - left_out nearest others."""
    squares = squared_distances(products)
    np.fill_diagonal(squares, -1.0)  # itself comes first, even before a copy
    nearest = np.sort(squares, axis=1)[:, 1 : 1 + len(squares) - hostile - left_out]
    scores: Weights = nearest.sum(axis=1)
    return scores


@dataclass(frozen=True, kw_only=True)
class Krum:
    """step = delta_i of the least score; score_i = sum of |delta_i - delta_j|**2, nearest j only.

    The nearest are the n - f - 2 nearest other updates, f being strategy.hostile_max. Of equal
    scores, the first site's name wins. Needs n >= 2 f + 3. The step is one site's update: hostile
    ones cannot be far from the honest, but all other sites' work is lost, and where sites differ
    much or updates are noised, distances tell little.

    The paper takes n - f - 2 nearest, as Flower does (`left_out` 2, the default); byzfl takes
    n - f - 1 (`left_out` 1).

    Source: Blanchard et al. 2017, Section 4, https://arxiv.org/abs/1703.02757.
    """

    left_out: int = 2

    def least(self, hostile: int) -> int:
        """Return the fewest updates with which so many hostile ones are borne."""
        return 2 * hostile + 3

    def weights(self, products: Matrix, hostile: int) -> Weights:
        """Return 1 for the row that is taken."""
        scores = krum_scores(products, hostile=hostile, left_out=self.left_out)
        weights = np.zeros(len(scores))
        weights[np.argmin(scores)] = 1.0
        return weights

    def combine(self, rows: Rows, hostile: int, state: State, out: Vector) -> State:
        """Write the step; nothing is remembered."""
        del state
        rows.combine(self.weights(rows.products, hostile), out)
        return {}


@dataclass(frozen=True, kw_only=True)
class MultiKrum:
    """step = mean of the n - f updates of the least scores; scores as `Krum` has them.

    Needs n >= 2 f + 3. Keeps most sites' work, and so lets in a hostile update that hides among the
    honest. The paper leaves open how many are averaged; n - f is byzfl's choice.

    Source: Blanchard et al. 2017, Sections 4 and 6, https://arxiv.org/abs/1703.02757.
    """

    left_out: int = 2

    def least(self, hostile: int) -> int:
        """Return the fewest updates with which so many hostile ones are borne."""
        return 2 * hostile + 3

    def weights(self, products: Matrix, hostile: int) -> Weights:
        """Return equal weights of the rows that are taken."""
        scores = krum_scores(products, hostile=hostile, left_out=self.left_out)
        taken = np.argsort(scores, kind="stable")[: len(scores) - hostile]
        weights = np.zeros(len(scores))
        weights[taken] = 1.0 / len(taken)
        return weights

    def combine(self, rows: Rows, hostile: int, state: State, out: Vector) -> State:
        """Write the step; nothing is remembered."""
        del state
        rows.combine(self.weights(rows.products, hostile), out)
        return {}


@dataclass(frozen=True, kw_only=True)
class GeometricMedian:
    """step = argmin_z sum_i |z - delta_i|, by `iterations` of the smoothed Weiszfeld algorithm.

    z_0 = 0; w_i = 1 / max(smoothing, |z - delta_i|); z = sum_i w_i delta_i / sum_i w_i. With fewer
    than half of the sites hostile, z stays within a bounded distance of the honest updates. z is
    always a combination of the updates, so that its distances follow from the inner products, and
    iterations cost nothing beside the first and the last pass over the updates.

    The smoothing is in units of an update's L2 norm, and must be far below the honest ones: at or
    above them it makes this the mean. byzfl's values are 0.1 and 3 iterations.

    Source: Pillutla et al. 2022 (RFA), Algorithm 2,
    https://arxiv.org/abs/1912.13445.
    """

    smoothing: float = 1e-6
    iterations: int = 32

    def least(self, hostile: int) -> int:
        """Return the fewest updates with which so many hostile ones are borne."""
        return 2 * hostile + 1

    def weights(self, products: Matrix) -> Weights:
        """Return the weights of the rows in z; their sum is 1."""
        weights, norms = np.zeros(len(products)), np.diagonal(products)
        for _ in range(self.iterations):
            seen = products @ weights
            squares = np.maximum(norms - 2.0 * seen + weights @ seen, 0.0)
            weights = 1.0 / np.maximum(np.sqrt(squares), self.smoothing)
            weights /= weights.sum()
        return weights

    def combine(self, rows: Rows, hostile: int, state: State, out: Vector) -> State:
        """Write the step; nothing is remembered."""
        del hostile, state
        rows.combine(self.weights(rows.products), out)
        return {}


def nearest_mix(products: Matrix, hostile: int) -> Matrix:
    """Return the mixing of nearest neighbours: each row becomes the mean of its n - f nearest.

    A row is its own nearest; f is strategy.hostile_max.

    Source: Allouah et al. 2023 (NNM), Algorithm 2, https://arxiv.org/abs/2302.01772.
    """
    squares = squared_distances(products)
    np.fill_diagonal(squares, -1.0)
    kept = len(squares) - hostile
    nearest = np.argsort(squares, axis=1, kind="stable")[:, :kept]
    mix = np.zeros_like(squares)
    np.put_along_axis(mix, nearest, 1.0 / kept, axis=1)
    return mix


def bucket_mix(order: NDArray[np.int64], bucket: int) -> Matrix:
    """Return the mixing of buckets: the means of each `bucket` rows in a random order.

    The last bucket holds what is left. Each hostile row spoils one bucket.

    Source: Karimireddy et al. 2022, Algorithm 1, https://arxiv.org/abs/2006.09365.
    """
    starts = range(0, len(order), bucket)
    mix = np.zeros((len(starts), len(order)))
    for row, start in enumerate(starts):
        inside = order[start : start + bucket]
        mix[row, inside] = 1.0 / len(inside)
    return mix
