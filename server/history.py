"""History: the committed rounds' records in one file that grows by a line a round.

Each checkpoint vouches for the lines up to its round, and no more: what a crash left behind them,
or a run that went back to an older checkpoint, is nobody's. The run's journal tells the same, and
stands in where the file is harmed: one bad byte shall not cost all checkpoints at once.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from intramural.core.canonical import canonical_json, digest_bytes, digest_json
from intramural.core.errors import JournalError
from intramural.core.files import write_atomic
from intramural.core.journal import scan
from intramural.server.commits import JOURNAL, commits_of

HISTORY = "history.jsonl"
"""Name of the file, beside the checkpoints."""
NOTHING: dict[str, Any] = {"records": 0, "bytes": 0, "last": "", "chain": ""}
"""The facts of no record."""

Record = dict[str, Any]


def write_history(
    folder: Path, records: Sequence[Record], *, before: Mapping[str, Any], sync: bool
) -> dict[str, Any]:
    """Have the records in the file, and return the facts that vouch for them.

    Args:
        folder: Of the checkpoints; it is there.
        records: All, oldest first.
        before: Facts of the first of them, which the file holds; else all are written again.
        sync: Have them on disk before returning.

    Raises:
        OSError: The disk refuses; what `before` vouches for is untouched.
    """
    if not _is_held(folder / HISTORY, before, records):
        before = NOTHING
    lines = [_line(record) for record in records[before["records"] :]]
    if not before["records"]:
        write_atomic(folder / HISTORY, *lines, sync=sync)
        return _told(before, lines)
    with open(folder / HISTORY, "r+b") as file:
        file.truncate(before["bytes"])
        file.seek(before["bytes"])
        file.writelines(lines)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    return _told(before, lines)


def read_history(folder: Path, facts: Mapping[str, Any]) -> list[Record]:
    """Return the records that the facts of a checkpoint vouch for.

    Raises:
        OSError, ValueError, KeyError, TypeError: Neither file nor journal is what was written.
    """
    lines = _lines_in(folder / HISTORY, facts)
    if _told(NOTHING, lines) != facts:
        lines = _lines_of(folder.parent / JOURNAL, facts)
        if _told(NOTHING, lines) != facts:
            raise ValueError("digest of the history")
    return [json.loads(line) for line in lines]


def _lines_in(path: Path, facts: Mapping[str, Any]) -> list[bytes]:
    try:
        with open(path, "rb") as file:
            return file.read(facts["bytes"]).splitlines(keepends=True)
    except FileNotFoundError:
        return []


def _lines_of(journal: Path, facts: Mapping[str, Any]) -> list[bytes]:
    """Return the lines as a run's journal tells them; none, if it is not whole either."""
    try:
        standing = commits_of(scan(journal).entries).standing
    except JournalError:
        return []
    bodies = [dict(entry.body) for entry in standing[: facts["records"]]]
    return [_line({k: v for k, v in body.items() if k != "digest"}) for body in bodies]


def _is_held(path: Path, before: Mapping[str, Any], records: Sequence[Record]) -> bool:
    """Return whether the file may hold the first of these records, for which `before` vouches."""
    known = before["records"]
    if not 0 < known <= len(records):
        return False
    last = _line(records[known - 1])
    if digest_bytes(last) != before["last"] or not path.is_file():
        return False
    with open(path, "rb") as file:
        file.seek(before["bytes"] - len(last))
        return file.read(len(last)) == last


def _told(before: Mapping[str, Any], lines: Sequence[bytes]) -> dict[str, Any]:
    """Return the facts once the lines follow."""
    last, chain = before["last"], before["chain"]
    for line in lines:
        last = digest_bytes(line)
        chain = digest_json([chain, last])
    return {
        "records": before["records"] + len(lines),
        "bytes": before["bytes"] + sum(map(len, lines)),
        "last": last,
        "chain": chain,
    }


def _line(record: Record) -> bytes:
    return canonical_json(record) + b"\n"
