"""A cell of the simulation benchmark: a process of its own, bounded in time, its memory watched.

Memory is that of the whole tree of processes. PSS, which shares a page among those that map it,
adds up over them; RSS counts a shared page once for each.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from intramural.core.children import QUIET, die_with_parent

ROOT = Path(__file__).parent.parent
LIMIT_S = 1200.0
"""A cell that takes longer is ended."""
SAMPLE_S = 0.25
LOOK_S = 2.0
"""How often a tree is looked at whose memory nobody asked for."""
ENV = {
    **QUIET,
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
}


class CellFailed(Exception):
    """A cell's process failed or took too long; the text is one line that says how."""


@dataclass
class Peak:
    """The most that a tree of processes held at once, in MB (1e6 bytes)."""

    rss_mb: float = 0.0
    pss_mb: float = 0.0
    """0 where the system does not tell it."""

    @property
    def best_mb(self) -> float:
        """Return PSS, or RSS where there is none."""
        return self.pss_mb or self.rss_mb

    def __str__(self) -> str:
        told = f"{self.pss_mb:,.0f} MB PSS, " if self.pss_mb else ""
        return f"{told}{self.rss_mb:,.0f} MB RSS"


@dataclass(kw_only=True)
class Outcome:
    """What a cell's process told, and how it went."""

    told: dict[str, Any]
    """The JSON object it printed."""
    since_s: float
    """When it was started, by `time.monotonic`."""
    peak: Peak


@dataclass
class Tree:
    """A process and all that it started, also what outlived its parent."""

    root: psutil.Process
    _seen: set[psutil.Process] = field(default_factory=set)

    def look(self) -> list[psutil.Process]:
        """Return who is there now."""
        with contextlib.suppress(psutil.Error):
            self._seen.update([self.root, *self.root.children(recursive=True)])
        self._seen = {process for process in self._seen if process.is_running()}
        return list(self._seen)

    def sample(self, peak: Peak) -> None:
        """Raise the peak to what the tree holds now."""
        rss, pss = 0, 0
        for process in self.look():
            with contextlib.suppress(psutil.Error, OSError):
                rss += process.memory_info().rss
                pss += _pss(process.pid)
        peak.rss_mb = max(peak.rss_mb, rss / 1e6)
        peak.pss_mb = max(peak.pss_mb, pss / 1e6)

    def end(self) -> None:
        """Kill whoever is still there."""
        for process in self.look():
            with contextlib.suppress(psutil.Error):
                process.kill()


def _pss(pid: int) -> int:
    """Return a process's PSS in bytes; 0 where the system does not tell."""
    path = Path(f"/proc/{pid}/smaps_rollup")
    if not path.is_file():
        return 0
    for line in path.read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def run_cell(
    module: str,
    *words: str,
    watch: bool = False,
    env: Mapping[str, str] | None = None,
    python: Path | None = None,
    limit_s: float = LIMIT_S,
) -> Outcome:
    """Run a module that prints a JSON object last, and leave nothing of it behind.

    Args:
        module: Its name.
        words: Its arguments.
        watch: Whether to sample the memory of its tree.
        env: Added to the environment.
        python: The interpreter; None: this one.
        limit_s: How long it may take.

    Raises:
        CellFailed: It failed, took too long, or printed nothing of the kind.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    with tempfile.TemporaryDirectory(prefix="cell-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        told = {**os.environ, **ENV, "PYTHONPATH": path, "TMPDIR": temporary, **(env or {})}
        command = [str(python or sys.executable), "-m", module, *words]
        since_s = time.monotonic()
        with _process(command, folder, told) as (process, tree):
            peak = _follow(process, tree, watch=watch, limit_s=limit_s)
        if process.returncode:
            raise CellFailed(_last_line(folder / "err") or f"exit code {process.returncode}")
        return Outcome(told=_object(folder / "out"), since_s=since_s, peak=peak)


@contextmanager
def _process(
    command: Sequence[str], folder: Path, env: Mapping[str, str]
) -> Iterator[tuple["subprocess.Popen[bytes]", Tree]]:
    with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
            preexec_fn=die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509
        )
    tree = Tree(psutil.Process(process.pid))
    try:
        yield process, tree
    finally:
        tree.end()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _follow(process: "subprocess.Popen[bytes]", tree: Tree, *, watch: bool, limit_s: float) -> Peak:
    """Wait for the process's end and return the most its tree held, if asked to watch."""
    peak, deadline = Peak(), time.monotonic() + limit_s
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SAMPLE_S if watch else LOOK_S)
            return peak
        if watch:
            tree.sample(peak)
        else:
            tree.look()
        if time.monotonic() > deadline:
            raise CellFailed(f"not done after {limit_s:g} s")


def _object(path: Path) -> dict[str, Any]:
    lines = [line for line in path.read_text().splitlines() if line.startswith("{")]
    if not lines:
        raise CellFailed("it printed no result")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")[:200]
