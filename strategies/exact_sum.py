"""A sum of many float32 vectors that is the same in every order, in two models of memory.

Floating-point addition depends on order; replies arrive in any order. So every weighted update is
rounded once to a fixed grid and added as 64-bit integers, which is exact. The rounding costs no
integer conversion: adding 1.5 * 2**52 to a float64 leaves the nearest integer in the low bits of
its mantissa (a known trick; see Hecker 1996, "Let's get to the (floating) point"), and those bits
can be added as they are.
"""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from intramural.core.errors import AggregationError
from intramural.core.layout import Vector
from intramural.strategies.threads import CHUNK, in_parts, thread_count

T = TypeVar("T")

MAGIC = 1.5 * 2.0**52
MAGIC_BITS = int(np.float64(MAGIC).view(np.int64))
TERM_MAX = 2.0**51
"""Bound of one weighted term, in grid units."""
SUM_MAX = 2.0**62
"""Bound of the sum's magnitude, in grid units."""
WAITING_BYTES = 1 << 28
"""Largest vector of which one may wait to be folded in with the next."""


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
    """Return a bound of the terms' magnitudes: a quick one, or the least if that is not below.

    NaN if a value is, and then only if `limit` is not infinite.
    """

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

    return float(np.max(_in_parts(vector.size, part)))  # np.max hands a NaN on


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

    Vectors are folded in two at a time, where they are small enough for one to wait: the sum, twice
    as large as either, then goes through memory half as often. So a vector that was added must not
    change until the next but one is added, or the mean is written.
    """

    def __init__(self, size: int, *, fraction_bits: int) -> None:
        """Start at zero.

        Args:
            size: Elements of each vector.
            fraction_bits: The grid is 2**-fraction_bits; each term is off by at most half of it.
        """
        self._sum: NDArray[np.int64] = np.empty(size, dtype=np.int64)  # the first term fills it
        self._waiting: list[tuple[Vector, float]] = []
        """Terms not folded in yet, with their factors."""
        self._waiting_max = 1 if 4 * size <= WAITING_BYTES else 0
        self._grid = 2.0**fraction_bits
        self._used = 0.0
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
        self._used += reach
        self.terms += 1
        self._waiting.append((vector, factor))
        if len(self._waiting) > self._waiting_max:
            self._fold_waiting()

    def _fold_waiting(self) -> None:
        def part(start: int, stop: int) -> None:
            scratch = np.empty(min(CHUNK, stop - start), dtype=np.float64)
            for lo in range(start, stop, CHUNK):
                self._fold(lo, min(lo + CHUNK, stop), scratch)

        _in_parts(self.size, part)
        self._waiting.clear()

    def _fold(self, lo: int, hi: int, scratch: NDArray[np.float64]) -> NDArray[np.int64]:
        """Add the bits of one chunk of what waits; return the sum there.

        Bits wrap, and `mean` knows.
        """
        term, total = scratch[: hi - lo], self._sum[lo:hi]
        is_empty = self.terms == len(self._waiting)
        for vector, factor in self._waiting:
            term[:] = vector[lo:hi]
            term *= factor
            if is_empty:  # the first term is written, so that memory is touched once
                np.add(term, MAGIC, out=total.view(np.float64))
                is_empty = False
            else:
                term += MAGIC
                np.add(total, term.view(np.int64), out=total)
        return total

    def mean(self, total_weight: float, *, out: Vector, plus: Vector | None = None) -> None:
        """Write the sum over `total_weight` into `out`, shape `(size,)`, and start at zero again.

        `plus`: added to the rounded mean, in float32; here it takes no pass of its own.

        The sum's memory stays: memory touched for the first time costs as much as adding a vector,
        so a sum is best used again, round after round.
        """
        assert self.terms, "nothing was added"
        factor = 1.0 / (total_weight * self._grid)
        magic = np.int64((self.terms * MAGIC_BITS + 2**63) % 2**64 - 2**63)

        def part(start: int, stop: int) -> None:
            scratch = np.empty(min(CHUNK, stop - start), dtype=np.float64)
            for lo in range(start, stop, CHUNK):
                hi = min(lo + CHUNK, stop)
                whole, values = self._fold(lo, hi, scratch), scratch[: hi - lo]
                units = values.view(np.int64)
                np.subtract(whole, magic, out=units)
                values[:] = units  # the same memory: an integer becomes a float in its place
                values *= factor
                written = out[lo:hi]
                written[:] = values
                if plus is not None:
                    written += plus[lo:hi]

        _in_parts(self.size, part)
        self._waiting.clear()
        self.terms, self._used = 0, 0.0
