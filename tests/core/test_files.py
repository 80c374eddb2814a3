"""Atomic files: the old content or the new, never a mixture, and nothing left beside."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from intramural.core.files import write_atomic, write_json


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_write_replaces_the_content_and_makes_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "state"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["state"]


def test_parts_are_written_in_a_row_and_under_the_mode_asked_for(tmp_path: Path) -> None:
    path, before = tmp_path / "state", os.umask(0o022)
    try:
        write_atomic(path, b"one", b"", b"two", mode=0o600)
        assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"onetwo", 0o600)
        write_atomic(path)
        assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"", 0o644)
    finally:
        os.umask(before)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_content_and_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "state"
    write_atomic(path, b"old")
    monkeypatch.setattr(os, step, no_space)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new content")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state"]


def test_a_write_that_is_interrupted_leaves_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "state", b"new")
    assert os.listdir(tmp_path) == []


def test_content_is_on_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, steps = tmp_path / "state", []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor: int) -> None:
        target = os.readlink(f"/proc/self/fd/{descriptor}")
        steps.append("folder" if target == str(tmp_path) else "file")
        fsync(descriptor)

    def spy_replace(source: Path, target: Path) -> None:
        assert source.read_bytes() == b"new"
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    write_atomic(path, b"new")
    assert steps == ["file", "rename", "folder"]


def test_json_is_indented_utf8_with_a_final_newline(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"b": 1, "é": [2.5]})
    assert path.read_bytes() == '{\n  "b": 1,\n  "é": [\n    2.5\n  ]\n}\n'.encode()
    assert json.loads(path.read_text(encoding="utf-8")) == {"b": 1, "é": [2.5]}


def test_json_with_a_nan_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"loss": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert json.loads(path.read_text()) == {"loss": 1.0}
