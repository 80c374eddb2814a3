"""Evaluation sums that add up across sites, and the metrics read off them.

A site evaluates its own records and reports integers alone: a confusion matrix, counts of
examples and tokens, and losses in fixed point. Integers add exactly and in any order, so the sums
of a federation are the sums over the pooled records, bit for bit, and so are the metrics. A mean
of the sites' F1 scores would be neither.

Sums of a classification task, with k labels:
    confusion     (k*k,)  row-major; row = true class, column = predicted class
    loss          (1,)    per-example losses, times LOSS_SCALE
    examples      (1,)

Sums of a generation task:
    loss          (1,)    per-example means over the response's tokens, times LOSS_SCALE
    token_loss    (1,)    per-token losses, times LOSS_SCALE
    tokens        (1,)    response tokens
    correct_tokens (1,)   response tokens the model ranks first
    hit_shares    (1,)    per-example shares of response tokens ranked first, times LOSS_SCALE
    examples      (1,)

Under [privacy] there are two noised counts in their place: correct (1,), of records, which for a
generation adds up their shares of tokens ranked first; and examples (1,).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from intramural.core.errors import AggregationError, ConfigError, TrainingError

TaskKind = Literal["classification", "generation"]

LOSS_SCALE: Final = 2**32
"""Fixed-point losses count multiples of 1 / LOSS_SCALE nat; an int64 holds sums up to 2**31."""

COUNT_MAX: Final = 2**40
"""Above this a count is not plausible; below it, no sum or product of counts here can wrap."""

INT64_MAX: Final = 2**63 - 1
LOW_BITS: Final = 0xFFFF_FFFF

SUMS_OF: Final[dict[TaskKind, tuple[str, ...]]] = {
    "classification": ("confusion", "loss", "examples"),
    "generation": ("loss", "token_loss", "tokens", "correct_tokens", "hit_shares", "examples"),
}
FIXED_POINT: Final = frozenset({"loss", "token_loss", "hit_shares"})
"""Sums in multiples of 1 / LOSS_SCALE, which are no counts."""

NOISED_SUMS: Final = ("correct", "examples")
"""What a site sends under [privacy], if it sends metrics at all."""

PERSONAL: Final = "personal_"
"""First part of the names of what the site's own model did on the same records, with [personal]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sums:
    """One evaluation as sums over records; equal when names, shapes and numbers are."""

    counts: dict[str, NDArray[np.int64]]
    """Int64, one-dimensional, by name; the module's docstring lists the names of each task."""

    def __post_init__(self) -> None:
        """Refuse anything but one-dimensional int64, whose addition is exact and order-free.

        Raises:
            AggregationError: An array has another dtype or number of dimensions.
        """
        for name, count in self.counts.items():
            if count.dtype != np.int64 or count.ndim != 1:
                raise AggregationError(
                    f"evaluation sum {name!r} must be one-dimensional int64,"
                    f" got {count.ndim}-dimensional {count.dtype}"
                )

    def __eq__(self, other: object) -> bool:
        """Compare by content; the generated method would ask an array for its truth value."""
        if not isinstance(other, Sums):
            return NotImplemented
        return self.counts.keys() == other.counts.keys() and all(
            np.array_equal(count, other.counts[name]) for name, count in self.counts.items()
        )

    __hash__ = None  # type: ignore[assignment]  # arrays can change, so no hash may depend on them


def with_personal(sums: Sums, own: Sums) -> Sums:
    """Return the federation's model's sums with those of the site's own model beside them."""
    return Sums(counts=sums.counts | {PERSONAL + name: c for name, c in own.counts.items()})


def personal_of(sums: Sums) -> Sums | None:
    """Return the sums of the site's own model, or None: they are not there."""
    own = {n.removeprefix(PERSONAL): c for n, c in sums.counts.items() if n.startswith(PERSONAL)}
    return Sums(counts=own) if own else None


def fixed_point(losses: NDArray[np.float64]) -> int:
    """Return the sum of per-example losses, or shares, as a whole number of 1 / LOSS_SCALE.

    Each loss is rounded before summing. That, and not a smaller error, is the point: rounded terms
    are integers, so a federation and a pool of the same losses end at the same sum whatever the
    partition, where floating-point sums would differ in the last bits.

    Args:
        losses: Any shape, nats. Empty gives 0.

    Raises:
        TrainingError: A loss is not finite, or the sum does not fit an int64.
    """
    with np.errstate(over="ignore"):  # a huge loss becomes infinite here and is refused below
        scaled = np.rint(np.asarray(losses, dtype=np.float64) * LOSS_SCALE)
    num_bad = int(np.count_nonzero(~np.isfinite(scaled)))
    if num_bad:
        raise TrainingError(
            f"{num_bad} of {scaled.size} evaluation losses are not finite;"
            " lower the learning rate or clip gradients"
        )
    total = sum(map(int, scaled.ravel().tolist()))
    if abs(total) > INT64_MAX:
        raise TrainingError(
            f"the evaluation losses of {scaled.size} examples sum to more than 2**31;"
            " the model has diverged, lower the learning rate"
        )
    return total


