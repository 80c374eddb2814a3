"""The exact sum: the same bits in any order and chunking, right to half a grid step a term."""

import weakref
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from intramural.core.errors import AggregationError
from intramural.core.layout import Vector
from intramural.strategies import exact_sum
from intramural.strategies.exact_sum import ExactSum, _Folding, largest
from intramural.strategies.exact_sum import _peak_bound as peak_bound

BITS = 24
Terms = list[tuple[Vector, float]]

vectors = arrays(np.float32, (5,), elements=st.floats(-1e3, 1e3, width=32))
weights = st.integers(1, 10_000).map(float)
terms = st.lists(st.tuples(vectors, weights), min_size=1, max_size=8)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ten elements many chunks and several threads' work."""
    monkeypatch.setattr(exact_sum, "CHUNK", 2)


def mean(pairs: Terms, *, bits: int = BITS) -> Vector:
    total = ExactSum(len(pairs[0][0]), fraction_bits=bits)
    for vector, weight in pairs:
        total.add(vector, weight)
    return mean_of(total, sum(weight for _, weight in pairs))


def mean_of(total: ExactSum, weight: float) -> Vector:
    out = np.full(total.size, np.nan, np.float32)
    total.mean(weight, out=out)
    return out


@given(terms, st.randoms())
def test_any_order_gives_the_same_bits(pairs: Terms, random: Random) -> None:
    expected = mean(pairs).tobytes()
    random.shuffle(pairs)
    assert mean(pairs).tobytes() == expected


def test_floating_point_would_not_give_the_same_bits() -> None:
    # What the grid is for: three float32 numbers whose plain sum depends on their order.
    numbers = [np.array([x], np.float32) for x in (0.1, 0.7, -0.3)]
    assert (numbers[0] + numbers[1]) + numbers[2] != numbers[0] + (numbers[1] + numbers[2])
    pairs = [(number, 1.0) for number in numbers]
    assert mean(pairs).tobytes() == mean(pairs[::-1]).tobytes()


@given(terms)
def test_it_equals_the_float64_oracle_to_half_a_step_a_term(pairs: Terms) -> None:
    total_weight = sum(weight for _, weight in pairs)
    oracle = np.sum([weight * v.astype(np.float64) for v, weight in pairs], axis=0) / total_weight
    # Each term is off by half a step at most; then float32 keeps 24 bits, rounding the last.
    bound = len(pairs) * 2.0 ** -(BITS + 1) / total_weight + np.abs(oracle) * 2.0**-24 + 1e-12
    assert np.all(np.abs(mean(pairs) - oracle) <= bound)


