"""Bad ledgers, disks, clocks and neighbours: each a clear error, nothing lost or under-counted."""

import errno
import fcntl
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from intramural.core.errors import LedgerError
from intramural.core.journal import Journal, scan, utc_now
from intramural.privacy.book import read_book
from tests.privacy.ledgers import START, charge, clock, opened

DELTA = 1e-5


def charged(path: Path, *, charges: int = 3) -> Path:
    """Write a ledger of some charges, each costing 2.0."""
    ledger = opened(path)
    for round_ in range(1, charges + 1):
        ledger.charge(charge(round=round_), epsilon_lifetime=None, delta=DELTA)
    return path


@pytest.mark.parametrize(
    ("changes", "named"), [({"site": "mercy"}, "site"), ({"data": "x"}, "set")]
)
def test_a_ledger_of_another_site_or_data_set_is_refused(
    tmp_path: Path, changes: dict[str, str], named: str
) -> None:
    path = charged(tmp_path / "ledger.jsonl")
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=rf"^ledger\.jsonl: opened for another .*{named}.* than"):
        opened(path, **changes)
    assert path.read_bytes() == before


def test_a_journal_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl", now=clock())
    journal.append("committed", round=1)
    journal.close()
    for read in (opened, read_book):
        with pytest.raises(LedgerError, match="entry 0 opens no privacy ledger"):
            read(journal.path)
    with pytest.raises(LedgerError, match=r"none\.jsonl: no such ledger; a site writes it"):
        read_book(tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


def without(lines: list[bytes], seq: int) -> list[bytes]:
    return lines[:seq] + lines[seq + 1 :]


def cheaper(lines: list[bytes], seq: int) -> list[bytes]:
    return [*lines[:seq], lines[seq].replace(b'"steps":20', b'"steps":10'), *lines[seq + 1 :]]


def swapped(lines: list[bytes], seq: int) -> list[bytes]:
    return [*lines[:seq], lines[seq + 1], lines[seq], *lines[seq + 2 :]]


@pytest.mark.parametrize("damage", [without, cheaper, swapped])
@pytest.mark.parametrize("seq", [1, 2])
def test_damage_names_the_first_bad_entry_and_charges_nothing(
    tmp_path: Path, damage: Callable[[list[bytes], int], list[bytes]], seq: int
) -> None:
    path = charged(tmp_path / "ledger.jsonl")
    ledger = opened(path)  # open before the damage, it notices as well
    path.write_bytes(b"".join(damage(path.read_bytes().splitlines(keepends=True), seq)))
    before = path.read_bytes()
    for touch in (lambda: opened(path), lambda: ledger.settle(1, outcome="done")):
        with pytest.raises(LedgerError, match=rf"^ledger\.jsonl: entry {seq} "):
            touch()
    with pytest.raises(LedgerError, match=rf"entry {seq} "):
        ledger.charge(charge(), epsilon_lifetime=None, delta=DELTA)
    assert path.read_bytes() == before
    assert ledger.epsilon(DELTA) == 6.0


def test_a_record_torn_at_any_byte_is_left_out_and_the_next_charge_follows(tmp_path: Path) -> None:
    path = charged(tmp_path / "ledger.jsonl", charges=2)
    content = path.read_bytes()
    start = content[:-1].rindex(b"\n") + 1
    for end in range(start, len(content), 17):
        path.write_bytes(content[:end])
        assert len(read_book(path).charges) == 1  # read by others while it is written
        ledger = opened(path)
        assert ledger.epsilon(DELTA) == 2.0
        assert ledger.charge(charge(), epsilon_lifetime=None, delta=DELTA) == 2
        assert opened(path).epsilon(DELTA) == 4.0


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("refunded", {"charge": 1}),
        ("charged", {"steps": 20}),
        ("charged", charge().model_dump(mode="json") | {"clipper": "new"}),
        ("charged", charge().model_dump(mode="json") | {"noise_multiplier": 0.0}),
        ("settled", {"charge": 1, "outcome": "refund"}),
        ("settled", {"charge": "1", "outcome": "done"}),
        ("opened", {"site": "st-elsewhere", "data": "notes", "format": 1, "ledger": "0"}),
    ],
)
def test_an_entry_of_a_later_version_is_an_error_and_not_skipped(
    tmp_path: Path, kind: str, body: dict[str, Any]
) -> None:
    path = charged(tmp_path / "ledger.jsonl", charges=1)
    journal = Journal(path, now=clock(start=START + timedelta(hours=1)))
    journal.append(kind, **body)
    journal.close()
    for read in (opened, read_book):
        with pytest.raises(LedgerError, match=rf"entry 2 \('{kind}'\) cannot be read by this"):
            read(path)


