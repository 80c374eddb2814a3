"""Writing files so that a crash leaves the old content or the new, never a mixture."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOCK_POLL_S = 0.02
PROBE_BYTES = 1 << 16


class Held(Exception):
    """Another process holds the lock."""


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to disk, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, so that they survive a power cut."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


@contextmanager
def exclusive(path: Path, *, wait_s: float = 0.0) -> Iterator[int]:
    """Hold an exclusive lock on a file and yield its descriptor; the system frees a dead process's.

    Raises:
        Held: Another process still held it after `wait_s` seconds.
    """
    make_folder(path.parent)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + wait_s
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise Held(path) from None
                time.sleep(LOCK_POLL_S)
        yield descriptor
    finally:
        os.close(descriptor)


def probe_disk(folder: Path) -> None:
    """Do nothing if the folder's disk takes a few more pages.

    Raises:
        OSError: It does not.
    """
    probe = folder / f".{os.getpid()}.probe"
    try:
        with open(probe, "wb") as file:
            file.write(b"\0" * PROBE_BYTES)
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)


def write_atomic(path: Path, *parts: bytes, mode: int = 0o666, sync: bool = True) -> None:
    """Replace `path` by the parts in a row: write beside it, fsync, rename, fsync the folder.

    Args:
        path: The file; its folder is made.
        parts: What it holds; not copied.
        mode: Its permissions, less the process's umask.
        sync: False leaves it to the system when the disk has it: a process that is killed loses
            nothing, a power cut may.

    Raises:
        OSError: The disk refuses; the old content is untouched.
    """
    make_folder(path.parent)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        with open(os.open(beside, flags, mode), "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(path.parent)


def write_json(path: Path, value: Any, *, sync: bool = True) -> None:
    """Write `value` as indented JSON, as `write_atomic` does; a NaN is refused."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode(), sync=sync)
