"""Journal: an append-only, hash-chained record of what happened, one JSON object a line."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from intramural.core.canonical import canonical_json, digest_json
from intramural.core.errors import JournalError
from intramural.core.files import make_folder, sync_folder

GENESIS = "sha256:" + "0" * 64
BEGINNING = b'{"body":'
"""What an entry's line begins with, for keys are written in order."""


class Entry(BaseModel):
    """One line of a journal."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    seq: int
    """Position, from 0, without gaps."""
    time: str
    """When it was written: ISO 8601, UTC."""
    kind: str
    """What happened, such as 'committed'."""
    body: dict[str, Any]
    """The facts; never a record's content."""
    previous: str
    """Digest of the entry before; zeros for the first."""
    digest: str
    """Digest of all the fields above."""

    def expected_digest(self) -> str:
        """Return the digest that the other fields imply."""
        return digest_json(self.model_dump(exclude={"digest"}))


def utc_now() -> datetime:
    """Return the time, as journals write it unless told otherwise."""
    return datetime.now(UTC)


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What reading a journal file found."""

    entries: tuple[Entry, ...]
    sound_bytes: int
    """Length of the part that is whole; what follows is a torn last record."""
    unended: bool
    """The last entry is whole and lacks its line's end alone."""


def scan(path: Path) -> Scan:
    """Read and verify a journal; a torn last record is left out, anything else is an error.

    Raises:
        JournalError: An entry is altered, missing or out of order; the first bad one is named.
    """
    entries: list[Entry] = []
    previous, sound_bytes, unended = GENESIS, 0, False
    for line in _lines(path):
        seq, unended = len(entries), not line.endswith(b"\n")
        try:
            entry = Entry.model_validate_json(line)
        except ValidationError:
            if unended and line.startswith(BEGINNING[: len(line)]):
                unended = False
                break  # a crash in the middle of a write; its effect never happened
            raise JournalError(f"{path}: entry {seq} is not a journal entry; restore it") from None
        if entry.seq != seq or entry.previous != previous:
            raise JournalError(f"{path}: entry {seq} does not follow the one before; restore it")
        if entry.digest != entry.expected_digest():
            raise JournalError(f"{path}: entry {seq} was altered; restore it from a copy")
        entries.append(entry)
        previous, sound_bytes = entry.digest, sound_bytes + len(line)
    return Scan(entries=tuple(entries), sound_bytes=sound_bytes, unended=unended)


def _lines(path: Path) -> Iterator[bytes]:
    if path.is_file():
        with open(path, "rb") as file:
            yield from file


class Journal:
    """An open journal. Each `append` is on disk before it returns.

    Guarantees:
        Entries before the last cannot be changed, removed or reordered without `scan` noticing.
        A journal cut at a record boundary looks whole: compare its head with a copy of the head
        kept elsewhere to notice that.
    """

    def __init__(
        self, path: Path, *, now: Callable[[], datetime] = utc_now, sync: bool = True
    ) -> None:
        """Open or create the journal at `path`, dropping a torn last record.

        Without `sync` an entry is the system's before `append` returns, and the disk's some time
        later: a process that is killed loses nothing, a power cut may lose the last entries.

        Raises:
            JournalError: The journal on disk is broken, see `scan`; or the disk refuses.
        """
        self.path = path
        self._now = now
        self._sync = sync
        self._torn: int | None = None
        """Where an append began that is not whole."""
        try:
            make_folder(path.parent)
            found = scan(path)
            self.entries = list(found.entries)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (lives as long as this does)
            try:
                self._file.truncate(found.sound_bytes)
                if found.unended:
                    self._write(b"\n")
                sync_folder(path.parent)
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise _unwritable(path, error) from error

    @property
    def head(self) -> str:
        """Digest of the last entry; zeros when empty."""
        return self.entries[-1].digest if self.entries else GENESIS

    def append(self, kind: str, **body: Any) -> Entry:
        """Write one entry and force it to disk.

        Raises:
            JournalError: The disk refused; what was written of the entry is taken back.
        """
        fields = {
            "seq": len(self.entries),
            "time": self._now().isoformat(timespec="milliseconds"),
            "kind": kind,
            "body": json.loads(canonical_json(body)),  # as it will be read: keys are text
            "previous": self.head,
        }
        entry = Entry(**fields, digest=digest_json(fields))
        try:
            self._take_back()
            self._torn = os.fstat(self._file.fileno()).st_size
            self._write(canonical_json(entry.model_dump()) + b"\n")
        except OSError as error:
            with suppress(OSError):  # then the next append does it, before it writes
                self._take_back()
            raise _unwritable(self.path, error) from error
        self._torn = None
        self.entries.append(entry)
        return entry

    def _take_back(self) -> None:
        """Cut off what a failed append left."""
        if self._torn is not None:
            self._file.truncate(self._torn)
            self._torn = None

    def _write(self, line: bytes) -> None:
        view = memoryview(line)
        while view:
            view = view[self._file.write(view) :]
        if self._sync:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _unwritable(path: Path, error: OSError) -> JournalError:
    return JournalError(f"{path}: cannot write: {error.strerror}; free space")