def test_a_later_format_is_an_error(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "ledger.jsonl", now=clock())
    journal.append("opened", site="st-elsewhere", data="notes", format=2, ledger="0")
    journal.close()
    with pytest.raises(LedgerError, match=r"entry 0 \('opened'\) cannot be read by this version"):
        opened(journal.path)


def test_a_clock_set_back_a_little_writes_the_last_time(tmp_path: Path) -> None:
    path = charged(tmp_path / "ledger.jsonl", charges=1)
    last = scan(path).entries[-1].time
    back = START + timedelta(minutes=1) - timedelta(minutes=5)
    ledger = opened(path, now=lambda: back)
    ledger.charge(charge(), epsilon_lifetime=None, delta=DELTA)
    assert scan(path).entries[-1].time == last
    ledger = opened(path, now=lambda: START + timedelta(days=1))
    ledger.charge(charge(), epsilon_lifetime=None, delta=DELTA)
    assert scan(path).entries[-1].time > last


def test_a_clock_set_back_far_charges_nothing_and_says_by_how_much(tmp_path: Path) -> None:
    path = charged(tmp_path / "ledger.jsonl", charges=1)
    before = path.read_bytes()
    back = START + timedelta(minutes=1) - timedelta(minutes=5, seconds=1)
    ledger = opened(path, now=lambda: back)  # to read is allowed
    with pytest.raises(LedgerError, match=r"clock is 0:05:01 behind the last entry, .*T09:01:00"):
        ledger.charge(charge(), epsilon_lifetime=None, delta=DELTA)
    assert path.read_bytes() == before
    assert ledger.epsilon(DELTA) == 2.0


@contextmanager
def disk_of(size_bytes: int) -> Iterator[None]:
    """Let no file grow beyond a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full(_: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_charges_nothing_and_the_ledger_goes_on_once_there_is_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = charged(tmp_path / "ledger.jsonl", charges=1)
    before = path.read_bytes()
    ledger = opened(path)
    with disk_of(len(before) + 60), pytest.raises(LedgerError, match=r"cannot write.*free space"):
        ledger.charge(charge(), epsilon_lifetime=None, delta=DELTA)
    assert path.read_bytes() == before
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(LedgerError, match=r"^ledger\.jsonl: .*No space left.*free space"):
            ledger.charge(charge(), epsilon_lifetime=None, delta=DELTA)
        with pytest.raises(LedgerError, match=r"^new\.jsonl: .*No space left.*free space"):
            opened(tmp_path / "new.jsonl")
    assert path.read_bytes() == before
    assert ledger.epsilon(DELTA) == opened(path).epsilon(DELTA) == 2.0
    assert ledger.charge(charge(), epsilon_lifetime=None, delta=DELTA) == 2


def test_a_folder_that_cannot_be_written_is_named_without_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        LedgerError, match=r"^ledger\.jsonl: .*; check the ledger's folder"
    ) as found:
        opened(tmp_path / "file" / "ledger.jsonl")
    assert str(tmp_path) not in str(found.value)


def test_a_held_lock_is_waited_for_and_then_an_error(tmp_path: Path) -> None:
    path = charged(tmp_path / "ledger.jsonl")
    before = path.read_bytes()
    ledger = opened(path, lock_wait_s=0.1)
    with open(f"{path}.lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        started = time.monotonic()
        with pytest.raises(LedgerError, match=r"another process holds it for 0\.1 s already"):
            ledger.charge(charge(), epsilon_lifetime=None, delta=DELTA)
        assert time.monotonic() - started >= 0.1
        assert path.read_bytes() == before
    assert ledger.charge(charge(), epsilon_lifetime=None, delta=DELTA) == 4


TWO_SITES = """
import os, sys
from pathlib import Path
from intramural.core.errors import BudgetExhausted
from intramural.core.journal import utc_now
from tests.privacy.ledgers import charge, opened
first = os.fork()
ledger = opened(Path(sys.argv[1]), now=utc_now, lock_wait_s=20.0)
refused = 0
for round_ in range(1, 11):
    try:
        place = ledger.charge(charge(round=round_), epsilon_lifetime=30.0, delta=1e-5)
        ledger.settle(place, outcome="done")
    except BudgetExhausted:
        refused += 1
