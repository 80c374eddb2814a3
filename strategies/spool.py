"""Spool: a round's updates set aside until all are there, in a file without a name."""

import os
import tempfile
import weakref
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from intramural.core.errors import RoundError
from intramural.core.layout import Vector

MEMORY_BYTES_MAX = 64 << 20
"""Updates of a round lie in memory up to so many bytes in all; then all of them go to the file."""


class Spool:
    """A matrix of float32 rows, one a site, written row by row and read column by column.

    The file lies in the operating system's folder for temporary files (TMPDIR moves it), can be
    read by this process's owner alone, and has no name: it is gone once the spool is, or the
    process, however that ends. Reading is safe from many threads at once.
    """

    def __init__(self, size: int, *, memory_bytes_max: int = MEMORY_BYTES_MAX) -> None:
        """Make an empty spool for rows of `size` elements."""
        self.size = size
        self._memory_bytes_max = memory_bytes_max
        self._places: dict[str, int] = {}
        """Number of each site's row, in order of arrival."""
        self._order: list[int] = []
        """The same, in order of the sites' names."""
        self._held: list[Vector] = []
        """The rows, while they lie in memory."""
        self._file: int | None = None

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, site: str) -> bool:
        return site in self._places

    @property
    def is_on_disk(self) -> bool:
        """Whether the rows lie in the file."""
        return self._file is not None

    @property
    def sites(self) -> list[str]:
        """Names of the rows in the order in which they are read: sorted, not as they came."""
        return sorted(self._places)

    def add(self, site: str, row: Vector) -> None:
        """Set a site's row aside; the spool is as before when an error is raised.

        Raises:
            RoundError: The file cannot be written.
        """
        assert row.shape == (self.size,), row.shape
        assert site not in self._places, "a site has one row"
        if self._file is None and 4 * self.size * (len(self) + 1) <= self._memory_bytes_max:
            self._held.append(row.astype(np.float32))
        else:
            self._write(row)
        self._places[site] = len(self._places)
        self._order = [self._places[name] for name in self.sites]

    def read(self, lo: int, hi: int, out: NDArray[np.float32], *, rows: Sequence[int]) -> None:
        """Copy columns `lo` to `hi` of some rows into `out`, shape `(len(rows), hi - lo)`.

        Args:
            lo: First column.
            hi: Column after the last.
            out: Whose rows are contiguous.
            rows: Numbers of the wanted rows in the order of `sites`.
        """
        for target, row in zip(out, rows, strict=True):
            place = self._order[row]
            if self._file is None:
                target[:] = self._held[place][lo:hi]
                continue
            view, at = memoryview(target).cast("B"), 4 * (place * self.size + lo)
            while view:
                count = os.preadv(self._file, [view], at)
                assert count, "the file is as long as what was written"
                view, at = view[count:], at + count

    def _write(self, row: Vector) -> None:
        try:
            if self._file is None:
                file = _nameless_file()
                weakref.finalize(self, os.close, file)
                for place, held in enumerate(self._held):
                    _write_all(file, held, 4 * self.size * place)
                self._file, self._held = file, []
            _write_all(self._file, row, 4 * self.size * len(self))
        except OSError as error:
            needed = 4 * self.size * (len(self) + 1) / 1e9
            raise RoundError(
                f"a round's updates cannot be set aside in {tempfile.gettempdir()} "
                f"({error.strerror}); free at least {needed:.1f} GB there, or set TMPDIR"
            ) from None


def _nameless_file() -> int:
    """Return the descriptor of an open file that no folder lists."""
    with tempfile.TemporaryFile(buffering=0) as file:
        return os.dup(file.fileno())


def _write_all(file: int, row: Vector, at: int) -> None:
    view = np.ascontiguousarray(row, dtype=np.float32).data.cast("B")
    while view:
        count = os.pwrite(file, view, at)
        view, at = view[count:], at + count
