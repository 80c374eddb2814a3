"""Median and trimmed mean: the network sorts whatever it gets, and few steps do for few ranks."""

from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from intramural.strategies.robust_coordinate import (
    NETWORK_MAX,
    Median,
    TrimmedMean,
    merge_exchange,
    network,
    ranked,
)
from intramural.strategies.robust_rows import Rows
from intramural.strategies.spool import Spool


def every_column_of_zeros_and_ones(count: int) -> NDArray[np.float32]:
    """A network that sorts all of these sorts everything (Knuth, Theorem 5.3.4Z)."""
    return np.array(list(product((0, 1), repeat=count)), np.float32).T


@pytest.mark.parametrize("count", range(1, 13))
def test_the_network_sorts_everything(count: int) -> None:
    columns = every_column_of_zeros_and_ones(count)
    expected = np.sort(columns, axis=0)
    assert np.array(list(ranked(columns, range(count)))).tolist() == expected.tolist()


@pytest.mark.parametrize("count", [3, 4, 7, 10])
def test_any_wanted_ranks_are_right(count: int) -> None:
    for low in range(count):
        for high in range(low + 1, count + 1):
            columns = every_column_of_zeros_and_ones(count)
            expected = np.sort(columns, axis=0)[low:high]
            got = np.array(list(ranked(columns, range(low, high))))
            assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("count", [16, 31, NETWORK_MAX, NETWORK_MAX + 1, 100])
def test_many_rows_are_sorted_too(count: int) -> None:
    columns = np.random.default_rng(count).standard_normal((count, 50)).astype(np.float32)
    wanted = range(count // 3, count - count // 4)
    expected = np.sort(columns, axis=0)[wanted.start : wanted.stop]
    assert np.array(list(ranked(columns, wanted))).tolist() == expected.tolist()


def test_steps_that_no_wanted_rank_follows_from_are_left_out() -> None:
    # The least of 4 rows takes 3 minima and no maximum.
    steps = network(4, range(1))
    assert [(low, high) for _, _, low, high in steps] == [(True, False)] * 3
    assert len(merge_exchange(4)) == 5


def rows_of(values: list[list[float]]) -> Rows:
    spool = Spool(len(values[0]))
    for number, row in enumerate(values):
        spool.add(f"{number:02d}", np.array(row, np.float32))
    return Rows(spool)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[5, 1], [-100, 3], [1, 2]], [1, 2]),
        ([[5, 1], [-100, 3], [1, 2], [2, 10]], [1.5, 2.5]),  # (1 + 2) / 2, (2 + 3) / 2
        ([[7, 8]], [7, 8]),
        ([[4, 0], [6, 1]], [5, 0.5]),
    ],
)
def test_the_median_by_hand(values: list[list[float]], expected: list[float]) -> None:
    out = np.empty(2, np.float32)
    assert Median().combine(rows_of(values), 1, {}, out) == {}
    assert out.tolist() == expected


@pytest.mark.parametrize(
    ("hostile", "expected"),
    [(0, [3, 22]), (1, [2, 4]), (2, [2, 4])],  # means of 5; of 1 2 3 and 3 4 5; the medians
)
def test_the_trimmed_mean_by_hand(hostile: int, expected: list[float]) -> None:
    values: list[list[float]] = [[1, 5], [9, 4], [2, 3], [0, 98], [3, 0]]
    out = np.empty(2, np.float32)
    assert TrimmedMean().combine(rows_of(values), hostile, {}, out) == {}
    assert out.tolist() == expected


def test_the_mean_of_the_kept_is_summed_in_float64() -> None:
    # In float32, -1 + 2**-26 is -1, and the small ones are lost after it.
    out = np.empty(1, np.float32)
    TrimmedMean().combine(rows_of([[-1.0]] + [[2.0**-26]] * 7), 0, {}, out)
    assert float(out[0]) == float(np.float32((-1 + 7 * 2.0**-26) / 8))
