"""A sum of many float32 vectors that is the same in every order, in two models of memory.

Floating-point addition depends on order; replies arrive in any order. So every weighted update is
rounded once to a fixed grid and added as 64-bit integers, which is exact. The rounding costs no
integer conversion: adding 1.5 * 2**52 to a float64 leaves the nearest integer in the low bits of
its mantissa (a known trick; see Hecker 1996, "Let's get to the (floating) point"), and those bits
can be added as they are.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from intramural.core.errors import AggregationError
from intramural.core.layout import Vector

T = TypeVar("T")

CHUNK = 1 << 18
"""Elements handled at once: few enough that temporaries stay small, enough to keep threads busy."""
MAGIC = 1.5 * 2.0**52
MAGIC_BITS = int(np.float64(MAGIC).view(np.int64))
TERM_MAX = 2.0**51
"""Bound of one weighted term, in grid units."""
SUM_MAX = 2.0**62
"""Bound of the sum's magnitude, in grid units."""


@cache
def _pool() -> ThreadPoolExecutor:
    """Return the threads that share the chunks; NumPy lets go of the interpreter's lock."""
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="exact-sum")


def _in_parts(size: int, work: Callable[[int, int], T]) -> list[T]:
    """Run `work(start, stop)` on equal parts of `range(size)`, one a thread."""
    parts = (os.cpu_count() or 1) if size > 4 * CHUNK else 1
    edges = [size * i // parts for i in range(parts + 1)]
    if parts == 1:
        return [work(0, size)]
    return list(_pool().map(work, edges[:-1], edges[1:]))


def largest(vector: Vector) -> float:
    """Return the largest magnitude in the vector; NaN if it holds one; 0 if it is empty."""

    def part(start: int, stop: int) -> float:
        found = 0.0
        for lo in range(start, stop, CHUNK):
            chunk = vector[lo : min(lo + CHUNK, stop)]
            peak = float(np.maximum(chunk.max(), -chunk.min()))
            found = peak if not peak <= found else found  # a NaN replaces, and then stays
            if found != found:
                return found
        return found

    return float(np.max(_in_parts(vector.size, part)))  # np.max hands a NaN on


class ExactSum:
    """Adds weighted vectors on a grid of `2**-fraction_bits`, exactly, in any order."""

    def __init__(self, size: int, *, fraction_bits: int) -> None:
        """Start at zero.

        Args:
            size: Elements of each vector.
            fraction_bits: The grid is 2**-fraction_bits; each term is off by at most half of it.
        """
        self._sum: NDArray[np.int64] = np.zeros(size, dtype=np.int64)
        self._grid = 2.0**fraction_bits
        self._used = 0.0
        self.terms = 0

    def room_for(self, vector: Vector, weight: float) -> float:
        """Return the largest magnitude of the weighted vector, in grid units.

        Raises:
            AggregationError: It is not finite, or too large to be added exactly.
        """
        reach = largest(vector) * weight * self._grid
        if not reach < np.inf:
            raise AggregationError("update holds a value that is not finite; it was left out")
        if reach >= TERM_MAX or self._used + reach >= SUM_MAX:
            raise AggregationError(
                f"update holds a value of magnitude {reach / weight / self._grid:.3g}, too large "
                "to add; the site's training diverged"
            )
        return reach

    def add(self, vector: Vector, weight: float) -> None:
        """Add `weight * vector`; nothing is changed when an error is raised.

        Raises:
            AggregationError: As `room_for`.
        """
        self._used += self.room_for(vector, weight)
        factor, total = weight * self._grid, self._sum

        def part(start: int, stop: int) -> None:
            scratch = np.empty(min(CHUNK, stop - start), dtype=np.float64)
            for lo in range(start, stop, CHUNK):
                hi = min(lo + CHUNK, stop)
                term = scratch[: hi - lo]
                np.multiply(vector[lo:hi], factor, out=term, dtype=np.float64)
                term += MAGIC
                total[lo:hi] += term.view(np.int64)  # wraps; `mean` takes the magic's bits back

        _in_parts(len(total), part)
        self.terms += 1

    def mean(self, total_weight: float) -> Vector:
        """Return the sum over `total_weight` as float32; the sum is used up.

        The result is written over the sum's own memory, so that no further model is allocated.
        """
        total, factor = self._sum, 1.0 / (total_weight * self._grid)
        self._sum = np.zeros(0, dtype=np.int64)
        magic = np.int64((self.terms * MAGIC_BITS + 2**63) % 2**64 - 2**63)
        packed: Vector = total.view(np.float32)[: len(total)]
        scratch = np.empty(min(CHUNK, len(total)), dtype=np.float64)
        for lo in range(0, len(total), CHUNK):
            hi = min(lo + CHUNK, len(total))
            total[lo:hi] -= magic
            values = scratch[: hi - lo]
            np.multiply(total[lo:hi], factor, out=values)
            packed[lo:hi] = values  # lies at or before the place just read
        return packed
