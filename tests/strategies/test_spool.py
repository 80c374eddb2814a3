"""The spool: rows come back as they were, by name, from memory or from a file without a name."""

import gc
import os
import stat
import tempfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from intramural.core.errors import RoundError
from intramural.strategies.spool import Spool

ROWS = {name: np.arange(7, dtype=np.float32) + 10 * i for i, name in enumerate("dacb")}
IN_ORDER = np.array([ROWS[name] for name in "abcd"])


def spool_of(*, memory_bytes_max: int) -> Spool:
    spool = Spool(7, memory_bytes_max=memory_bytes_max)
    for name, row in ROWS.items():
        spool.add(name, row)
    return spool


def columns(spool: Spool, lo: int, hi: int, rows: list[int]) -> NDArray[np.float32]:
    out = np.full((len(rows), hi - lo), np.nan, np.float32)
    spool.read(lo, hi, out, rows=rows)
    return out


# a row is 28 bytes: none, two and all of the four fit
@pytest.mark.parametrize(("memory", "on_disk"), [(0, True), (2 * 28, True), (4 * 28, False)])
def test_rows_come_back_in_order_of_names(memory: int, on_disk: bool) -> None:
    spool = spool_of(memory_bytes_max=memory)
    assert spool.is_on_disk == on_disk
    assert (spool.sites, len(spool)) == (list("abcd"), 4)
    assert "a" in spool
    assert "e" not in spool
    assert columns(spool, 0, 7, [0, 1, 2, 3]).tolist() == IN_ORDER.tolist()
    assert columns(spool, 2, 5, [3, 1]).tolist() == IN_ORDER[[3, 1], 2:5].tolist()


def test_a_row_in_memory_is_a_copy() -> None:
    spool, row = Spool(2), np.array([1, 2], np.float32)
    spool.add("a", row)
    row[:] = 9
    assert columns(spool, 0, 2, [0]).tolist() == [[1, 2]]


def test_the_file_has_no_name_no_other_reader_and_ends_with_the_spool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spool = spool_of(memory_bytes_max=0)
    file = spool._file
    assert file is not None
    facts = os.fstat(file)
    assert (facts.st_nlink, stat.S_IMODE(facts.st_mode)) == (0, 0o600)
    assert facts.st_size == 4 * 28
    assert facts.st_dev == tmp_path.stat().st_dev
    assert list(tmp_path.iterdir()) == []
    del spool
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)


def test_pieces_that_the_system_takes_or_gives_singly_make_whole_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, view, at: write(file, view[:5], at))
    monkeypatch.setattr(os, "preadv", lambda file, views, at: read(file, [views[0][:3]], at))
    spool = spool_of(memory_bytes_max=28)
    assert columns(spool, 0, 7, [0, 1, 2, 3]).tolist() == IN_ORDER.tolist()


def test_no_room_ends_the_rounds_and_leaves_the_spool_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    spool = Spool(7, memory_bytes_max=28)
    spool.add("a", ROWS["a"])
    with pytest.raises(RoundError, match=r"set aside in .*gone \(No such file.*set TMPDIR"):
        spool.add("b", ROWS["b"])
    assert spool.sites == ["a"]
    assert columns(spool, 0, 7, [0]).tolist() == [ROWS["a"].tolist()]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spool.add("b", ROWS["b"])
    assert columns(spool, 0, 7, [0, 1]).tolist() == IN_ORDER[:2].tolist()
