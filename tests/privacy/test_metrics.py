"""Noised counts: two numbers of a site's evaluation, with the noise that was charged."""

from itertools import pairwise, product
from math import sqrt

import numpy as np
import pytest
from numpy.typing import NDArray

from intramural.core.errors import AggregationError, ConfigError
from intramural.core.metrics import LOSS_SCALE, Sums, metrics_of
from intramural.privacy.metrics import exact_counts, noised_counts, sensitivity_of
from intramural.privacy.random import SecureRandom


def exact(confusion: list[list[int]]) -> Sums:
    """Return a classification's exact sums, as a site has them."""
    cells = np.array(confusion, dtype=np.int64)
    counts = {
        "confusion": cells.ravel(),
        "loss": np.array([7]),
        "examples": np.array([cells.sum()]),
    }
    return Sums(counts=counts)


def written(shares: list[float]) -> Sums:
    """Return a generation's exact sums of records with these shares of tokens ranked first."""
    sums = {
        "loss": 7,
        "token_loss": 7,
        "tokens": 10 * len(shares),
        "correct_tokens": 3,
        "hit_shares": round(sum(shares) * LOSS_SCALE),
        "examples": len(shares),
    }
    return Sums(counts={name: np.array([n], dtype=np.int64) for name, n in sums.items()})


def noised(sums: Sums, *, noise: float, seed: int = 0, records: int = 1) -> tuple[int, int]:
    """Return the two counts, of units of so many records."""
    random = SecureRandom.seeded(seed, "test")
    found = noised_counts(
        sums, noise_multiplier=noise, sensitivity=sensitivity_of(records), random=random
    ).counts
    return int(found["correct"][0]), int(found["examples"][0])


MANY = exact([[4000, 1000], [1000, 4000]])
FEW = exact([[1, 0], [1, 0]])
TEXTS = written([0.5] * 16_000)


@pytest.mark.parametrize("sums", [MANY, TEXTS], ids=["classification", "generation"])
def test_only_two_counts_are_left_of_an_evaluation(sums: Sums) -> None:
    random = SecureRandom.seeded(0, "test")
    found = noised_counts(sums, noise_multiplier=1.0, sensitivity=1.0, random=random).counts
    assert set(found) == {"correct", "examples"}
    assert all(count.shape == (1,) and count.dtype == np.int64 for count in found.values())


@pytest.mark.parametrize("records", [1, 3])
@pytest.mark.parametrize(
    ("sums", "mean"), [(MANY, [8000, 10_000]), (TEXTS, [8000, 16_000])], ids=["labels", "texts"]
)
def test_the_noise_has_the_multiplier_times_the_sensitivity_on_each_count(
    sums: Sums, mean: list[int], records: int
) -> None:
    draws = np.array([noised(sums, noise=10.0, seed=seed, records=records) for seed in range(2000)])
    # sd: 10 times a unit's records times sqrt(2), and rounding adds 1/12 to the variance
    expected = sqrt(200 * records**2 + 1 / 12)
    np.testing.assert_allclose(draws.mean(axis=0), mean, atol=5 * expected / sqrt(2000))
    np.testing.assert_allclose(draws.std(axis=0), expected, rtol=5 / sqrt(2 * 2000))
    correlation = np.corrcoef(draws.T)[0, 1]
    assert abs(correlation) < 5 / sqrt(2000)  # two draws, not one used twice


def test_little_noise_rounds_to_the_exact_counts() -> None:
    assert noised(MANY, noise=0.01) == (8000, 10_000)
    assert noised(exact([[2, 1, 0], [0, 3, 0], [1, 1, 4]]), noise=0.01) == (9, 12)
    assert noised(written([0.5, 1.0, 0.25, 0.5]), noise=0.01) == (2, 4)  # 2.25 of 4


def test_exact_counts_are_right_answers_or_shares_of_tokens() -> None:
    assert exact_counts(exact([[2, 1, 0], [0, 3, 0], [1, 1, 4]])).tolist() == [9.0, 12.0]
    assert exact_counts(written([0.5, 1.0, 0.25, 0.5])).tolist() == [2.25, 4.0]


def test_whatever_the_noise_the_counts_are_ones_that_can_be() -> None:
    draws = [noised(FEW, noise=30.0, seed=seed) for seed in range(300)]
    assert all(0 <= correct <= examples and examples >= 1 for correct, examples in draws)
    assert {correct == 0 for correct, _ in draws} == {True, False}
    assert min(examples for _, examples in draws) == 1


def cells(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, dtype=np.int64).reshape(2, 2)


def test_one_record_moves_the_counts_by_no_more_than_the_sensitivity() -> None:
    one = np.eye(4, dtype=np.int64)  # a record is one of four cells
    start = cells(5, 3, 2, 7)

    def move(confusion: NDArray[np.int64]) -> float:
        before, after = (exact_counts(exact(c.tolist())) for c in (start, confusion))
        return float(np.linalg.norm(after - before))

    added = [move(start + cells(*record)) for record in one]
    assert max(added) == pytest.approx(sensitivity_of(1))
    replaced = [move(start + cells(*new) - cells(*old)) for old, new in product(one, one)]
    assert max(replaced) == 1.0 <= sensitivity_of(1)


def test_a_unit_of_no_record_is_refused() -> None:
    with pytest.raises(ConfigError, match="records_per_unit must be at least 1, got 0"):
        sensitivity_of(0)


def test_accuracy_is_read_off_noised_counts_and_nothing_more() -> None:
    sums = Sums(counts={"correct": np.array([3]), "examples": np.array([4])})
    assert metrics_of("classification", sums) == {"accuracy": 0.75, "examples": 4.0}
    assert metrics_of("generation", sums) == {"example_accuracy": 0.75, "examples": 4.0}


@pytest.mark.parametrize(
    ("correct", "examples"),
    [([5], [4]), ([-1], [4]), ([0], [0]), ([1], [2**41]), ([], []), ([1, 1], [2, 2])],
    ids=["more-right-than-seen", "negative", "none-seen", "huge", "empty", "two-numbers"],
)
def test_counts_that_cannot_be_are_refused(correct: list[int], examples: list[int]) -> None:
    counts = {"correct": correct, "examples": examples}
    sums = Sums(counts={name: np.array(n, dtype=np.int64) for name, n in counts.items()})
    with pytest.raises(AggregationError, match="noised count"):
        metrics_of("classification", sums)


def test_the_same_seed_gives_the_same_counts_and_a_secret_one_others() -> None:
    assert noised(MANY, noise=50.0, seed=4) == noised(MANY, noise=50.0, seed=4)
    secret = [
        noised_counts(
            MANY, noise_multiplier=50.0, sensitivity=1.0, random=SecureRandom.secret()
        ).counts["correct"][0]
        for _ in range(8)
    ]
    assert any(a != b for a, b in pairwise(secret))
