"""Disk: one host's files, and how its process dies over them: torn, full, failing, unplugged.

The files are real. While a disk acts, each write, fsync, truncation, rename and removal of the
product goes through it, may fail or be the process's last one, and what a power cut would leave is
known: content as last fsynced, names as their folder was.
"""

import errno
import io
import os
import random
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from unittest import mock

from safetensors.numpy import save, save_file

from intramural.client import replies
from intramural.core import files, journal
from intramural.server import checkpoint, history

T = TypeVar("T")

_unlink, _replace, _fsync, _save_file = os.unlink, os.replace, os.fsync, save_file
_open = open
_acting: list["Disk"] = []


class Killed(BaseException):
    """The process that acted is dead; nothing that it does while this unwinds has an effect."""


class Disk:
    """The disk of one host, and the life of the process that uses it."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.operations = 0
        """Done so far; each is a boundary at which a process may die."""
        self.dead = False
        self.full = False
        self.stores_answers = True
        """False: a line still fits, and an answer does not."""
        self.fsync_fails = False
        self.truncate_fails = False
        self._last: int | None = None
        self._how = "after"
        self._ids = iter(range(1, 10**9))
        self._names: dict[str, int] = {}
        self._names_kept: dict[str, int] = {}
        """As a power cut leaves them: a number a file, by path."""
        self._kept: dict[int, bytes] = {}
        """Content of a file as a power cut leaves it; absent: empty."""

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Let what happens inside happen on this disk."""
        _acting.append(self)
        try:
            yield
        finally:
            _acting.pop()

    def die(self, *, after: int, how: str) -> None:
        """Have the process die at an operation to come: 'before', 'after' or in it, 'torn'."""
        self._last, self._how = self.operations + after, how

    def revive(self) -> None:
        """Start a process anew."""
        self.dead = False

    @property
    def is_good(self) -> bool:
        """Whether it takes what is written."""
        return not (self.full or self.fsync_fails)

    def heal(self) -> None:
        """Make the disk a good one, and its process live on."""
        self._last = None
        self.full = self.fsync_fails = self.truncate_fails = False
        self.stores_answers = True

    def step(self, do: Callable[[], T], torn: Callable[[], Any] | None = None) -> T:
        """Do one operation, unless the process is dead or dies of it."""
        if self.dead:
            raise Killed
        self.operations += 1
        last = self.operations == self._last
        if last and self._how != "after":
            self.dead = True
            if self._how == "torn" and torn is not None:
                torn()
            raise Killed
        done = do()
        if last:
            self.dead = True
            raise Killed
        return done

    def cut(self) -> None:
        """Leave what a power cut leaves; what was not fsynced is there, or not, or in part."""
        now = {path: _read(path) for path in self._names}
        numbers = {path: self._survivor(path) for path in sorted({*self._names, *self._names_kept})}
        for path, number in numbers.items():
            if number is None:
                if os.path.exists(path):
                    _unlink(path)
                continue
            kept = self._kept.get(number, b"")
            loose = now[path] if self._names.get(path) == number else kept
            content = self._left(kept, loose)
            if content != _read(path):
                with _open(path, "wb") as file:
                    file.write(content)
            self._kept[number] = content
        self._names = {path: n for path, n in numbers.items() if n is not None}
        self._names_kept = dict(self._names)

    def _survivor(self, path: str) -> int | None:
        now, kept = self._names.get(path), self._names_kept.get(path)
        return now if now == kept else self._rng.choice((now, kept))

    def _left(self, kept: bytes, loose: bytes) -> bytes:
        if loose.startswith(kept):
            return loose[: self._rng.randint(len(kept), len(loose))]
        return self._rng.choice((kept, loose))

    def named(self, path: str) -> None:
        """Know a file that was opened to be written."""
        self._names.setdefault(path, next(self._ids))

    def written(self, write: Callable[[bytes], int], content: bytes) -> int:
        """Write some of the content; return how much."""
        if self.full and not self.dead:
            if len(content) > 1 and self._rng.random() < 0.5:  # the last free bytes
                content = content[: len(content) // 2]
            else:
                raise OSError(errno.ENOSPC, "No space left on device")
        part = content[: self._rng.randint(0, len(content))]
        return self.step(lambda: write(content), torn=lambda: write(part))

    def truncated(self, truncate: Callable[[], int]) -> int:
        """Cut an open file."""
        if self.truncate_fails and not self.dead:
            raise OSError(errno.EIO, "Input/output error")
        return self.step(truncate)

    def fsynced(self, descriptor: int) -> None:
        """Make a file's content, or a folder's names, such as a power cut leaves."""
        if self.fsync_fails and not self.dead:
            raise OSError(errno.EIO, "Input/output error")
        self.step(lambda: self._keep(descriptor))

    def _keep(self, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path in self._names:
            self._kept[self._names[path]] = _read(path)
        elif stat.S_ISDIR(os.fstat(descriptor).st_mode):
            for file in {*self._names, *self._names_kept}:
                if os.path.dirname(file) != path:
                    continue
                if file in self._names:
                    self._names_kept[file] = self._names[file]
                else:
                    del self._names_kept[file]

    def replaced(self, source: str, target: str) -> None:
        """Rename a file."""

        def rename() -> None:
            _replace(source, target)
            if source in self._names:
                self._names[target] = self._names.pop(source)

        self.step(rename)

    def unlinked(self, path: str) -> None:
        """Remove a file."""

        def unlink() -> None:
            _unlink(path)
            self._names.pop(path, None)

        self.step(unlink)


class SimFile(io.FileIO):
    """An open file of a disk."""

    def __init__(self, disk: Disk, file: str | int, mode: str) -> None:
        self._disk = disk
        super().__init__(file, mode)
        self._path = os.readlink(f"/proc/self/fd/{self.fileno()}")
        disk.named(self._path)

    def write(self, content: Any) -> int:
        """Write some of the content; return how much."""
        if replies.SUFFIX in self._path and not (self._disk.stores_answers or self._disk.dead):
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._disk.written(super().write, bytes(content))

    def truncate(self, size: int | None = None) -> int:
        """Cut the file."""
        return self._disk.truncated(lambda: super(SimFile, self).truncate(size))


def _read(path: str) -> bytes:
    try:
        with _open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return b""


def _sim_open(file: Any, mode: str = "r", buffering: int = -1, **rest: Any) -> Any:
    if not _acting or not set(mode) & set("wa+"):
        return _open(file, mode, buffering, **rest)
    raw = SimFile(_acting[-1], file if isinstance(file, int) else os.fspath(file), mode)
    return raw if buffering == 0 else io.BufferedWriter(raw)


def _sim_save(tensors: Mapping[str, Any], path: Any) -> None:
    if not _acting:
        _save_file(dict(tensors), path)
        return
    with _sim_open(path, "wb") as file:
        file.write(save(dict(tensors)))


def _sim_fsync(descriptor: int) -> None:
    _acting[-1].fsynced(descriptor) if _acting else _fsync(descriptor)


def _sim_replace(source: Any, target: Any) -> None:
    if _acting:
        _acting[-1].replaced(os.fspath(source), os.fspath(target))
    else:
        _replace(source, target)


def _sim_unlink(path: Any, **rest: Any) -> None:
    if _acting:
        _acting[-1].unlinked(os.fspath(path))
    else:
        _unlink(path, **rest)


@contextmanager
def simulated_disks() -> Iterator[None]:
    """Send the product's writes to the disk that acts; without one, to the system."""
    with ExitStack() as stack:
        for name, fake in (
            ("fsync", _sim_fsync),
            ("replace", _sim_replace),
            ("unlink", _sim_unlink),
        ):
            stack.enter_context(mock.patch.object(os, name, fake))
        for module in (files, journal, replies, history):
            stack.enter_context(mock.patch.object(module, "open", _sim_open, create=True))
        for name, own in (("open", _sim_open), ("save_file", _sim_save)):
            stack.enter_context(mock.patch.object(checkpoint, name, own, create=True))
        yield
