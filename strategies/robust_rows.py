"""Rows: a round's updates as the matrix that robust rules work on, chunk by chunk."""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from intramural.core.layout import Vector
from intramural.strategies.spool import Spool
from intramural.strategies.threads import in_parts

T = TypeVar("T")
Matrix = NDArray[np.float64]
"""Small, shape `(n, n)` for n sites; never a matrix of updates."""

CHUNK_ELEMENTS = 1 << 18
"""Elements of all rows handled at once: few enough to stay in cache."""
PARTS = 8
"""Parts that the columns are cut into; fixed, so that sums do not depend on the threads."""
BLAS_ALONE_MAX = 1 << 18
"""Multiplications up to which OpenBLAS uses the calling thread alone; its own would fight ours."""
BLOCK_MIN = 512
"""Columns multiplied at once, at least; narrower blocks cost more than they save."""


class Rows:
    """Updates less a centre, mixed: row i is `sum_j mix[i, j] (x_j - centre)`, n rows of sites.

    No rule sees more than a chunk of columns, or the small matrix of the rows' inner products.
    Rows are in order of the sites' names, whatever the order of arrival.
    """

    def __init__(self, spool: Spool, *, centre: Vector | None = None) -> None:
        """Take the rows as they are; `centre`, shape `(size,)`, stands for zeros when absent."""
        self._spool = spool
        self.centre = centre
        self.mix: Matrix | None = None
        """Weights of the sites in each mixed row, shape `(rows, sites)`, each row's sum is 1."""

    def __len__(self) -> int:
        return len(self._spool if self.mix is None else self.mix)

    @cached_property
    def products_of_sites(self) -> Matrix:
        """Inner products of the sites' updates less the centre, in float64, shape `(n, n)`."""
        count = len(self._spool)

        def part(start: int, stop: int) -> Matrix:
            total = np.zeros((count, count))
            for lo, hi, chunk in self._chunks(start, stop, range(count)):
                if self.centre is not None:
                    np.subtract(chunk, self.centre[lo:hi], out=chunk)
                total += chunk @ chunk.T
            return total

        products: Matrix = np.sum(self._in_parts(part), axis=0)
        return products

    @property
    def products(self) -> Matrix:
        """Inner products of the mixed rows, shape `(rows, rows)`; no further pass is needed."""
        products = self.products_of_sites
        return products if self.mix is None else self.mix @ products @ self.mix.T

    def each(self, work: Callable[[NDArray[Any]], NDArray[Any]], out: Vector) -> None:
        """Write `work(columns)`, shape `(columns,)`, of every chunk of mixed columns into `out`.

        `columns`, shape `(rows, columns)`, is float32 as it came, or float64 if it was mixed;
        `work` may overwrite it.
        """
        everyone = range(len(self._spool))

        def part(start: int, stop: int) -> None:
            kind: Any = np.float32 if self.mix is None else np.float64
            mixed = np.empty((0, 0))
            for lo, hi, chunk in self._chunks(start, stop, everyone, kind=kind):
                if self.mix is None:
                    out[lo:hi] = work(chunk)
                    continue
                if mixed.shape != (len(self.mix), hi - lo):
                    mixed = np.empty((len(self.mix), hi - lo))
                _multiply(self.mix, chunk, out=mixed)
                out[lo:hi] = work(mixed)

        assert self.centre is None, "rules by column have no centre"
        self._in_parts(part)

    def combine(self, weights: NDArray[np.float64], out: Vector) -> None:
        """Write `centre + sum_i weights[i] row_i` into `out`; summed in float64."""
        of_sites = weights if self.mix is None else weights @ self.mix
        used = np.flatnonzero(of_sites).tolist()
        factors = of_sites[used]

        def part(start: int, stop: int) -> None:
            for lo, hi, chunk in self._chunks(start, stop, used):
                total = factors @ chunk
                if self.centre is not None:
                    total += (1.0 - factors.sum()) * self.centre[lo:hi]
                out[lo:hi] = total

        self._in_parts(part)

    def _chunks(
        self, start: int, stop: int, rows: Any, *, kind: Any = np.float64
    ) -> Iterator[tuple[int, int, NDArray[Any]]]:
        """Yield columns (from, to, values); the memory of the values is used again."""
        count = len(rows)
        width = max(1, min(CHUNK_ELEMENTS // max(1, count), stop - start))
        raw = np.empty(count * width, dtype=np.float32)
        wide = np.empty(count * width if kind is np.float64 else 0, dtype=np.float64)
        for lo in range(start, stop, width):
            hi = min(lo + width, stop)
            shape, used = (count, hi - lo), count * (hi - lo)
            values = raw[:used].reshape(shape)
            self._spool.read(lo, hi, values, rows=rows)
            if kind is np.float64:
                wide[:used] = raw[:used]
                yield lo, hi, wide[:used].reshape(shape)
            else:
                yield lo, hi, values

    def _in_parts(self, work: Callable[[int, int], T]) -> list[T]:
        """Run `work(start, stop)` on parts of the columns; the results are in the parts' order."""
        size = self._spool.size
        is_small = size * len(self._spool) <= CHUNK_ELEMENTS
        return in_parts(size, 1 if is_small else PARTS, work)


def _multiply(mix: Matrix, chunk: Matrix, *, out: Matrix) -> None:
    """Write `mix @ chunk`, in blocks that BLAS does not share among threads of its own."""
    width = max(BLOCK_MIN, BLAS_ALONE_MAX // mix.size)
    for lo in range(0, chunk.shape[1], width):
        np.matmul(mix, chunk[:, lo : lo + width], out=out[:, lo : lo + width])


def squared_distances(products: Matrix) -> Matrix:
    """Return |x_i - x_j|**2 from the rows' inner products; exactly symmetric, 0 for i = j."""
    norms = np.diagonal(products)
    squares: Matrix = np.maximum(norms[:, None] + norms[None, :] - (products + products.T), 0.0)
    return squares