def test_chunks_and_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 8, 9, 10, 37):
        pairs = [(rng.standard_normal(size).astype(np.float32), w) for w in (1.0, 3.0, 7.0)]
        monkeypatch.setattr(exact_sum, "CHUNK", 2)  # many chunks, and several threads' work
        chunked = mean(pairs)
        monkeypatch.setattr(exact_sum, "CHUNK", 1 << 16)
        assert mean(pairs).tobytes() == chunked.tobytes()
        oracle = np.sum([w * v.astype(np.float64) for v, w in pairs], axis=0) / 11.0
        np.testing.assert_allclose(chunked, oracle, rtol=1e-6, atol=1e-7)


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch, small_chunks: None) -> None:
    """Have every vector folded in beside what the caller does."""
    monkeypatch.setattr(exact_sum, "BESIDE_MIN", 0)


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_a_vector_folded_in_beside_the_caller_changes_no_bit(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(2)
    pairs = [(rng.standard_normal(37).astype(np.float32), w) for w in (1.0, 3.0, 7.0, 2.0, 5.0)]
    found = {mean(pairs[:count]).tobytes() for _ in range(50)}  # stopped here and there
    monkeypatch.setattr(exact_sum, "BESIDE_MIN", 4 * 37 + 1)
    assert found == {mean(pairs[:count]).tobytes()}
    total_weight = sum(w for _, w in pairs[:count])
    oracle = sum(w * v.astype(np.float64) for v, w in pairs[:count]) / total_weight
    np.testing.assert_allclose(mean(pairs[:count]), oracle, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize("chunks", range(20))
@pytest.mark.parametrize("after", [0, 1])
def test_a_folding_that_is_stopped_anywhere_is_ended_by_the_next_or_the_mean(
    after: int, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folded: list[int] = []
    fold = _Folding.fold

    def fold_some(self: _Folding, start: int, stop: int, scratch: Any = None) -> None:
        if len(folded) == chunks:
            self._is_stopped = True  # as whoever waits does, but after this chunk
        folded.append(stop - start)
        fold(self, start, stop, scratch)

    rng = np.random.default_rng(3)
    pairs = [(rng.standard_normal(37).astype(np.float32), w) for w in (1.0, 3.0, 7.0)][: 2 + after]
    expected = mean(pairs).tobytes()
    total = ExactSum(37, fraction_bits=BITS)
    total.add(*pairs[0])
    total.settle()
    monkeypatch.setattr(_Folding, "fold", fold_some)
    for pair in pairs[1:]:
        total.add(*pair)
    assert mean_of(total, sum(weight for _, weight in pairs)).tobytes() == expected
    assert sum(folded) == 37 * (1 + after)  # each element once


@pytest.mark.usefixtures("beside")
def test_of_what_was_added_the_last_alone_is_kept_and_nothing_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def kept(count: int) -> list[bool]:
        """Return which of the vectors added may still be in memory."""
        total, found = ExactSum(3, fraction_bits=BITS), []
        for number in range(count):
            vector = np.full(3, float(number), np.float32)
            found.append(weakref.ref(vector))
            total.add(vector, 1.0)
            del vector
        alive = [one() is not None for one in found]
        mean_of(total, float(count))
        assert not any(one() is not None for one in found)
        return alive

    assert kept(3)[:2] == [False, False]
    monkeypatch.setattr(exact_sum, "BESIDE_MAX", 11)  # three numbers are 12 bytes
    assert kept(3) == [False] * 3


@pytest.mark.parametrize("size", [1, 7, 37])
def test_what_is_added_to_the_mean_is_added_in_float32_after_it(
    size: int, small_chunks: None
) -> None:
    rng = np.random.default_rng(1)
    pairs = [(rng.standard_normal(size).astype(np.float32), w) for w in (1.0, 2.0)]
    current = rng.standard_normal(size).astype(np.float32)
    total = ExactSum(size, fraction_bits=BITS)
    for vector, weight in pairs:
        total.add(vector, weight)
    out = np.full(size, np.nan, np.float32)
    total.mean(3.0, out=out, plus=current)
    assert out.tobytes() == (mean(pairs) + current).tobytes()


def test_numbers_on_the_grid_are_summed_without_error() -> None:
    # (3 * 0.5 + 1 * -2.25) / 4 = -0.1875, exact in binary.
    pairs = [(np.array([0.5], np.float32), 3.0), (np.array([-2.25], np.float32), 1.0)]
    assert mean(pairs).tolist() == [-0.1875]


def test_numbers_between_grid_points_go_to_the_nearest_even() -> None:
    # Grid of 1: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2, -0.5 -> 0, -1.5 -> -2, 0.75 -> 1.
    vector = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 0.75], np.float32)
    assert mean([(vector, 1.0)], bits=0).tolist() == [0, 2, 2, 0, -2, 1]


def test_the_magic_bits_wrap_around_over_many_terms_and_come_back() -> None:
    # MAGIC's bits are about 0.53 * 2**63, so two terms pass an int64 and four wrap it whole.
    assert 2 * exact_sum.MAGIC_BITS > 2**63
    for count in (1, 2, 3, 4, 5, 1000):
        values = [(np.array([k, -k, 0.25], np.float32), 1.0) for k in range(count)]
        expected = (count - 1) / 2  # mean of 0..count-1
        assert mean(values).tolist() == [expected, -expected, 0.25]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38, -3e38])
@pytest.mark.parametrize("place", [0, 4])
def test_a_value_that_cannot_be_added_is_refused_and_changes_nothing(
    bad: float, place: int
) -> None:
    total = ExactSum(5, fraction_bits=BITS)
    total.add(np.full(5, 2.0, np.float32), 3.0)
    vector = np.zeros(5, np.float32)
    vector[place] = bad
    with pytest.raises(
        AggregationError, match="not finite" if abs(bad) > 3.3e38 or bad != bad else "too large"
    ):
        total.add(vector, 1.0)
    total.add(np.full(5, 6.0, np.float32), 1.0)
    assert total.terms == 2
    assert mean_of(total, 4.0).tolist() == [3.0] * 5  # (3*2 + 1*6) / 4


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_a_bad_value_found_late_takes_back_what_was_added_before_it(
    before: int, bad: float
) -> None:
    rng = np.random.default_rng(0)
    good = [rng.standard_normal(20).astype(np.float32) for _ in range(4)]
    expected = mean([(vector, 1.0) for vector in good]).tobytes()
    for place in range(20):
        total = ExactSum(20, fraction_bits=BITS)
        for vector in good[:before]:
            total.add(vector, 1.0)
        hostile = rng.standard_normal(20).astype(np.float32)
        hostile[place] = bad
        with pytest.raises(AggregationError):
            total.add(hostile, 5.0)
        for vector in good[before:]:
            total.add(vector, 1.0)
        assert mean_of(total, 4.0).tobytes() == expected


