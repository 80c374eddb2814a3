"""Nursery: one process that imports the large libraries, and of which workers are copies.

A worker that imports PyTorch and transformers by itself has some 300 MB for them alone; copies
share them. The nursery imports and forks, and does nothing else: it has one thread, no model, no
record. On Linux alone; elsewhere workers are started by themselves.
"""

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from intramural.core.children import die_with_parent
from intramural.simulations.pool_worker import Line, Setup, serve

LIBRARIES = ("intramural.client.agent", "transformers.modeling_utils")
"""What every worker of a simulation imports sooner or later."""
CODE = "from intramural.simulations import pool_nursery; pool_nursery.main()"
POLL_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Start:
    """What the nursery is told first."""

    libraries: tuple[str, ...]
    parent: int
    """Process number of the pool."""
    path: tuple[str, ...]
    """Where modules are looked for."""


@dataclass(frozen=True, kw_only=True)
class Birth:
    """A worker to make; its end of the socket comes with it."""

    environment: Mapping[str, str]
    """Of the worker, beside the nursery's own."""
    log: Path | None


def can_fork() -> bool:
    """Return whether a nursery works here."""
    return sys.platform == "linux" and hasattr(os, "pidfd_open")


class Nursery:
    """The pool's end of the nursery's process."""

    def __init__(
        self, libraries: Sequence[str], *, environment: Mapping[str, str], log: Path | None
    ) -> None:
        """Start it, and do not wait for what it imports."""
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as stack:
            stack.enter_context(theirs)
            output = 2
            if log is not None:
                output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                stack.callback(os.close, output)
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", CODE, str(theirs.fileno())],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C at the terminal is not for it
            )
        self._line = Line(ours)
        self._born: list[Forked] = []
        """Asked for and not told of yet, in order."""
        start = Start(libraries=tuple(libraries), parent=os.getpid(), path=tuple(sys.path))
        with suppress(OSError):
            self._line.send(start)

    def fork(
        self, end: socket.socket, *, environment: Mapping[str, str], log: Path | None
    ) -> "Forked":
        """Have a worker made that answers at `end`, which stays the caller's to close."""
        born = Forked(self)
        self._born.append(born)
        with suppress(OSError):  # it is gone: `poll` will tell
            self._line.send(Birth(environment=dict(environment), log=log), end.fileno())
        return born

    def listen(self, wait_s: float) -> None:
        """Take in which workers were made, if any is told within `wait_s` seconds."""
        if not self._born or not select.select([self._line.socket], [], [], wait_s)[0]:
            return
        try:
            pid, _ = self._line.receive()
            self._born.pop(0).be(pid)
        except EOFError:
            for born in self._born:
                born.be(None)
            self._born.clear()

    def end(self) -> None:
        """End it, and with it the workers that are left: the system kills them at once."""
        self._line.close()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Forked:
    """A worker made by the nursery, with the methods of `subprocess.Popen` that a pool uses."""

    def __init__(self, nursery: Nursery) -> None:
        """Not made yet."""
        self._nursery = nursery
        self._pid: int | None = None
        self._watch: int | None = None
        """Descriptor that can be read when the process has ended; None: not made, or ended."""
        self._is_told = False

    def be(self, pid: int | None) -> None:
        """Note its number, or that it will never be."""
        self._pid, self._is_told = pid, True
        if pid is not None:
            with suppress(ProcessLookupError):  # it has ended already
                self._watch = os.pidfd_open(pid)

    @property
    def pid(self) -> int:
        """Process number; waits until the worker is made. 0: it never was."""
        while not self._is_told:
            self._nursery.listen(1.0)
        return self._pid or 0

    def poll(self) -> int | None:
        """Return None while it lives or is to be made; a number once it has ended."""
        if not self._is_told:
            self._nursery.listen(0.0)
            if not self._is_told:
                return None
        if self._watch is not None and not select.select([self._watch], [], [], 0.0)[0]:
            return None
        self._forget()
        return 1

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended.

        Raises:
            TimeoutExpired: It has not, after `timeout` seconds.
        """
        deadline_s = float("inf") if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() >= deadline_s:
                raise subprocess.TimeoutExpired("a forked worker", timeout or 0.0)
            if self._watch is None:
                self._nursery.listen(POLL_S)
            else:
                select.select([self._watch], [], [], POLL_S)
        return 1

    def _forget(self) -> None:
        if self._watch is not None:
            os.close(self._watch)
            self._watch = None


def main() -> None:
    """Import, then fork a worker for each order, until the pool closes the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line = Line(socket.socket(fileno=int(sys.argv[1])))
    start = cast(Start, line.receive()[0])
    die_with_parent()
    if os.getppid() != start.parent:
        return
    sys.path[:] = start.path
    for name in start.libraries:
        with suppress(Exception):  # the worker that needs it will say what is wrong
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection would write to every object, and so copy every page
    here = os.getpid()
    with suppress(EOFError):
        while True:
            birth, end = line.receive()
            assert end is not None
            # Nobody waits for the dead: their numbers stay taken, so that the pool, which ends a
            # worker's whole group by its number, never meets a stranger.
            pid = os.fork()
            if not pid:
                _be_worker(birth, end, line, here)
            os.close(end)
            line.send(pid)


def _be_worker(birth: Birth, end: int, line: Line, parent: int) -> None:
    """Become a worker in the forked process; never returns."""
    code = 1
    try:
        line.close()
        os.setsid()
        die_with_parent()
        if os.getppid() == parent:
            os.environ.update(birth.environment)
            if birth.log is not None:
                output = os.open(birth.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                os.dup2(output, 1)
                os.dup2(output, 2)
            own = Line(socket.socket(fileno=end))
            serve(own, cast(Setup, own.receive()[0]))
            code = 0
    finally:
        os._exit(code)
