"""A sweep's runs: whole simulations side by side, each in a folder of its own, each resumable.

The folder of a sweep holds `cells/NNN-DIGEST/`, one ordinary simulation each, and what
`sweep_report.py` makes of them. A cell's digest tells whatever decides its result, so a finished
cell is known again under any number, and never run twice.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import tomli_w

from intramural.core.children import die_with_parent
from intramural.core.errors import ConfigError
from intramural.core.files import Held, exclusive, make_folder, write_atomic, write_json
from intramural.server.run import REPORT
from intramural.simulations.sweep_cells import Cell

CELLS, FEDERATION, FACTS, LOG = "cells", "federation.toml", "cell.json", "cell.log"
LAST_WRITTEN = "report.html"
"""What a simulation writes last: where it is, the cell is finished."""
LOCK = ".sweep.lock"
ATTEMPTS_MAX = 2
"""A process that died is started once more; its committed rounds are kept."""
FINAL_CODES = frozenset({2, 3})
"""Wrong use and a refusal: another attempt would say the same."""
POLL_S = 0.1
STOP_S = 20.0
"""How long a cell may take to end its round's write when the sweep is stopped."""
WORD = "intramural: "
"""How the one line of an expected error begins; any other text stays in the cell's log."""

State = Literal["done", "failed", "waiting"]


class Running(Protocol):
    """A cell's process, as `subprocess.Popen` is one."""

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end."""
        ...

    def send_signal(self, sig: int) -> None:
        """Signal it."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...


Start = Callable[[Cell, Path], Running]
"""Starts a cell in its folder, from its last committed round."""
Tell = Callable[[Cell, str], None]
"""Told what happened to a cell: 'kept', 'started', 'again', 'done' or 'failed'."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a cell ended."""

    cell: Cell
    folder: Path
    state: State
    reason: str = ""
    """Why it failed, in a line that names no record."""

    @property
    def report(self) -> dict[str, Any]:
        """Its report.json; there is one once it is done."""
        found: dict[str, Any] = json.loads((self.folder / REPORT).read_text())
        return found


def folder_of(cell: Cell, sweep: Path) -> Path:
    """Return a cell's folder: one it already has, under whatever number, or a new one."""
    had = sorted((sweep / CELLS).glob(f"*-{cell.digest[:8]}"))
    return had[0] if had else sweep / CELLS / cell.name


def run_cells(
    cells: Sequence[Cell],
    sweep: Path,
    *,
    workers: int,
    start: Start,
    tell: Tell,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Result]:
    """Run every cell that is not finished, `workers` at a time, and return how each ended.

    A cell whose process dies is started once more, and then given up; the others go on. When the
    sweep is stopped, so are its cells, which keep their committed rounds; a cell dies with a sweep
    that is killed.

    Args:
        cells: In the order in which they are begun.
        sweep: The sweep's folder.
        workers: Cells that run at once, at least 1.
        start: Starts a cell.
        tell: Told of each beginning and end.
        sleep: Waits between two looks.

    Raises:
        ConfigError: Another process works in the folder.
    """
    try:
        with exclusive(sweep / LOCK):
            return _Board(cells, sweep, start=start, tell=tell).run(workers, sleep)
    except Held:
        raise ConfigError(
            f"{sweep}: another process sweeps there; wait for it, or use another --out"
        ) from None


