"""Robust rules by coordinate: median and trimmed mean, by a sorting network across the sites.

A network is a fixed list of compare-exchange steps; each step is a minimum and a maximum of two
rows, which NumPy does many columns at a time. It sorts exactly, much faster than a sort of each
column of a few values, and steps that no wanted rank follows from are left out.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from intramural.core.layout import Vector
from intramural.strategies.robust_rows import Rows
from intramural.strategies.rule import State

NETWORK_MAX = 48
"""Most rows for which a network is faster than sorting each column."""

Step = tuple[int, int, bool, bool]
"""Two rows to be put in order, and whether the lower and the higher are wanted afterwards."""


def merge_exchange(count: int) -> list[tuple[int, int]]:
    """Return the pairs of Batcher's merge exchange sort of `count` rows, in order.

    Source: Batcher 1968, https://doi.org/10.1145/1468075.1468121, as Knuth's Algorithm 5.2.2M
    has it for every count.
    """
    pairs: list[tuple[int, int]] = []
    top = 1 << max(0, (count - 1).bit_length() - 1)
    p = top if count > 1 else 0
    while p:
        q, r, d = top, 0, p
        while True:
            pairs += [(i, i + d) for i in range(count - d) if i & p == r]
            if q == p:
                break
            q, r, d = q >> 1, p, q - p
        p >>= 1
    return pairs


@lru_cache(maxsize=64)
def network(count: int, wanted: range) -> tuple[Step, ...]:
    """Return the steps after which the `wanted` ranks (0: the smallest) are in their rows."""
    live, steps = set(wanted), []
    for low, high in reversed(merge_exchange(count)):
        if low in live or high in live:
            steps.append((low, high, low in live, high in live))
            live |= {low, high}
    return tuple(reversed(steps))


def ranked(columns: NDArray[Any], wanted: range) -> Collection[NDArray[Any]]:
    """Return the rows of each column's values of the `wanted` ranks; `columns` is overwritten.

    Args:
        columns: Finite, shape `(rows, columns)`.
        wanted: Ranks from 0, the smallest.
    """
    count = len(columns)
    if count > NETWORK_MAX:
        upright = np.ascontiguousarray(columns.T)
        upright.sort(axis=1)
        return list(upright.T[wanted.start : wanted.stop])
    rows, spare = list(columns), np.empty_like(columns[0])
    for low, high, keep_low, keep_high in network(count, wanted):
        one, other = rows[low], rows[high]
        if keep_low and keep_high:
            np.minimum(one, other, out=spare)
            np.maximum(one, other, out=other)
            rows[low], spare = spare, one
        elif keep_low:
            np.minimum(one, other, out=one)
        else:
            np.maximum(one, other, out=other)
    return rows[wanted.start : wanted.stop]


def mean_of_ranks(rows: Rows, wanted: range, out: Vector) -> None:
    """Write the mean of the values of the `wanted` ranks, column by column; summed in float64."""

    def work(columns: NDArray[Any]) -> NDArray[np.float64]:
        total = np.zeros(columns.shape[1])
        for row in ranked(columns, wanted):
            total += row
        total /= len(wanted)
        return total

    rows.each(work, out)


@dataclass(frozen=True)
class Median:
    """step_k = median(delta_1k, ..., delta_nk), coordinate by coordinate.

    Of an even number, the mean of the two in the middle. With fewer than half of the sites hostile,
    each coordinate lies between two honest sites' values. It is not the mean even if all are
    honest: where sites differ much, it forgets the rare ones.

    Source: Yin et al. 2018, Definition 1 and Algorithm 1, https://arxiv.org/abs/1803.01498.
    """

    def least(self, hostile: int) -> int:
        """Return the fewest updates with which so many hostile ones are borne."""
        return 2 * hostile + 1

    def combine(self, rows: Rows, hostile: int, state: State, out: Vector) -> State:
        """Write the step; nothing is remembered."""
        del hostile, state
        mean_of_ranks(rows, range((len(rows) - 1) // 2, len(rows) // 2 + 1), out)
        return {}


@dataclass(frozen=True)
class TrimmedMean:
    """step_k = mean of delta_1k, ..., delta_nk without the f largest and the f smallest.

    f is strategy.hostile_max. With at most f sites hostile, each coordinate lies between two honest
    sites' values; without one, it is off from the mean by what the trimmed values would add.

    Source: Yin et al. 2018, Definition 2 and Algorithm 1, https://arxiv.org/abs/1803.01498.
    """

    def least(self, hostile: int) -> int:
        """Return the fewest updates with which so many hostile ones are borne."""
        return 2 * hostile + 1

    def combine(self, rows: Rows, hostile: int, state: State, out: Vector) -> State:
        """Write the step; nothing is remembered."""
        del state
        mean_of_ranks(rows, range(hostile, len(rows) - hostile), out)
        return {}
