"""Sums add up exactly, and metrics agree with scikit-learn and with arithmetic."""

import math
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from intramural.core.errors import AggregationError, ConfigError, TrainingError
from intramural.core.metrics import (
    LOSS_SCALE,
    Sums,
    add_sums,
    bootstrap_intervals,
    fixed_point,
    metrics_of,
)

K = 4
INT64_MAX = 2**63 - 1


def integers(*values: int) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


def classification(truth: list[int], predicted: list[int], losses: list[float]) -> Sums:
    confusion = np.zeros((K, K), dtype=np.int64)
    np.add.at(confusion, (truth, predicted), 1)
    return Sums(
        counts={
            "confusion": confusion.ravel(),
            "loss": integers(fixed_point(np.array(losses, dtype=np.float64))),
            "examples": integers(len(truth)),
        }
    )


def generation(**changes: int) -> Sums:
    counts = {
        "loss": 5 * LOSS_SCALE,
        "token_loss": 24 * LOSS_SCALE,
        "tokens": 12,
        "correct_tokens": 9,
        "hit_shares": 5 * LOSS_SCALE // 4,
        "examples": 2,
    }
    return Sums(counts={name: integers(count) for name, count in (counts | changes).items()})


labels = st.integers(0, K - 1)
records = st.lists(
    st.tuples(labels, labels, st.floats(0, 1e6), st.integers(0, 4)), min_size=1, max_size=60
)


@given(records)
def test_any_partition_of_the_records_gives_the_pooled_sums_exactly(
    rows: list[tuple[int, int, float, int]],
) -> None:
    def sums(rows: list[tuple[int, int, float, int]]) -> Sums:
        return classification([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows])

    sites = [sums([row for row in rows if row[3] == site]) for site in range(5)]
    assert add_sums(sites) == sums(rows)
    assert add_sums(sites[::-1]) == sums(rows)
    assert metrics_of("classification", add_sums(sites)) == metrics_of("classification", sums(rows))


def test_floating_point_sums_would_depend_on_the_partition() -> None:
    # What fixed_point is for: 0.1 + 0.2 + 0.3 differs by its brackets, the rounded terms do not.
    assert (0.1 + 0.2) + 0.3 != 0.1 + (0.2 + 0.3)
    whole = fixed_point(np.array([0.1, 0.2, 0.3]))
    assert whole == fixed_point(np.array([0.1, 0.2])) + fixed_point(np.array([0.3]))
    assert whole == fixed_point(np.array([0.1])) + fixed_point(np.array([0.2, 0.3]))


@given(st.lists(st.tuples(labels, labels), min_size=1, max_size=60))
def test_classification_metrics_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    truth, predicted = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    metrics = metrics_of("classification", classification(truth, predicted, [0.0] * len(truth)))
    assert metrics["accuracy"] == pytest.approx(accuracy_score(truth, predicted), abs=1e-12)
    expected = f1_score(truth, predicted, average="macro", zero_division=0)
    assert metrics["macro_f1"] == pytest.approx(expected, abs=1e-12)
    # scikit-learn warns about predicted classes that have no truth; ours leaves them out too.
    recalls = [np.mean([p == t for t, p in pairs if t == label]) for label in sorted(set(truth))]
    assert metrics["balanced_accuracy"] == pytest.approx(float(np.mean(recalls)), abs=1e-12)


def test_balanced_accuracy_is_that_of_scikit_learn() -> None:
    truth, predicted = [0, 0, 0, 1, 2, 2], [0, 0, 1, 1, 2, 0]
    metrics = metrics_of("classification", classification(truth, predicted, [0.0] * 6))
    # scikit-learn is the second opinion here: (2/3 + 1 + 1/2) / 3
    assert metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, predicted))


def test_rows_are_the_truth_and_columns_the_prediction() -> None:
    # Truth 0 three times, predicted 0, 1, 1; class 1 is never true, so its recall does not count.
    metrics = metrics_of("classification", classification([0, 0, 0], [0, 1, 1], [0.0] * 3))
    assert metrics["balanced_accuracy"] == pytest.approx(1 / 3)  # the transpose would give 1/2
    # Class 0: 2*1 / (3 + 1); class 1: 0, but it occurs among predictions; (0.5 + 0) / 2.
    assert metrics["macro_f1"] == pytest.approx(0.25)


def test_classification_loss_is_the_mean_over_examples() -> None:
    metrics = metrics_of("classification", classification([0, 1], [0, 1], [0.5, 1.75]))
    assert metrics["loss"] == 1.125  # (0.5 + 1.75) / 2, exact in binary
    assert metrics["examples"] == 2


