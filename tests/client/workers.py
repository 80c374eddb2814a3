"""Worker processes for tests: started, waited for, and ended by their own ids."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from intramural.client.thin import is_serving
from intramural.client.worker import address_of

ROOT = Path(__file__).parents[2]
READY_S = 60.0
MODULE = (sys.executable, "-m", "tests.client.member")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
Process = subprocess.Popen[bytes]


def begin(place: Path, *, log: Path, read_s: float = 60.0) -> Process:
    """Start a worker that sends letters back; its output is added to a file."""
    with open(log, "ab") as output:
        return subprocess.Popen(
            [*MODULE, "echo", str(place), str(read_s)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=ENVIRONMENT,
        )


def end(process: Process) -> None:
    """Kill a process, if it lives, and wait for its end."""
    process.kill()
    process.wait(10)


def ready(address: str) -> None:
    """Wait until a worker serves."""
    deadline = time.monotonic() + READY_S
    while not is_serving(address, timeout_s=0.2):
        assert time.monotonic() < deadline, "the worker did not come up"
        time.sleep(0.02)


@contextmanager
def echoing(place: Path, *, log: Path, read_s: float = 60.0) -> Iterator[tuple[Process, str]]:
    """Run a worker that sends letters back; yield its process and its address."""
    process = begin(place, log=log, read_s=read_s)
    try:
        ready(address_of(place))
        yield process, address_of(place)
    finally:
        end(process)


class Nursery:
    """Forks sites' workers from a process that has loaded their code; see `member.be_nursery`."""

    def __init__(self, base: Path) -> None:
        self._process = subprocess.Popen(
            [*MODULE, "nursery", str(base)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        self._living: set[int] = set()
        assert self._answer() == "ready"

    @property
    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin, self._process.stdout

    def _answer(self) -> str:
        return self._pipes[1].readline().strip()

    def _order(self, order: object) -> int:
        into, _ = self._pipes
        into.write(json.dumps(order) + "\n")
        into.flush()
        return int(self._answer())

    def begin(self, point: str, site_file: Path, *, log: Path) -> int:
        """Start a site's worker that dies at a point; return its process id."""
        pid = self._order([point, str(site_file), str(log)])
        self._living.add(pid)
        return pid

    def ended(self, pid: int) -> int:
        """Wait for a worker's end and return its exit code."""
        code = self._order(pid)
        self._living.discard(pid)
        return code

    def close(self) -> None:
        """End all."""
        for pid in self._living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pipe in self._pipes:
            pipe.close()
        end(self._process)  # type: ignore[arg-type]
