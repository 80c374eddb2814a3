"""Sampler: who takes part in a step, and which rows are a person's."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from intramural.core.errors import ConfigError
from intramural.privacy.random import SecureRandom


class PoissonSampler:
    """Draws each unit by its own coin, anew for every step. There is no other sampler.

    Guarantees:
        Each unit is in a draw with probability at most `sample_rate` (2**-64 less at most),
        independently of the other units and of the other draws. Void where a caller skips an empty
        draw, cuts a long one, repeats one, or shows anybody how long it was.
    """

    def __init__(self, units: int, sample_rate: float, random: SecureRandom) -> None:
        """Sample from `units` units, the site's real and private number of them.

        `sample_rate` is a public constant: it must not follow from `units`.

        Raises:
            ConfigError: `sample_rate` is not in (0, 1], or `units` is below 0.
        """
        if not 0 < sample_rate <= 1:
            raise ConfigError(f"sample_rate must be in (0, 1], got {sample_rate!r}")
        if units < 0:
            raise ConfigError(f"units must be at least 0, got {units!r}")
        self._units = units
        self._sample_rate = sample_rate
        self._random = random

    def draw(self) -> NDArray[np.int64]:
        """Return one step's units, sorted; nobody is an answer, and the step is then noise."""
        return self._random.choose(self._units, probability=self._sample_rate)


def persons_of(
    keys: Sequence[str], *, records_per_person: int, random: SecureRandom | None = None
) -> list[NDArray[np.int64]]:
    """Group rows by person, and keep at most so many of each person's.

    Persons come in the order of their first row, their rows in the order given. Which rows of a
    person stay depends on nobody else's rows: the first ones; or with `random` a uniform choice,
    made anew in each call. So one person more or less changes no other person's rows, which is
    what a person-level claim needs.

    Args:
        keys: The person of each row, compared as they are: ' 7' and '7' are two persons.
        records_per_person: Most rows kept of one person, at least 1; a public constant.
        random: To choose with; None: the first rows stay.

    Returns:
        One array of sorted row numbers a person.

    Raises:
        ConfigError: `records_per_person` is below 1.
    """
    if records_per_person < 1:
        raise ConfigError(f"records_per_person must be at least 1, got {records_per_person!r}")
    rows: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        rows.setdefault(key, []).append(row)
    return [
        _kept(np.array(own, dtype=np.int64), records_per_person, random) for own in rows.values()
    ]


def _kept(rows: NDArray[np.int64], most: int, random: SecureRandom | None) -> NDArray[np.int64]:
    if rows.size <= most:
        return rows
    if random is None:
        return rows[:most]
    return np.sort(rows[np.argsort(random.uniform64(rows.size), kind="stable")[:most]])
