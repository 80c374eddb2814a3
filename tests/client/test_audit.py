"""AuditLog: several writers, one chain; and what was cut or replaced meanwhile is noticed."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from intramural.client.approval import Approvals
from intramural.client.audit import AuditLog
from intramural.core.errors import JournalError
from intramural.core.files import exclusive
from intramural.core.journal import Journal, scan
from intramural.core.site import SitePolicy

NOON = datetime(2025, 1, 1, 12, tzinfo=UTC)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[AuditLog]:
    opened = AuditLog(tmp_path / "state" / "journal.jsonl", now=lambda: NOON, lock_wait_s=5.0)
    yield opened
    opened.close()


@contextmanager
def others(path: Path) -> Iterator[Journal]:
    """Open the journal as another process does for an entry."""
    with exclusive(path.with_name("journal.jsonl.lock"), wait_s=5.0):
        journal = Journal(path)
        yield journal
        journal.close()


def kinds(path: Path) -> list[str]:
    return [entry.kind for entry in scan(path).entries]


def test_an_entry_is_on_disk_when_append_returns(log: AuditLog) -> None:
    entry = log.append("sent", bytes=3)
    assert scan(log.path).entries == (entry,)
    assert (entry.time, entry.body) == ("2025-01-01T12:00:00.000+00:00", {"bytes": 3})


def test_entries_of_the_command_line_are_taken_up(log: AuditLog) -> None:
    log.append("sent")
    for kind in ("approved", "refused-by-people"):
        with others(log.path) as journal:
            journal.append(kind)
        log.append("sent")
    assert kinds(log.path) == ["sent", "approved", "sent", "refused-by-people", "sent"]
    assert [entry.kind for entry in log.entries] == kinds(log.path)


def test_two_writers_at_once_keep_one_chain(log: AuditLog) -> None:
    def write() -> None:
        for _ in range(40):
            with others(log.path) as journal:
                journal.append("approval")

    other = threading.Thread(target=write)
    other.start()
    for _ in range(40):
        log.append("sent")
    other.join()
    assert sorted(kinds(log.path)) == ["approval"] * 40 + ["sent"] * 40


def test_the_lock_is_the_one_that_approvals_hold(tmp_path: Path, log: AuditLog) -> None:
    impatient = AuditLog(log.path, lock_wait_s=0.0)
    store = Approvals(tmp_path / "state", policy=SitePolicy(), journal=log.path)
    with store._locked(), pytest.raises(JournalError, match="another process held it"):
        impatient.append("sent")
    impatient.append("sent")
    impatient.close()


def test_the_journal_is_read_anew_only_when_somebody_else_wrote(
    log: AuditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []

    def noted(path: Path) -> object:
        reads.append(path)
        return scan(path)

    log.append("sent")
    monkeypatch.setattr("intramural.core.journal.scan", noted)
    for _ in range(3):
        log.append("sent")
    assert reads == []
    with others(log.path) as journal:
        journal.append("approved")
    log.append("sent")
    log.append("sent")
    assert len(reads) == 2  # the other's reading, and one of ours


def test_another_s_torn_entry_is_dropped(log: AuditLog) -> None:
    log.append("sent")
    with open(log.path, "ab") as file:
        file.write(b'{"body":{"k"')  # a process was killed as it wrote
    log.append("sent")
    assert kinds(log.path) == ["sent", "sent"]


def cut(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def altered(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"n":1', b'"n":7'))


def replaced(path: Path) -> None:
    other = AuditLog(path.with_name("other.jsonl"))
    for number in range(4):
        other.append("sent", n=10 + number)
    other.close()
    shutil.move(other.path, path)


@pytest.mark.parametrize("spoil", [cut, altered, replaced, Path.unlink])
def test_what_was_spoiled_meanwhile_is_noticed_and_not_written_to(
    log: AuditLog, spoil: object
) -> None:
    for number in range(3):
        log.append("sent", n=number)
    assert callable(spoil)
    spoil(log.path)
    content = log.path.read_bytes() if log.path.exists() else b""
    for _ in range(2):
        with pytest.raises(JournalError, match="restore it"):
            log.append("sent")
    assert log.path.read_bytes() == content


def test_a_broken_journal_is_not_opened(log: AuditLog) -> None:
    for number in range(3):
        log.append("sent", n=number)
    altered(log.path)
    with pytest.raises(JournalError, match="entry 1 was altered"):
        AuditLog(log.path)


def test_a_journal_that_is_held_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with exclusive(tmp_path / "journal.jsonl.lock"), pytest.raises(JournalError, match="held it"):
        AuditLog(path, lock_wait_s=0.05)