def test_generation_metrics_by_hand() -> None:
    assert metrics_of("generation", generation()) == {
        "loss": 2.5,  # 5 over 2 examples
        "token_loss": 2.0,  # 24 over 12 tokens
        "perplexity": math.exp(2.0),
        "token_accuracy": 0.75,  # 9 of 12
        "example_accuracy": 0.625,  # 1.25 over 2 examples
        "examples": 2.0,
    }


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40), st.integers(0, 4)), min_size=1))
def test_shares_of_any_partition_add_up_to_the_pooled_mean(
    rows: list[tuple[int, int, int]],
) -> None:
    def sums(rows: list[tuple[int, int, int]]) -> Sums:
        shares = np.array([min(hits, tokens) / tokens for hits, tokens, _ in rows])
        return generation(hit_shares=fixed_point(shares), examples=len(rows))

    sites = [sums([row for row in rows if row[2] == site]) for site in range(5)]
    pooled = metrics_of("generation", sums(rows))["example_accuracy"]
    assert metrics_of("generation", add_sums(sites))["example_accuracy"] == pooled
    # the second opinion is a fraction's; each share is rounded to a multiple of 2**-32
    whole = sum(Fraction(min(hits, tokens), tokens) for hits, tokens, _ in rows) / len(rows)
    assert pooled == pytest.approx(float(whole), abs=2**-33)
    assert 0 <= pooled <= 1


def test_perplexity_stays_finite() -> None:
    metrics = metrics_of("generation", generation(token_loss=20_000 * LOSS_SCALE))
    assert math.isfinite(metrics["perplexity"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_fixed_point_refuses_what_is_not_finite(bad: float) -> None:
    with pytest.raises(TrainingError, match="1 of 2 evaluation losses are not finite"):
        fixed_point(np.array([0.5, bad * LOSS_SCALE]))


def test_fixed_point_refuses_a_sum_beyond_int64() -> None:
    # 2**31 nats are 2**63 units, one more than an int64 holds.
    with pytest.raises(TrainingError, match="diverged"):
        fixed_point(np.array([2.0**30, 2.0**30]))


def test_fixed_point_rounds_each_loss_to_the_nearest_unit() -> None:
    units = np.array([0.75, 0.75, 0.25, 3.0])
    assert fixed_point(units / LOSS_SCALE) == 5  # 1 + 1 + 0 + 3; truncation would give 3


def test_fixed_point_of_nothing_is_zero() -> None:
    assert fixed_point(np.array([], dtype=np.float64)) == 0


@given(st.lists(st.integers(-(2**63), INT64_MAX), min_size=1, max_size=8))
@settings(max_examples=200)
def test_addition_is_exact_or_refused(values: list[int]) -> None:
    parts = [Sums(counts={"loss": integers(value)}) for value in values]
    if -(2**63) <= sum(values) <= INT64_MAX:
        assert int(add_sums(parts).counts["loss"][0]) == sum(values)
    else:
        with pytest.raises(AggregationError, match="does not fit an int64"):
            add_sums(parts)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "no evaluation to add up"),
        ([{"a": integers(1)}, {"b": integers(1)}], "differ in names or shapes"),
        ([{"a": integers(1)}, {"a": integers(1, 2)}], "differ in names or shapes"),
        ([{"a": integers(INT64_MAX)}, {"a": integers(1)}], "does not fit an int64"),
    ],
)
def test_add_sums_refuses(parts: list[dict[str, NDArray[np.int64]]], message: str) -> None:
    with pytest.raises(AggregationError, match=message):
        add_sums([Sums(counts=part) for part in parts])


def test_sums_refuse_what_does_not_add_exactly() -> None:
    with pytest.raises(AggregationError, match="int64"):
        Sums(counts={"loss": np.array([0.5])})
    with pytest.raises(AggregationError, match="one-dimensional"):
        Sums(counts={"confusion": np.zeros((2, 2), dtype=np.int64)})


def test_sums_are_equal_by_content() -> None:
    assert Sums(counts={"a": integers(1, 2)}) == Sums(counts={"a": integers(1, 2)})
    assert Sums(counts={"a": integers(1, 2)}) != Sums(counts={"a": integers(1, 3)})
    assert Sums(counts={"a": integers(1)}) != Sums(counts={"b": integers(1)})


