"""Metrics under a privacy claim: two noised counts a site, charged like training."""

from math import sqrt

import numpy as np

from intramural.core.metrics import NOISED_SUMS, Sums
from intramural.privacy.random import SecureRandom

SENSITIVITY = sqrt(2.0)
"""L2 norm by which one record, added or removed, moves (correct, examples): (1, 1) at most. One
record in another's place moves `correct` alone, by 1."""


def noised_counts(sums: Sums, *, noise_multiplier: float, random: SecureRandom) -> Sums:
    """Return noised numbers of right answers and of records, as an evaluation's sums.

    Guarantees:
        The Gaussian mechanism with this noise multiplier, for one record under either relation.
        Rounding, and keeping 0 <= correct <= examples and examples >= 1, is post-processing.

    Args:
        sums: A classification's exact sums; they do not leave the site.
        noise_multiplier: Noise's standard deviation / `SENSITIVITY`.
        random: Draws the noise.
    """
    side = round(sqrt(sums.counts["confusion"].size))
    matrix = sums.counts["confusion"].reshape(side, side)
    exact = np.array([matrix.trace(), matrix.sum()], dtype=np.float64)
    noised = np.rint(exact + random.normal(2, std=noise_multiplier * SENSITIVITY))
    examples = max(1, int(noised[1]))
    correct = min(max(0, int(noised[0])), examples)
    counts = zip(NOISED_SUMS, (correct, examples), strict=True)
    return Sums(counts={name: np.array([n], dtype=np.int64) for name, n in counts})