class _Board:
    """Which cells wait, run and have ended."""

    def __init__(self, cells: Sequence[Cell], sweep: Path, *, start: Start, tell: Tell) -> None:
        self._folders = {cell.digest: folder_of(cell, sweep) for cell in cells}
        self._cells = list(cells)
        self._start = start
        self._tell = tell
        self._attempts: dict[str, int] = {}
        self._running: dict[str, tuple[Cell, Running]] = {}
        self._ended: dict[str, Result] = {}

    def run(self, workers: int, sleep: Callable[[float], None]) -> list[Result]:
        waiting = []
        for cell in self._cells:
            if (self._folders[cell.digest] / LAST_WRITTEN).is_file():
                self._end(cell, "done")
                self._tell(cell, "kept")
            else:
                waiting.append(cell)
        try:
            while waiting or self._running:
                while waiting and len(self._running) < workers:
                    self._begin(waiting.pop(0))
                if not self._look():
                    sleep(POLL_S)
        finally:
            self._stop()
        return [self._ended[cell.digest] for cell in self._cells]

    def _begin(self, cell: Cell) -> None:
        folder = self._folders[cell.digest]
        if cell.digest not in self._attempts:
            _write(cell, folder)
        attempt = self._attempts.get(cell.digest, 0) + 1
        self._attempts[cell.digest] = attempt
        self._tell(cell, "started" if attempt == 1 else "again")
        self._running[cell.digest] = (cell, self._start(cell, folder))

    def _look(self) -> bool:
        """Take in the cells that ended; return whether any did."""
        ended = [
            (cell, code)
            for cell, running in self._running.values()
            if (code := running.poll()) is not None
        ]
        for cell, code in ended:
            del self._running[cell.digest]
            folder = self._folders[cell.digest]
            if code == 0 and (folder / LAST_WRITTEN).is_file():
                self._end(cell, "done")
                self._tell(cell, "done")
            elif code in FINAL_CODES or self._attempts[cell.digest] >= ATTEMPTS_MAX:
                self._end(cell, "failed", _reason(folder, code))
                self._tell(cell, "failed")
            else:
                self._begin(cell)
        return bool(ended)

    def _end(self, cell: Cell, state: State, reason: str = "") -> None:
        self._ended[cell.digest] = Result(
            cell=cell, folder=self._folders[cell.digest], state=state, reason=reason
        )

    def _stop(self) -> None:
        """End what still runs, as Ctrl-C would: after the write that is under way."""
        left = [running for _, running in self._running.values()]
        for running in left:
            with suppress(ProcessLookupError):
                running.send_signal(signal.SIGINT)
        end_s = time.monotonic() + STOP_S
        for running in left:
            with suppress(subprocess.TimeoutExpired):
                running.wait(max(0.0, end_s - time.monotonic()))
            if running.poll() is None:
                running.kill()
                running.wait()


def process_starter(
    *, data: Path, threads: int, options: Sequence[str] = (), python: str = sys.executable
) -> Start:
    """Return what starts a cell as `intramural simulate`, without comparisons.

    Args:
        data: As --data of `simulate`.
        threads: As --threads: fixed, for a cell's last bits depend on it.
        options: More options, such as ("--text", "note").
        python: The interpreter.
    """

    def start(cell: Cell, folder: Path) -> Running:
        words = [python, "-m", "intramural", "simulate", str(folder / FEDERATION)]
        words += ["--data", str(data.resolve()), "--out", str(folder), "--resume", "--json"]
        words += ["--sites", str(cell.sites), "--partition", cell.partition]
        words += ["--compare", "none", "--threads", str(threads), *options]
        if "--engine" not in options:
            words += ["--engine", "inprocess"]  # cells side by side fill the processors already
        with open(folder / LOG, "ab") as log:
            return subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # report.json says the same
                stderr=log,
                preexec_fn=die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509
            )

    return start


def _write(cell: Cell, folder: Path) -> None:
    """Write what a cell is: once, for a folder that has run must not change."""
    make_folder(folder)
    if not (folder / FEDERATION).is_file():
        write_atomic(folder / FEDERATION, tomli_w.dumps(cell.table).encode())
    write_json(
        folder / FACTS,
        {
            "number": cell.number,
            "parameters": cell.parameters,
            "sites": cell.sites,
            "partition": cell.partition,
            "digest": cell.digest,
        },
    )


def _reason(folder: Path, code: int) -> str:
    """Return why a cell failed: our own error's line, or no more than its exit code."""
    told = f"exit code {code}; see {folder.name}/{LOG}"
    try:
        lines = (folder / LOG).read_text(errors="replace").splitlines()
    except OSError:
        return told
    ours = [line.removeprefix(WORD) for line in lines if line.startswith(WORD)]
    return ours[-1] if ours else told