def add_sums(parts: Sequence[Sums]) -> Sums:
    """Return the sums over all parts together: exact, and the same in any order.

    Args:
        parts: At least one, fewer than 2**31; all with the same names and shapes.

    Raises:
        AggregationError: No part, names or shapes differ, or a total does not fit an int64.
    """
    if not parts:
        raise AggregationError("no evaluation to add up; wait for at least one site's reply")
    shapes = {name: count.shape for name, count in parts[0].counts.items()}
    for part in parts:
        got = {name: count.shape for name, count in part.counts.items()}
        if got != shapes:
            raise AggregationError(
                f"evaluation sums differ in names or shapes: expected {shapes}, got {got};"
                " every site must evaluate the same task with the same labels"
            )
    return Sums(counts={name: _add(name, [part.counts[name] for part in parts]) for name in shapes})


def _add(name: str, counts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Add int64 arrays of one shape; refuse a total outside int64, whatever the order.

    NumPy wraps silently. The high and the low 32 bits are therefore summed apart, where neither
    can overflow, so that a wrapped intermediate can neither hide nor cause a refusal.
    """
    stack = np.stack(counts)
    high: NDArray[np.int64] = (stack >> 32).sum(axis=0)
    low: NDArray[np.int64] = (stack & LOW_BITS).sum(axis=0)
    high += low >> 32
    if np.any(high < -(2**31)) or np.any(high >= 2**31):
        raise AggregationError(
            f"evaluation sum {name!r} does not fit an int64; a site's counts are not plausible"
        )
    return np.asarray((high << 32) | (low & LOW_BITS), dtype=np.int64)


def metrics_of(kind: TaskKind, sums: Sums) -> dict[str, float]:
    """Return the metrics of one task from its sums.

    Classification: accuracy; macro_f1, the mean of F1 over the classes that occur in the truth or
    in the predictions; balanced_accuracy, the mean of recall over the classes that occur in the
    truth; loss, the mean over examples; examples.

    Generation: loss, the mean over examples; token_loss, the mean over tokens; perplexity,
    exp(token_loss), capped at exp(709) because a report cannot hold an infinity; token_accuracy;
    example_accuracy, the mean over examples of the share of tokens ranked first; examples.

    From noised counts: accuracy, of a generation example_accuracy, and examples; nothing else.

    Args:
        kind: The task the sums belong to.
        sums: As the module's docstring lists them for that task.

    Raises:
        AggregationError: A sum is missing or misshapen, a count is negative or above
            COUNT_MAX, counts contradict each other, or there is nothing to divide by (no example,
            no token).

    Source: macro F1 as sklearn.metrics.f1_score(average="macro", zero_division=0).
    """
    if set(sums.counts) == set(NOISED_SUMS):
        return _noised_metrics(kind, sums)
    _require_sums(kind, sums)
    examples = int(sums.counts["examples"][0])
    if examples == 0:
        raise AggregationError("no example was evaluated; give the sites a larger evaluation split")
    loss = int(sums.counts["loss"][0]) / (LOSS_SCALE * examples)
    if kind == "classification":
        matrix = square(sums.counts["confusion"])
        total = int(matrix.sum())
        if total != examples:
            raise AggregationError(
                f"the confusion matrix holds {total} examples, the sums say {examples}"
            )
        truth = matrix.sum(axis=1)
        recall = matrix.diagonal()[truth > 0] / truth[truth > 0]
        return {
            "accuracy": float(_accuracy(matrix)),
            "macro_f1": float(_macro_f1(matrix)),
            "balanced_accuracy": float(recall.mean()),
            "loss": loss,
            "examples": float(examples),
        }
    return {"loss": loss, "examples": float(examples)} | _token_metrics(sums, examples)


def _token_metrics(sums: Sums, examples: int) -> dict[str, float]:
    """Return what a generation's sums say of tokens."""
    tokens, correct = (int(sums.counts[name][0]) for name in ("tokens", "correct_tokens"))
    if tokens == 0 or correct > tokens:
        raise AggregationError(f"{correct} of {tokens} tokens correct: no token, or too many")
    shares = int(sums.counts["hit_shares"][0])
    if not 0 <= shares <= LOSS_SCALE * examples:
        raise AggregationError(f"shares of tokens of {examples} examples are below 0 or above 1")
    token_loss = int(sums.counts["token_loss"][0]) / (LOSS_SCALE * tokens)
    return {
        "token_loss": token_loss,
        "perplexity": math.exp(min(token_loss, 709.0)),
        "token_accuracy": correct / tokens,
        "example_accuracy": shares / (LOSS_SCALE * examples),
    }


def _noised_metrics(kind: TaskKind, sums: Sums) -> dict[str, float]:
    if any(sums.counts[name].shape != (1,) for name in NOISED_SUMS):
        raise AggregationError("a noised count must hold one number")
    right, seen = (int(sums.counts[name][0]) for name in NOISED_SUMS)
    if not 0 <= right <= seen <= COUNT_MAX or seen == 0:
        raise AggregationError(f"noised counts say {right} right of {seen}")
    name = "accuracy" if kind == "classification" else "example_accuracy"
    return {name: right / seen, "examples": float(seen)}


def _require_sums(kind: TaskKind, sums: Sums) -> None:
    """Raise AggregationError unless the sums are those of `kind`, with plausible counts."""
    missing = [name for name in SUMS_OF[kind] if name not in sums.counts]
    if missing:
        raise AggregationError(f"evaluation sums of a {kind} task lack {', '.join(missing)}")
    for name in SUMS_OF[kind]:
        count = sums.counts[name]
        if name != "confusion" and count.shape != (1,):
            raise AggregationError(
                f"evaluation sum {name!r} must hold one number, got {count.size}"
            )
        if name not in FIXED_POINT and np.any((count < 0) | (count > COUNT_MAX)):
            raise AggregationError(f"evaluation sum {name!r} holds a count below 0 or above 2**40")


def square(confusion: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a flat (k*k,) or square (k, k) confusion matrix as (k, k).

    Raises:
        AggregationError: Its size is not a square number above 0.
    """
    side = math.isqrt(confusion.size)
    if side == 0 or side * side != confusion.size:
        raise AggregationError(f"a confusion matrix must be square, got {confusion.size} cells")
    return confusion.reshape(side, side)


def _accuracy(matrices: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the share on the diagonal; (..., k, k) -> (...)."""
    correct = np.trace(matrices, axis1=-2, axis2=-1)
    share: NDArray[np.float64] = correct / matrices.sum(axis=(-2, -1))
    return share


def _macro_f1(matrices: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the mean F1 over classes in truth or predictions; (..., k, k) -> (...)."""
    hits = np.diagonal(matrices, axis1=-2, axis2=-1)
    # F1 = 2 TP / (2 TP + FP + FN), and the divisor is the true plus the predicted of the class.
    occurrences = matrices.sum(axis=-1) + matrices.sum(axis=-2)
    f1 = 2 * hits / np.maximum(occurrences, 1)
    mean: NDArray[np.float64] = f1.sum(axis=-1) / np.count_nonzero(occurrences, axis=-1)
    return mean


def bootstrap_intervals(
    confusion: NDArray[np.int64],
    *,
    rng: np.random.Generator,
    draws: int = 1000,
    level: float = 0.95,
) -> dict[str, tuple[float, float]]:
    """Return percentile bootstrap intervals of accuracy and macro_f1.

    The bootstrap resamples the n test records with replacement. Both metrics see a record only as
    its cell (true, predicted), and n records drawn with replacement fall into the cells as one
    multinomial draw of n with the observed shares. So the matrix alone gives the very same
    distribution, and neither records nor predictions need to leave a site.

    The model is held fixed: an interval says how much a different test sample would move the
    number, not how much a different training run would. Records are treated as independent; where
    several come from one person, the truth is somewhat less certain than the interval.

    Args:
        confusion: (k*k,) row-major or (k, k); row = true class, column = predicted class.
        rng: Decides the draws; the same state gives the same intervals.
        draws: Bootstrap samples, at least 1; 1000 fix the ends to about a tenth of their width.
        level: Coverage, between 0 and 1.

    Returns:
        For "accuracy" and "macro_f1", the lower and the upper end.

    Raises:
        AggregationError: No example, a negative count, or not a square matrix.
        ConfigError: `draws` or `level` out of range.

    Source: Efron 1979, Bootstrap Methods: Another Look at the Jackknife, Annals of Statistics 7(1).
    """
    if draws < 1 or not 0 < level < 1:
        raise ConfigError(f"draws must be at least 1, level inside (0, 1), got {draws}, {level!r}")
    matrix = square(confusion)
    total = int(matrix.sum())
    if total == 0 or np.any(matrix < 0):
        raise AggregationError("a bootstrap needs at least one example and no negative count")
    # Empty cells stay empty in every draw; leaving them out makes 21 classes ten times faster.
    occupied = np.flatnonzero(matrix)
    samples = np.zeros((draws, matrix.size), dtype=np.int64)
    samples[:, occupied] = rng.multinomial(total, matrix.flat[occupied] / total, size=draws)
    resampled = samples.reshape(draws, *matrix.shape)
    tail = (1 - level) / 2
    intervals: dict[str, tuple[float, float]] = {}
    for name, metric in (("accuracy", _accuracy), ("macro_f1", _macro_f1)):
        low, high = np.quantile(metric(resampled), [tail, 1 - tail])
        intervals[name] = (float(low), float(high))
    return intervals
