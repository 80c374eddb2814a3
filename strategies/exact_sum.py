"""A sum of many float32 vectors that is the same in every order, in two models of memory.

Floating-point addition depends on order; replies arrive in any order. So every weighted update is
rounded once to a fixed grid and added as 64-bit integers, which is exact. The rounding costs no
integer conversion: adding 1.5 * 2**52 to a float64 leaves the nearest integer in the low bits of
its mantissa (a known trick; see Hecker 1996, "Let's get to the (floating) point"), and those bits
can be added as they are.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from intramural.core.errors import AggregationError
from intramural.core.layout import Vector
from intramural.core.threads import beside
from intramural.strategies.threads import CHUNK, in_parts, thread_count

T = TypeVar("T")

MAGIC = 1.5 * 2.0**52
MAGIC_BITS = int(np.float64(MAGIC).view(np.int64))
TERM_MAX = 2.0**51
"""Bound of one weighted term, in grid units."""
SUM_MAX = 2.0**62
"""Bound of the sum's magnitude, in grid units."""
BESIDE_MIN, BESIDE_MAX = 1 << 21, 1 << 28
"""Bytes of a vector that is folded in beside what the caller does next: a smaller one takes less
time than to tell a thread, a larger one shall not be kept for longer than it must."""


def _in_parts(size: int, work: Callable[[int, int], T]) -> list[T]:
    """Run `work(start, stop)` on equal parts of `range(size)`, one a thread."""
    return in_parts(size, thread_count() if size > 4 * CHUNK else 1, work)


def _peak(chunk: Vector) -> float:
    """Return the largest magnitude in a chunk; NaN if it holds one."""
    return float(np.maximum(chunk.max(), -chunk.min()))


def _peak_bound(chunk: Vector) -> float:
    """Return no less than the largest magnitude, in one pass where `_peak` takes two.

    A sum of squares, however its terms are ordered, rounds to no less than its largest term,
    because rounding is monotone. The two margins are for the rounding of squares, and for squares
    that underflow. It is not finite if a value is not, and may be infinite if a value is large.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.sqrt(np.dot(chunk, chunk))) * (1 + 2.0**-20) + 2.0**-60


def _reach(vector: Vector, factor: float, limit: float) -> float:
    """Return a bound of the terms' magnitudes, or one that is not below the limit; maybe a NaN."""
    if 0 < vector.size <= CHUNK:  # in cache a second pass takes less than the bound's overhead
        return _peak(vector) * factor

    def part(start: int, stop: int) -> float:
        found = 0.0
        for lo in range(start, stop, CHUNK):
            chunk = vector[lo : min(lo + CHUNK, stop)]
            reach = _peak_bound(chunk) * factor
            if not reach < limit:  # a NaN is not below it either
                reach = _peak(chunk) * factor
                if not reach < limit:
                    return reach
            found = max(found, reach)
        return found

    parts = _in_parts(vector.size, part)
    return next((reach for reach in parts if not reach < limit), max(parts))


def largest(vector: Vector) -> float:
    """Return the largest magnitude in the vector; NaN if it holds one; 0 if it is empty."""

    def part(start: int, stop: int) -> float:
        found = 0.0
        for lo in range(start, stop, CHUNK):
            peak = _peak(vector[lo : min(lo + CHUNK, stop)])
            found = peak if not peak <= found else found  # a NaN replaces, and then stays
            if found != found:
                return found
        return found

    return float(np.max(_in_parts(vector.size, part)))  # np.max hands a NaN on


