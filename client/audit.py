"""AuditLog: the site's journal of what it was asked and what it sent, shared between processes."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from intramural.core.errors import JournalError
from intramural.core.files import Held, exclusive
from intramural.core.journal import Entry, Journal, utc_now

LOCK_WAIT_S = 10.0


class AuditLog:
    """The audit journal, open in this process while others append to it too.

    Each append holds the lock PATH.lock, as `Approvals` does for its own. The journal is read anew
    only when another process has written since.

    Guarantees:
        When `append` has returned, the entry is on disk, after all that any process wrote before.
        A journal that was cut, replaced or altered while it was open is noticed at the next append,
        and nothing is written to it.
    """

    def __init__(
        self,
        path: Path,
        *,
        now: Callable[[], datetime] = utc_now,
        lock_wait_s: float = LOCK_WAIT_S,
    ) -> None:
        """Open or begin the journal at `path`.

        Raises:
            JournalError: It is broken, or another process holds it.
        """
        self.path = path
        self._now = now
        self._lock_wait_s = lock_wait_s
        self._journal: Journal | None = None
        self._end: tuple[int, ...] = ()
        """How the file looked when this process last left it."""
        with self._locked():
            pass

    @property
    def entries(self) -> Sequence[Entry]:
        """Every entry, as last read."""
        assert self._journal is not None
        return self._journal.entries

    def append(self, kind: str, **body: Any) -> Entry:
        """Write one entry and force it to disk.

        Raises:
            JournalError: The journal is broken or held, or the disk refuses.
        """
        with self._locked() as journal:
            return journal.append(kind, **body)

    def close(self) -> None:
        """Close the file."""
        if self._journal is not None:
            self._journal.close()

    @contextmanager
    def _locked(self) -> Iterator[Journal]:
        lock = self.path.with_name(f"{self.path.name}.lock")
        try:
            with exclusive(lock, wait_s=self._lock_wait_s):
                journal = self._refreshed()
                try:
                    yield journal
                finally:
                    self._end = _end_of(self.path)
        except Held:
            raise JournalError(
                f"{self.path}: another process held it for {self._lock_wait_s:g} s; try again"
            ) from None

    def _refreshed(self) -> Journal:
        """Return the journal, read anew if another process has written."""
        known = self._journal
        if known is not None and _end_of(self.path) == self._end:
            return known
        fresh = Journal(self.path, now=self._now)
        if known is not None:
            count = len(known.entries)
            if [entry.digest for entry in fresh.entries[:count][-1:]] != [known.head][:count]:
                fresh.close()
                raise JournalError(f"{self.path}: was cut or replaced while open; restore it")
            known.close()
        self._journal = fresh
        return fresh


def _end_of(path: Path) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return ()
    return (status.st_ino, status.st_size, status.st_mtime_ns)
