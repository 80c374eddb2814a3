"""Journal: no change before the last record goes unnoticed, and no crash breaks it."""

import errno
import hashlib
import json
import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from intramural.core.errors import JournalError
from intramural.core.journal import GENESIS, Journal, scan


def clock() -> Callable[[], datetime]:
    """Return a clock that gains a second a look."""
    start = datetime(2024, 2, 29, 23, 59, 59, 500_000, tzinfo=UTC)
    ticks = iter(range(10**6))
    return lambda: start + timedelta(seconds=next(ticks))


def written(folder: Path, entries: int = 4) -> Path:
    path = folder / "journal.jsonl"
    journal = Journal(path, now=clock())
    for number in range(entries):
        journal.append("step", number=number, note="é")
    journal.close()
    return path


def test_each_line_is_canonical_json_chained_by_sha256(tmp_path: Path) -> None:
    lines = written(tmp_path).read_bytes().splitlines()
    previous = "sha256:" + "0" * 64
    for seq, line in enumerate(lines):
        value = json.loads(line)
        digest = value.pop("digest")
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert digest == "sha256:" + hashlib.sha256(text.encode()).hexdigest()
        assert (value["seq"], value["previous"]) == (seq, previous)
        previous = digest
    assert json.loads(lines[1])["time"] == "2024-03-01T00:00:00.500+00:00"
    assert len(lines) == 4


def test_a_reopened_journal_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = written(tmp_path)
    journal = Journal(path, now=clock())
    head = journal.head
    entry = journal.append("finished", rounds=4)
    journal.close()
    assert (entry.seq, entry.previous) == (4, head)
    assert [e.kind for e in scan(path).entries] == ["step"] * 4 + ["finished"]


def test_an_empty_and_a_missing_journal_are_whole(tmp_path: Path) -> None:
    assert scan(tmp_path / "none").entries == ()
    journal = Journal(tmp_path / "deep" / "journal.jsonl")
    assert (journal.head, journal.entries) == (GENESIS, [])
    journal.close()
    assert scan(journal.path).sound_bytes == 0


@pytest.mark.parametrize(
    "body",
    [
        {"by_number": {1: "a", 10: "b", 2: "c"}},  # numbers sort otherwise than their text
        {"pair": (1, 2), "deep": {"list": [{"z": 1, "a": None}]}},
        {"numbers": [1e22, -0.0, 5e-324, 2**70, 0.1]},
        {"text": '\u2028 \x00 \\ " \n é 🏥'},
        {},
    ],
)
def test_whatever_was_appended_reads_back_as_json_says_it(
    tmp_path: Path, body: dict[str, Any]
) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    entry = journal.append("x", **body)
    journal.close()
    assert scan(journal.path).entries == (entry,)
    assert entry.body == json.loads(json.dumps(body))


@pytest.mark.parametrize("body", [{"loss": float("nan")}, {"loss": [float("inf")]}, {"a": {1}}])
def test_what_json_cannot_say_is_refused_and_nothing_is_written(
    tmp_path: Path, body: dict[str, Any]
) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    with pytest.raises((ValueError, TypeError)):
        journal.append("x", **body)
    assert journal.path.read_bytes() == b""
    journal.append("y")
    journal.close()
    assert [entry.kind for entry in scan(journal.path).entries] == ["y"]


def test_a_flipped_bit_anywhere_is_noticed_and_the_entry_named(tmp_path: Path) -> None:
    path = written(tmp_path, entries=3)
    content = path.read_bytes()
    for place in range(len(content) - 1):  # the last newline is the torn record's case
        seq = content[:place].count(b"\n")
        for bit in (0, 3, 6):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(JournalError, match=f"entry {seq} "):
                scan(path)


def dropped(lines: list[bytes]) -> list[bytes]:
    return lines[:1] + lines[2:]


def first_dropped(lines: list[bytes]) -> list[bytes]:
    return lines[1:]


def swapped(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[2], lines[1], lines[3]]


def doubled(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1], lines[1], *lines[2:]]


def blank(lines: list[bytes]) -> list[bytes]:
    return [lines[0], b"\n", *lines[1:]]


def cut_in_the_middle(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1][:20] + b"\n", *lines[2:]]