@pytest.mark.parametrize(
    ("sums", "message"),
    [
        (generation(examples=0), "no example was evaluated"),
        (generation(tokens=0, correct_tokens=0), "0 of 0 tokens"),
        (generation(correct_tokens=13), "13 of 12 tokens"),
        (generation(hit_shares=-1), "shares of tokens of 2 examples"),
        (generation(hit_shares=2 * LOSS_SCALE + 1), "shares of tokens of 2 examples"),
        (generation(tokens=-1), "below 0"),
        (generation(examples=2**41), "above 2"),
        (Sums(counts={"loss": integers(1)}), "lack token_loss, tokens"),
        (Sums(counts=generation().counts | {"tokens": integers(1, 1)}), "one number, got 2"),
    ],
)
def test_generation_metrics_refuse(sums: Sums, message: str) -> None:
    with pytest.raises(AggregationError, match=message):
        metrics_of("generation", sums)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"examples": integers(0)}, "no example was evaluated"),
        ({"examples": integers(3)}, "holds 2 examples, the sums say 3"),
        ({"confusion": integers(1, 1, 0)}, "must be square"),
        ({"confusion": integers(3, -1, 0, 0)}, "below 0"),
    ],
)
def test_classification_metrics_refuse(changes: dict[str, NDArray[np.int64]], message: str) -> None:
    counts = classification([0, 1], [0, 1], [0.0, 0.0]).counts | changes
    with pytest.raises(AggregationError, match=message):
        metrics_of("classification", Sums(counts=counts))


def confusion_of(k: int, examples: int) -> NDArray[np.int64]:
    rng = np.random.default_rng(0)
    truth = rng.integers(k, size=examples)
    predicted = np.where(rng.random(examples) < 0.7, truth, rng.integers(k, size=examples))
    matrix = np.zeros((k, k), dtype=np.int64)
    np.add.at(matrix, (truth, predicted), 1)
    return matrix.ravel()


def test_bootstrap_agrees_with_resampling_the_records_one_by_one() -> None:
    confusion = confusion_of(3, 200)
    records = np.repeat(np.arange(9), confusion)
    truth, predicted = records // 3, records % 3
    rng = np.random.default_rng(1)
    f1, accuracy = [], []
    for _ in range(1500):
        drawn = rng.integers(200, size=200)
        matrix = np.bincount(3 * truth[drawn] + predicted[drawn], minlength=9).reshape(3, 3)
        hits = matrix.diagonal()
        accuracy.append(hits.sum() / 200)
        f1.append(np.mean(2 * hits / (matrix.sum(0) + matrix.sum(1))))
    got = bootstrap_intervals(confusion, rng=np.random.default_rng(2), draws=1500)
    # The ends of a 95 % interval from 1500 draws have a standard error near 0.003 here.
    assert got["macro_f1"] == pytest.approx(np.quantile(f1, [0.025, 0.975]), abs=0.015)
    assert got["accuracy"] == pytest.approx(np.quantile(accuracy, [0.025, 0.975]), abs=0.015)


def test_bootstrap_interval_of_accuracy_has_the_binomial_width() -> None:
    # 80 of 100 correct: standard error sqrt(0.8 * 0.2 / 100) = 0.04, so 0.8 +- 1.96 * 0.04.
    low, high = bootstrap_intervals(
        integers(40, 10, 10, 40), rng=np.random.default_rng(0), draws=4000
    )["accuracy"]
    assert (low, high) == pytest.approx((0.72, 0.88), abs=0.015)


def test_bootstrap_repeats_with_the_seed_and_widens_with_the_level() -> None:
    confusion = confusion_of(5, 300)

    def intervals(seed: int, level: float) -> dict[str, tuple[float, float]]:
        return bootstrap_intervals(confusion, rng=np.random.default_rng(seed), level=level)

    assert intervals(3, 0.95) == intervals(3, 0.95)
    assert intervals(3, 0.95) != intervals(4, 0.95)
    wide, narrow = intervals(3, 0.99)["macro_f1"], intervals(3, 0.5)["macro_f1"]
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_bootstrap_of_a_perfect_model_has_no_width() -> None:
    intervals = bootstrap_intervals(integers(7, 0, 0, 3), rng=np.random.default_rng(0))
    assert intervals == {"accuracy": (1.0, 1.0), "macro_f1": (1.0, 1.0)}


def test_bootstrap_of_21_classes_is_fast() -> None:
    confusion = confusion_of(21, 5000)
    seconds = []
    for _ in range(3):  # the best of three, so that a busy machine does not fail the test
        began = time.perf_counter()
        bootstrap_intervals(confusion, rng=np.random.default_rng(0))
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.2


@pytest.mark.parametrize(
    ("confusion", "options", "error"),
    [
        (integers(0, 0, 0, 0), {}, AggregationError),
        (integers(2, -1, 0, 1), {}, AggregationError),
        (integers(1, 2, 3), {}, AggregationError),
        (integers(1, 0, 0, 1), {"draws": 0}, ConfigError),
        (integers(1, 0, 0, 1), {"level": 1.0}, ConfigError),
    ],
)
def test_bootstrap_refuses(
    confusion: NDArray[np.int64], options: dict[str, float], error: type[Exception]
) -> None:
    with pytest.raises(error):
        bootstrap_intervals(confusion, rng=np.random.default_rng(0), **options)  # type: ignore[arg-type]