def test_the_largest_term_is_accepted_and_the_next_refused() -> None:
    # A term must stay below 2**51 grid units: weight * value < 2**51 / 2**24 = 2**27.
    below = np.array([np.nextafter(np.float32(2**27), np.float32(0))], np.float32)
    assert mean([(below, 1.0)]).tolist() == below.tolist()
    with pytest.raises(AggregationError, match="diverged"):
        mean([(np.array([2**27], np.float32), 1.0)])
    with pytest.raises(AggregationError, match="diverged"):
        mean([(np.array([-(2**20)], np.float32), 128.0)])


def test_a_sum_that_could_pass_an_int64_is_refused() -> None:
    # 2**50 units a term: 2**62 / 2**50 = 4096 terms reach the bound, so the 4096th is refused.
    total = ExactSum(1, fraction_bits=0)
    term = np.array([2.0**50], np.float32)
    for _ in range(4095):
        total.add(term, 1.0)
    with pytest.raises(AggregationError, match="too large"):
        total.add(term, 1.0)
    assert mean_of(total, 4095.0).tolist() == [2.0**50]


@given(arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32)))
def test_largest_is_numpys(vector: Vector) -> None:
    expected = float(np.max(np.abs(vector))) if vector.size else 0.0
    got = largest(vector)
    assert got == expected or (np.isnan(got) and np.isnan(expected))


@given(arrays(np.float32, st.integers(1, 40), elements=st.floats(width=32)))
def test_the_quick_bound_is_never_below_the_largest(vector: Vector) -> None:
    bound = peak_bound(vector)
    if np.isfinite(vector).all():
        # 40 equal values have a norm of sqrt(40) < 6.4 times the largest; squares may overflow.
        peak = float(np.max(np.abs(vector)))
        assert peak <= bound <= 6.4 * peak + 1e-17 or peak > 1e18
        assert bound >= peak
    else:
        assert not np.isfinite(bound)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("size", [9, 20])
def test_a_nan_in_any_chunk_is_found(size: int) -> None:
    for place in range(size):
        vector = np.ones(size, np.float32)
        vector[place] = np.nan
        assert np.isnan(largest(vector))
        vector[place] = -5
        assert largest(vector) == 5


def test_a_read_only_vector_can_be_added_and_stays_as_it_is() -> None:
    vector: NDArray[np.float32] = np.frombuffer(np.arange(4, dtype="<f4").tobytes(), dtype="<f4")
    assert mean([(vector, 2.0)]).tolist() == [0, 1, 2, 3]
    assert vector.tolist() == [0, 1, 2, 3]


def test_an_empty_vector_has_an_empty_mean() -> None:
    assert mean([(np.zeros(0, np.float32), 1.0)]).shape == (0,)


@pytest.mark.parametrize("before", [1, 3])
def test_a_sum_used_again_remembers_nothing_of_the_round_before(before: int) -> None:
    total = ExactSum(3, fraction_bits=BITS)
    for _ in range(before):
        total.add(np.array([2.0**26, -(2.0**26), 5.0], np.float32), 1.0)
    mean_of(total, float(before))
    total.add(np.array([1.0, 2.0, 3.0], np.float32), 1.0)
    total.add(np.array([3.0, 4.0, 8.0], np.float32), 1.0)
    assert mean_of(total, 2.0).tolist() == [2.0, 3.0, 5.5]


def test_the_bound_of_the_sum_starts_at_zero_again_too() -> None:
    total, term = ExactSum(1, fraction_bits=0), np.array([2.0**50], np.float32)
    for _ in range(3):  # 4095 terms are the most that fit, see above
        for _ in range(4095):
            total.add(term, 1.0)
        assert mean_of(total, 4095.0).tolist() == [2.0**50]