def rewritten(lines: list[bytes]) -> list[bytes]:
    """Change entry 1 and give it a fresh digest: the next one then does not follow."""
    value = json.loads(lines[1])
    value["body"]["number"] = 99
    del value["digest"]
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    value["digest"] = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    return [lines[0], json.dumps(value, ensure_ascii=False).encode() + b"\n", *lines[2:]]


def extra_field(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1].replace(b'{"body"', b'{"x":1,"body"', 1), *lines[2:]]


@pytest.mark.parametrize(
    ("damage", "first_bad"),
    [
        (dropped, 1),
        (first_dropped, 0),
        (swapped, 1),
        (doubled, 2),
        (blank, 1),
        (cut_in_the_middle, 1),
        (rewritten, 2),
        (extra_field, 1),
    ],
)
def test_damage_is_noticed_and_the_first_bad_entry_named(
    tmp_path: Path, damage: Callable[[list[bytes]], list[bytes]], first_bad: int
) -> None:
    path = written(tmp_path)
    path.write_bytes(b"".join(damage(path.read_bytes().splitlines(keepends=True))))
    before = path.read_bytes()
    with pytest.raises(JournalError, match=f"entry {first_bad} "):
        Journal(path)
    assert path.read_bytes() == before  # a broken journal is evidence, and is left alone


def test_a_record_torn_at_any_byte_is_dropped_and_appended_to(tmp_path: Path) -> None:
    path = written(tmp_path, entries=2)
    content = path.read_bytes()
    start = content.index(b"\n") + 1
    for end in range(start, len(content) - 1):
        path.write_bytes(content[:end])
        assert scan(path).sound_bytes == start
        journal = Journal(path, now=clock())
        journal.append("after", end=end)
        journal.close()
        entries = scan(path).entries
        assert [(e.seq, e.kind) for e in entries] == [(0, "step"), (1, "after")]


def test_a_whole_record_without_its_line_s_end_is_kept(tmp_path: Path) -> None:
    path = written(tmp_path, entries=2)  # an editor or a copy took the last byte
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert [e.seq for e in scan(path).entries] == [0, 1]
    journal = Journal(path, now=clock())
    assert path.read_bytes() == content
    journal.append("after")
    journal.close()
    assert [e.kind for e in scan(path).entries] == ["step", "step", "after"]


@pytest.mark.parametrize("content", [b"no journal at all", b'{"some": "json"}', b"\n"])
def test_a_file_that_is_no_journal_is_refused_and_left_alone(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(content)
    with pytest.raises(JournalError, match="entry 0 is not a journal entry"):
        Journal(path)
    assert path.read_bytes() == content


def failing_fsync(_: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def disk_of(size_bytes: int) -> Iterator[None]:
    """Let no file grow beyond a size; a write over the edge is first cut short, then refused."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_journal_as_it_was_and_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path)
    before = path.read_bytes()
    journal = Journal(path, now=clock())
    head = journal.head
    with disk_of(len(before) + 30), pytest.raises(JournalError, match=r"cannot write.*free space"):
        journal.append("lost")
    assert path.read_bytes() == before
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing_fsync)
        with pytest.raises(JournalError, match="No space left on device; free space"):
            journal.append("lost")
    assert path.read_bytes() == before
    assert (journal.head, len(journal.entries)) == (head, 4)
    journal.append("kept")
    journal.close()
    assert [e.kind for e in scan(path).entries] == ["step"] * 4 + ["kept"]


def test_an_entry_is_synced_before_append_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    on_disk: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda _: on_disk.append(journal.path.read_bytes()))
    journal.append("x")
    journal.close()
    assert len(on_disk) == 1
    assert on_disk[0] == journal.path.read_bytes() != b""


@pytest.mark.parametrize("entries", [0, 2])
def test_a_journals_folder_is_synced_once_its_file_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: int
) -> None:
    # or a power cut could take a new journal's name, and with it every entry that was synced
    if entries:
        written(tmp_path, entries=entries)
    synced: list[tuple[int, list[str]]] = []

    def noted(descriptor: int) -> None:
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            synced.append((found.st_ino, os.listdir(descriptor)))

    monkeypatch.setattr(os, "fsync", noted)
    Journal(tmp_path / "journal.jsonl").close()
    assert (tmp_path.stat().st_ino, ["journal.jsonl"]) in synced
