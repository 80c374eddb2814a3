"""Children: the processes that a supervisor keeps running, each with a log that does not grow."""

import contextlib
import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from intramural.core.files import make_folder, write_json
from intramural.core.threads import beside

LOG_BYTES, LOG_FILES = 5_000_000, 3
"""Most that one child's log holds, times the files kept."""
PAUSES_S = (0.5, 1.0, 2.0, 5.0, 15.0)
"""Waits before a child that died is started again; the last one for ever, never a final stop."""
STEADY_S = 60.0
"""A child that lived so long begins its pauses anew."""
STOP_S = 15.0
LOOK_S = 1.0
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}
"""For Flower's processes: no telemetry, no update check, no package index, no proxy on loopback."""
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class Child:
    """A process to keep running."""

    name: str
    command: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Added to this process's environment."""
    ready: Callable[[], bool] = lambda: True
    """Whether it does its work; those after it start only then."""
    ready_s: float = 60.0
    """How long it may take to be ready before it is started again."""
    restart: Path | None = None
    """A file that asks for this child to be started anew, and is gone once it is."""


@dataclass
class _Running:
    process: "subprocess.Popen[bytes]"
    started_s: float
    is_ready: bool = False
    ending_since_s: float | None = None
    """When it was asked to end, to be started anew."""


class Children:
    """Starts children in order, starts again what dies, ends them in reverse.

    A child and all that it starts form one process group and end together. On Linux a child is
    killed by the system when its supervisor dies, so that no second set is ever started beside it.
    """

    def __init__(
        self,
        children: Sequence[Child],
        *,
        logs: Path,
        status: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep `children`; their output goes to `logs`, a line on each to the file `status`."""
        self._children = tuple(children)
        self._logs = logs
        self._status = status
        self._clock = clock
        self._running: dict[str, _Running] = {}
        self._deaths: dict[str, int] = {}
        self._last_exit: dict[str, int] = {}
        self._due: dict[str, float] = {}
        self._told: list[dict[str, Any]] = []

    def __enter__(self) -> "Children":
        make_folder(self._logs)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def tend(self) -> bool:
        """Look once at each child, start what is to be started; True when all are ready."""
        for child in self._children:
            running = self._running.get(child.name)
            if running is not None and child.restart is not None and child.restart.exists():
                self._see_out(running)
            if running is not None and running.process.poll() is not None:
                self._bury(child, running)
                running = None
            if running is None:
                if self._clock() < self._due.get(child.name, 0.0):
                    break
                running = self._running[child.name] = self._start(child)
            if not running.is_ready:
                running.is_ready = child.ready()
                if not running.is_ready and self._clock() - running.started_s > child.ready_s:
                    self._end(running.process, signal.SIGKILL)
            if not running.is_ready:
                break
        self._write_status()
        return all(
            child.name in self._running and self._running[child.name].is_ready
            for child in self._children
        )

    def pid(self, name: str) -> int | None:
        """Return a child's process number; None while it does not run."""
        running = self._running.get(name)
        return running.process.pid if running else None

    def stop(self) -> None:
        """End all children, the last first; whoever does not go is killed."""
        for child in reversed(self._children):
            running = self._running.pop(child.name, None)
            if running is None:
                continue
            self._end(running.process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.process.wait(STOP_S)
            self._end(running.process, signal.SIGKILL)  # also what it started and left behind
            running.process.wait()
        self._write_status()

    def _see_out(self, running: _Running) -> None:
        """End a child that is to be started anew: by a kind word first."""
        if running.ending_since_s is None:
            running.ending_since_s = self._clock()
            self._end(running.process, signal.SIGTERM)
        elif self._clock() - running.ending_since_s > STOP_S:
            self._end(running.process, signal.SIGKILL)

    def _start(self, child: Child) -> _Running:
        if child.restart is not None:
            child.restart.unlink(missing_ok=True)
        process = subprocess.Popen(
            list(child.command),
            env={**os.environ, **child.env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509
        )
        beside(partial(_keep_log, process, self._logs / f"{child.name}.log"))
        return _Running(process=process, started_s=self._clock())

    def _bury(self, child: Child, running: _Running) -> None:
        """Note a death, end what the child left behind, and set the time of the next start."""
        self._end(running.process, signal.SIGKILL)
        del self._running[child.name]
        lived_s = self._clock() - running.started_s
        deaths = 0 if lived_s >= STEADY_S else self._deaths.get(child.name, 0)
        pause_s = PAUSES_S[min(deaths, len(PAUSES_S) - 1)]
        self._deaths[child.name] = deaths + 1
        self._last_exit[child.name] = running.process.returncode
        self._due[child.name] = self._clock() + pause_s

    def _end(self, process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)

    def _write_status(self) -> None:
        """Write what is running, when it changed."""
        rows = []
        for child in self._children:
            running = self._running.get(child.name)
            rows.append(
                {
                    "name": child.name,
                    "pid": running.process.pid if running else None,
                    "ready": running.is_ready if running else False,
                    "deaths": self._deaths.get(child.name, 0),
                    "last_exit": self._last_exit.get(child.name),
                }
            )
        if rows != self._told:
            self._told = rows
            with contextlib.suppress(OSError):  # a full disk shall not end what still runs
                write_json(self._status, {"pid": os.getpid(), "children": rows})


def listens(host: str, port: int) -> bool:
    """Return whether somebody takes connections there now."""
    try:
        with socket.create_connection((host, port), timeout=LOOK_S):
            return True
    except OSError:
        return False


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _keep_log(process: "subprocess.Popen[bytes]", path: Path) -> None:
    """Copy a child's lines to files of bounded size until it closes its output."""
    handler = RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=LOG_FILES, delay=True)
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            text = line.decode(errors="replace").rstrip()
            record = logging.LogRecord("child", logging.INFO, "", 0, text, None, None)
            with contextlib.suppress(OSError):  # a full disk stops the log, not the child
                handler.emit(record)
    handler.close()
