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
    """Adds weighted vectors on a grid of `2**-fraction_bits`, exactly, in any order."""

    def __init__(self, size: int, *, fraction_bits: int) -> None:
        """Start at zero.

        Args:
            size: Elements of each vector.
            fraction_bits: The grid is 2**-fraction_bits; each term is off by at most half of it.
        """
        self._sum: NDArray[np.int64] = np.empty(size, dtype=np.int64)  # the first term fills it
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

        def part(start: int, stop: int) -> tuple[float, int, int]:
            """Add until a value does not fit; return a bound of all, the start and the end."""
            scratch, peak = np.empty(min(CHUNK, stop - start), dtype=np.float64), 0.0
            for lo in range(start, stop, CHUNK):
                hi = min(lo + CHUNK, stop)
                reach = _peak_bound(vector[lo:hi]) * factor
                if not reach < limit:  # a NaN is not below it either
                    reach = _peak(vector[lo:hi]) * factor
                    if not reach < limit:
                        return reach, start, lo
                peak = max(peak, reach)
                self._fold(vector, factor, lo, hi, scratch, np.add)
            return peak, start, stop

        done = _in_parts(vector.size, part)
        bad = [reach for reach, _, _ in done if not reach < limit]
        if bad:
            self._take_back(vector, factor, [(start, stop) for _, start, stop in done])
            if not max(bad) < np.inf or any(reach != reach for reach in bad):
                raise AggregationError("update holds a value that is not finite; it was left out")
            raise AggregationError(
                f"update holds a value of magnitude {max(bad) / factor:.3g}, too large to add; "
                "the site's training diverged"
            )
        self._used += max(reach for reach, _, _ in done)
        self.terms += 1

    def _fold(
        self,
        vector: Vector,
        factor: float,
        lo: int,
        hi: int,
        scratch: NDArray[np.float64],
        change: Callable[..., object],
    ) -> None:
        """Add or subtract the bits of one chunk's rounded terms; they wrap, and `mean` knows."""
        term, total = scratch[: hi - lo], self._sum[lo:hi]
        term[:] = vector[lo:hi]
        term *= factor
        if self.terms:
            term += MAGIC
            change(total, term.view(np.int64), out=total)
        else:  # nothing is there yet: the first term is written, so that memory is touched once
            np.add(term, MAGIC, out=total.view(np.float64))

    def _take_back(self, vector: Vector, factor: float, spans: list[tuple[int, int]]) -> None:
        """Subtract what was added before a bad value was met; integers leave no trace."""
        scratch = np.empty(min(CHUNK, vector.size), dtype=np.float64)
        for start, stop in spans if self.terms else []:
            for lo in range(start, stop, CHUNK):
                hi = min(lo + CHUNK, stop)
                self._fold(vector, factor, lo, hi, scratch, np.subtract)

    def mean(self, total_weight: float, *, out: Vector, plus: Vector | None = None) -> None:
        """Write the sum over `total_weight` into `out`, shape `(size,)`, and start at zero again.

        `plus`: added to the rounded mean, in float32; here it takes no pass of its own.

        The sum's memory stays: memory touched for the first time costs as much as adding a vector,
        so a sum is best used again, round after round.
        """
        assert self.terms, "nothing was added"
        total, factor = self._sum, 1.0 / (total_weight * self._grid)
        magic = np.int64((self.terms * MAGIC_BITS + 2**63) % 2**64 - 2**63)

        def part(start: int, stop: int) -> None:
            for lo in range(start, stop, CHUNK):
                whole = total[lo : min(lo + CHUNK, stop)]
                values = whole.view(np.float64)
                whole -= magic
                values[:] = whole  # the same memory: an integer becomes a float in its place
                values *= factor
                written = out[lo : lo + len(values)]
                written[:] = values
                if plus is not None:
                    written += plus[lo : lo + len(values)]

        _in_parts(self.size, part)
        self.terms, self._used = 0, 0.0
