"""Poisson draws, and persons' rows."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from intramural.core.errors import ConfigError
from intramural.privacy.random import SecureRandom
from intramural.privacy.sampler import PoissonSampler, persons_of


def test_counts_of_draws_are_binomial() -> None:
    units, rate, draws = 400, 0.02, 6000
    sampler = PoissonSampler(units, rate, SecureRandom.seeded(1))
    sizes = np.bincount([sampler.draw().size for _ in range(draws)], minlength=19)[:40]
    expected = draws * stats.binom.pmf(np.arange(19), units, rate)
    expected[1] += expected[0]  # cells of at least 5: 0 and 1 together, 18 and more together
    expected[18] = draws * stats.binom.sf(17, units, rate)
    sizes[1] += sizes[0]
    sizes[18] = sizes[18:].sum()
    assert stats.chisquare(sizes[1:19], expected[1:19]).pvalue > 1e-3


def test_each_unit_is_drawn_as_often_as_any_other() -> None:
    units, rate, draws = 300, 0.1, 4000
    sampler = PoissonSampler(units, rate, SecureRandom.seeded(2))
    counts = np.zeros(units)
    for _ in range(draws):
        counts[sampler.draw()] += 1
    variance = draws * rate * (1 - rate)
    statistic = np.sum((counts - draws * rate) ** 2) / variance  # chi-square of 300 binomials
    assert 1e-3 < stats.chi2.sf(statistic, units) < 1 - 1e-3


def test_units_are_drawn_independently_and_anew() -> None:
    draws = 20_000
    sampler = PoissonSampler(2, 0.3, SecureRandom.seeded(3))
    cells = np.zeros((2, 2))
    before, repeats = -1, 0
    for _ in range(draws):
        drawn = sampler.draw().tolist()
        cells[int(0 in drawn), int(1 in drawn)] += 1
        repeats += before == (0 in drawn)
        before = 0 in drawn
    expected = draws * np.outer([0.7, 0.3], [0.7, 0.3])
    assert stats.chisquare(cells.ravel(), expected.ravel()).pvalue > 1e-3
    same = 0.7**2 + 0.3**2  # a coin falls as the one before
    assert abs(repeats - draws * same) < 4 * math.sqrt(draws * same * (1 - same)) + 1


def test_nobody_may_be_drawn_and_is_no_error() -> None:
    sampler = PoissonSampler(5, 0.05, SecureRandom.seeded(4))
    sizes = [sampler.draw().size for _ in range(200)]
    assert sizes.count(0) > 100  # 0.95**5 = 0.77 of them
    assert PoissonSampler(0, 0.5, SecureRandom.seeded(4)).draw().tolist() == []


def test_everybody_is_drawn_at_rate_one() -> None:
    sampler = PoissonSampler(4, 1.0, SecureRandom.seeded(5))
    assert sampler.draw().tolist() == sampler.draw().tolist() == [0, 1, 2, 3]


def test_a_sampler_offers_a_draw_and_nothing_else() -> None:
    assert [name for name in dir(PoissonSampler) if not name.startswith("_")] == ["draw"]


@pytest.mark.parametrize("rate", [0.0, -1.0, 1.5, math.nan])
def test_a_rate_that_is_none_is_refused_at_once(rate: float) -> None:
    with pytest.raises(ConfigError, match=r"sample_rate must be in \(0, 1\]"):
        PoissonSampler(3, rate, SecureRandom.seeded(1))
    with pytest.raises(ConfigError, match="units must be at least 0"):
        PoissonSampler(-1, 0.5, SecureRandom.seeded(1))


def lists(keys: str, most: int, random: SecureRandom | None = None) -> list[list[int]]:
    return [rows.tolist() for rows in persons_of(keys, records_per_person=most, random=random)]


def test_persons_hold_their_rows_and_no_more_than_allowed() -> None:
    assert lists("abacab", 3) == [[0, 2, 4], [1, 5], [3]]
    assert lists("abacab", 2) == [[0, 2], [1, 5], [3]]
    assert lists("abacab", 1) == [[0], [1], [3]]
    assert lists("", 1) == []


def test_a_random_choice_keeps_each_of_a_persons_rows_as_often() -> None:
    random, counts = SecureRandom.seeded(6), np.zeros(6)
    for _ in range(2000):
        first, second = persons_of("abaaaaa", records_per_person=2, random=random)
        assert (first.size, second.tolist()) == (2, [1])
        assert first[0] < first[1]
        counts[np.searchsorted([0, 2, 3, 4, 5, 6], first)] += 1
    assert stats.chisquare(counts).pvalue > 1e-3


@given(st.text("abcd", max_size=30), st.integers(1, 4))
def test_a_person_more_or_less_changes_nobody_elses_rows(keys: str, most: int) -> None:
    """Leave out person 'd': the others keep the same rows, counted among those that are left."""
    left = [row for row, key in enumerate(keys) if key != "d"]
    whole = [rows for rows in lists(keys, most) if keys[rows[0]] != "d"]
    without = lists("".join(keys[row] for row in left), most)
    assert [[left[i] for i in rows] for rows in without] == whole


def test_records_per_person_is_at_least_one() -> None:
    with pytest.raises(ConfigError, match="records_per_person must be at least 1, got 0"):
        persons_of(["a"], records_per_person=0)
