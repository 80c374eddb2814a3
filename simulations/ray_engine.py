"""The Ray engine: Flower's own simulation, run by `flwr run` on our code-free bundle, unchanged.

Starts a SuperLink of its own on a free loopback port, submits the bundle, follows its journal,
and ends the processes it started, however the run ends.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from intramural.core.bundle import write_bundle
from intramural.core.errors import ConfigError, RoundError
from intramural.core.journal import scan
from intramural.server.commits import JOURNAL
from intramural.server.flwr_cli import CONNECTION, call_flwr, flower_home
from intramural.server.run import REPORT
from intramural.server.watcher import Watcher

START_S = 60.0
STOP_S = 15.0
POLL_S = 0.5


def run_on_ray(
    run_config: dict[str, Any], *, nodes: int, threads: int, folder: Path, watcher: Watcher
) -> None:
    """Run the bundle on Flower's Ray backend; the run's files are then in `folder`.

    Args:
        run_config: What coordinator and sites find in their context.
        nodes: Number of simulated nodes.
        threads: Processors a site takes; as many sites run at once as fit the machine.
        folder: The run's folder.
        watcher: Told of each committed round.

    Raises:
        ConfigError: Ray is not installed.
        RoundError: The run ended without a report; the log that says why is named.
    """
    try:
        import ray  # noqa: F401
    except ImportError:
        raise ConfigError("--engine ray needs Ray: pip install 'intramural[simulation]'") from None
    home = folder / "flower"
    app, run = write_bundle(home / "bundle", run_config)
    (folder / REPORT).unlink(missing_ok=True)
    with _superlink(home) as env:
        settings = f"num-supernodes={nodes} client-resources-num-cpus={threads}"
        answer = call_flwr(
            env,
            *("run", str(app), CONNECTION),
            *("--run-config", str(run), "--federation-config", settings),
        )
        _follow(env, str(answer["run-id"]), folder, watcher)
    if not (folder / REPORT).is_file():
        raise RoundError(f"the run ended without a report; see {home / 'superlink.log'}")


@contextmanager
def _superlink(home: Path) -> Iterator[dict[str, str]]:
    """Run a SuperLink in simulation mode; yield the environment that reaches it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = flower_home(home, address=f"127.0.0.1:{port}")
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--disable-runtime-dependency-installation"]
    with open(home / "superlink.log", "ab") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, **env},
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        _await_health(process, port, home)
        yield env
    finally:
        _end(process)


def _await_health(process: "subprocess.Popen[bytes]", port: int, home: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=1.0).is_success:
                return
        except httpx.HTTPError:
            time.sleep(POLL_S)
    raise RoundError(f"Flower's SuperLink did not start; see {home / 'superlink.log'}")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the SuperLink and all it started: they share its process group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _follow(env: dict[str, str], run_id: str, folder: Path, watcher: Watcher) -> None:
    """Tell the watcher of each committed round until the run has finished."""
    told, looks = 0, 0
    while True:
        entries = scan(folder / JOURNAL).entries
        for entry in entries[told:]:
            if entry.kind == "committed":
                watcher.committed(entry.body)
        told = len(entries)
        looks += 1
        if (folder / REPORT).is_file():
            return
        if looks % 8 == 0:  # each look starts a process; the journal says most
            runs = call_flwr(env, "list", "--run-id", run_id)["runs"]
            if runs and str(runs[0]["status"]).startswith("finished"):
                return
        time.sleep(POLL_S)
