"""Metrics under a privacy claim: two noised counts a site, charged like training."""

from math import sqrt

import numpy as np
from numpy.typing import NDArray

from intramural.core.errors import ConfigError
from intramural.core.metrics import LOSS_SCALE, NOISED_SUMS, Sums, square
from intramural.privacy.random import SecureRandom


def sensitivity_of(records_per_unit: int) -> float:
    """Return the L2 norm by which one unit moves an evaluation's (correct, examples).

    Guarantees:
        Holds under add-remove and under replace-one, for the first so many of a split's records,
        however many that is, where each unit has at most m = `records_per_unit` records in the
        split, which are its own whoever else is there, and other units' keep their order.

        Each record adds a share in [0, 1] to `correct` and 1 to `examples`. A unit that is added
        comes in with j <= m of its records. It pushes out o <= j others where the list is cut, none
        where it is not. So `examples` moves by j - o, in [0, m], and `correct` by a number in
        [-o, j]: each by at most m, and the norm is at most m * sqrt(2). For one in another's place,
        take the two from the list without either: with j >= j' of their records in the cut lists,
        and o' - o <= j - j' others more in the second, `examples` moves by at most j - j', and
        `correct` by at most j. So it holds for them too. A unit may change sides of the split:
        that is one added, or removed.

        Void for a unit with more records in the list, as where the list is cut first and bounded
        afterwards. One record's share is taken not to depend on the others, which is so up to the
        last bits of the forward pass: they may tip a tie.

    Args:
        records_per_unit: Most records of one unit; 1 where the unit is a record.

    Raises:
        ConfigError: `records_per_unit` is below 1.
    """
    if records_per_unit < 1:
        raise ConfigError(f"records_per_unit must be at least 1, got {records_per_unit!r}")
    return records_per_unit * sqrt(2.0)


def exact_counts(sums: Sums) -> NDArray[np.float64]:
    """Return (correct, examples) of a task's exact sums, shape `(2,)`; they stay at the site.

    A record of a classification is right or not; one of a generation counts with the share of its
    response's tokens that the model ranks first.

    Raises:
        AggregationError: The sums hold a confusion matrix that is not square.
    """
    if "confusion" in sums.counts:
        matrix = square(sums.counts["confusion"])
        return np.array([matrix.trace(), matrix.sum()], dtype=np.float64)
    shares, examples = (int(sums.counts[name][0]) for name in ("hit_shares", "examples"))
    return np.array([shares / LOSS_SCALE, examples], dtype=np.float64)


def noised_counts(
    sums: Sums, *, noise_multiplier: float, sensitivity: float, random: SecureRandom
) -> Sums:
    """Return noised numbers of right answers and of records, as an evaluation's sums.

    Guarantees:
        The Gaussian mechanism with this noise multiplier, for one unit under either relation, where
        `sensitivity` bounds what one unit moves, see `sensitivity_of`. Rounding, and keeping
        0 <= correct <= examples and examples >= 1, is post-processing.

    Args:
        sums: A task's exact sums; they do not leave the site.
        noise_multiplier: Noise's standard deviation / `sensitivity`.
        sensitivity: In records.
        random: Draws the noise.
    """
    noised = np.rint(exact_counts(sums) + random.normal(2, std=noise_multiplier * sensitivity))
    examples = max(1, int(noised[1]))
    correct = min(max(0, int(noised[0])), examples)
    counts = zip(NOISED_SUMS, (correct, examples), strict=True)
    return Sums(counts={name: np.array([n], dtype=np.int64) for name, n in counts})