if first == 0:
    os._exit(refused)
print(refused + os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]))
"""


def test_processes_side_by_side_lose_no_charge(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", TWO_SITES, str(path)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        check=True,
    )
    assert int(done.stdout) == 5  # of twenty charges of 2.0, fifteen fit in 30.0
    book = read_book(path)
    assert (len(book.charges), len(book.outcomes)) == (15, 15)
    assert opened(path, now=utc_now).epsilon(DELTA) == 30.0


def older(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def removed(path: Path) -> None:
    path.unlink()


def begun_anew(path: Path) -> None:
    path.unlink()
    path.with_name(f"{path.name}.lock").unlink()
    charged(path)


@pytest.mark.parametrize("roll_back", [older, begun_anew])
def test_a_rollback_is_noticed_while_open_and_by_a_head_kept_elsewhere(
    tmp_path: Path, roll_back: Callable[[Path], None]
) -> None:
    path = charged(tmp_path / "ledger.jsonl")
    ledger = opened(path)
    head = ledger.head
    roll_back(path)
    found = path.read_bytes() if path.exists() else b""
    for _ in range(2):  # and it does not get used to it
        with pytest.raises(LedgerError, match=r"is not in its chain.*rolled back or exchanged"):
            ledger.charge(charge(), epsilon_lifetime=None, delta=DELTA)
        assert path.read_bytes() == found  # what is there is evidence
    assert ledger.epsilon(DELTA) == 6.0
    with pytest.raises(LedgerError, match="restore the newest copy"):
        opened(path).check_head(head)


@pytest.mark.parametrize("roll_back", [emptied, removed])
def test_a_ledger_that_is_gone_is_not_begun_anew(
    tmp_path: Path, roll_back: Callable[[Path], None]
) -> None:
    path = charged(tmp_path / "ledger.jsonl")
    kept, ledger = path.read_bytes(), opened(path)
    roll_back(path)
    with pytest.raises(LedgerError, match="rolled back or exchanged"):
        ledger.charge(charge(), epsilon_lifetime=None, delta=DELTA)
    for _ in range(2):
        with pytest.raises(LedgerError, match=r"was here.*and is gone or exchanged; restore"):
            opened(path)
    assert path.stat().st_size == 0
    path.write_bytes(kept)
    assert opened(path).epsilon(DELTA) == 6.0


def test_a_ledger_in_the_place_of_another_is_refused(tmp_path: Path) -> None:
    path, other = charged(tmp_path / "ledger.jsonl"), charged(tmp_path / "other.jsonl")
    path.write_bytes(other.read_bytes())
    with pytest.raises(LedgerError, match="is gone or exchanged"):
        opened(path)


def test_two_heads_that_are_known_do_not_tell_how_long_the_work_took(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    told: list[object] = []
    nonces: list[str] = []
    for _ in range(2):
        path.unlink(missing_ok=True)
        path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
        ledger = opened(path)  # by the same clock
        place = ledger.charge(charge(), epsilon_lifetime=None, delta=DELTA)
        ledger.settle(place, outcome="done")
        entry = json.loads(path.read_text().splitlines()[-1])
        nonces.append(entry["body"].pop("nonce"))
        told.append([entry[key] for key in ("seq", "time", "kind", "body")])
    assert told[0] == told[1]
    assert nonces[0] != nonces[1]
    assert len(bytes.fromhex(nonces[0])) == 16


def test_no_error_holds_more_of_a_ledger_than_places(tmp_path: Path) -> None:
    path = charged(tmp_path / "ledger.jsonl", charges=1)
    entry = json.loads(path.read_text().splitlines()[0])
    with pytest.raises(LedgerError) as found:
        opened(path, data="other")
    assert entry["body"]["data"] not in str(found.value)
    assert entry["body"]["ledger"] not in str(found.value)