class ExactSum:
    """Adds weighted vectors on a grid of `2**-fraction_bits`, exactly, in any order.

    A vector of middling size is folded in beside what the caller does next. So what was added must
    not change until the next one is added, or the mean is written.
    """

    def __init__(self, size: int, *, fraction_bits: int) -> None:
        """Start at zero.

        Args:
            size: Elements of each vector.
            fraction_bits: The grid is 2**-fraction_bits; each term is off by at most half of it.
        """
        self._sum: NDArray[np.int64] = np.empty(size, dtype=np.int64)  # the first term fills it
        self._grid = 2.0**fraction_bits
        self._used = 0.0
        self._last: _Folding | None = None
        self.size = size
        self.terms = 0

    def add(self, vector: Vector, weight: float) -> None:
        """Add `weight * vector`; nothing is changed when an error is raised.

        Raises:
            AggregationError: A value is not finite, or too large to be added exactly.
        """
        assert vector.shape == self._sum.shape, "the wire lets no other vector through"
        factor = weight * self._grid
        limit = min(TERM_MAX, SUM_MAX - self._used)
        reach = _reach(vector, factor, limit)
        if not reach < limit:  # a NaN is not below it either
            if not reach < np.inf:
                raise AggregationError("update holds a value that is not finite; it was left out")
            raise AggregationError(
                f"update holds a value of magnitude {reach / factor:.3g}, too large to add; "
                "the site's training diverged"
            )
        self.settle()
        folding = _Folding(self._sum, vector, factor, is_first=not self.terms)
        self._used += reach
        self.terms += 1
        if BESIDE_MIN <= vector.nbytes <= BESIDE_MAX:
            self._last = folding
            folding.begin()
        else:
            _in_parts(self.size, folding.fold)

    def settle(self) -> None:
        """Have all that was added in the sum, and let go of it."""
        last, self._last = self._last, None
        if last is not None and (folded := last.stop()) < self.size:
            left = self.size - folded  # for all threads: now somebody waits
            _in_parts(left, lambda start, stop: last.fold(folded + start, folded + stop))

    def mean(self, total_weight: float, *, out: Vector, plus: Vector | None = None) -> None:
        """Write the sum over `total_weight` into `out`, shape `(size,)`, and start at zero again.

        `plus`: added to the rounded mean, in float32; here it takes no pass of its own.

        The sum's memory stays: memory touched for the first time costs as much as adding a vector,
        so a sum is best used again, round after round.
        """
        assert self.terms, "nothing was added"
        last, self._last = self._last, None
        folded = self.size if last is None else last.stop()
        factor = 1.0 / (total_weight * self._grid)
        magic = np.int64((self.terms * MAGIC_BITS + 2**63) % 2**64 - 2**63)

        def part(start: int, stop: int) -> None:
            scratch = np.empty(min(CHUNK, stop - start), dtype=np.float64)
            for lo in range(start, stop, CHUNK):
                hi = min(lo + CHUNK, stop)
                if last is not None and hi > folded:  # the sum is then read once for both
                    last.fold(max(lo, folded), hi, scratch)
                values = scratch[: hi - lo]
                units = values.view(np.int64)
                np.subtract(self._sum[lo:hi], magic, out=units)
                values[:] = units  # the same memory: an integer becomes a float in its place
                values *= factor
                written = out[lo:hi]
                written[:] = values
                if plus is not None:
                    written += plus[lo:hi]

        _in_parts(self.size, part)
        self.terms, self._used = 0, 0.0


class _Folding:
    """One term on its way into the sum, in parts; in a thread of its own if it `begin`s."""

    def __init__(
        self, total: NDArray[np.int64], vector: Vector, factor: float, *, is_first: bool
    ) -> None:
        self._total = total
        self._vector = vector
        self._factor = factor
        self._is_first = is_first
        """Nothing is in the sum yet: its memory holds anything."""
        self._folded = 0
        self._is_stopped = False
        self._run: threading.Thread | None = None

    def fold(self, start: int, stop: int, scratch: NDArray[np.float64] | None = None) -> None:
        """Add the bits of these rounded terms; they wrap, and `mean` knows."""
        if scratch is None:
            scratch = np.empty(min(CHUNK, stop - start), dtype=np.float64)
        for lo in range(start, stop, CHUNK):
            hi = min(lo + CHUNK, stop)
            term, total = scratch[: hi - lo], self._total[lo:hi]
            term[:] = self._vector[lo:hi]
            term *= self._factor
            if self._is_first:  # the first term is written, so that memory is touched once
                np.add(term, MAGIC, out=total.view(np.float64))
            else:
                term += MAGIC
                np.add(total, term.view(np.int64), out=total)

    def begin(self) -> None:
        """Fold it all, beside what the caller does."""
        # one thread: more would take processors from whoever trains here
        self._run = beside(self._fold_all)

    def _fold_all(self) -> None:
        with suppress(MemoryError):  # whoever folds the rest meets it, too
            self._fold_until_stopped()

    def _fold_until_stopped(self) -> None:
        size = self._vector.size
        scratch = np.empty(min(CHUNK, size), dtype=np.float64)
        while self._folded < size and not self._is_stopped:
            stop = min(self._folded + CHUNK, size)
            self.fold(self._folded, stop, scratch)
            self._folded = stop
        if self._folded == size:
            self._vector = np.empty(0, dtype=np.float32)  # somebody may wait for its memory

    def stop(self) -> int:
        """Fold no further; return how many elements are in the sum, from the first."""
        assert self._run is not None
        self._is_stopped = True
        self._run.join()
        return self._folded
