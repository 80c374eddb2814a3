"""The Ray engine: Flower's own simulation, run by `flwr run` on our code-free bundle, unchanged.

Starts a SuperLink of its own on a free loopback port, submits the bundle, follows its journal,
and ends the processes it started, however the run ends.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import tomli_w

from intramural.core.errors import ConfigError, RoundError
from intramural.core.files import write_atomic
from intramural.core.journal import scan
from intramural.server.bundle import write_bundle
from intramural.server.run import JOURNAL, REPORT
from intramural.server.watcher import Watcher

CONNECTION = "intramural"
START_S = 60.0
STOP_S = 15.0
POLL_S = 0.5
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Nobody is called: no telemetry, no update check, no package index."""


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
    write_bundle(home / "bundle", run_config)
    (folder / REPORT).unlink(missing_ok=True)
    with _superlink(home) as env:
        settings = f"num-supernodes={nodes} client-resources-num-cpus={threads}"
        answer = _flwr(
            env, "run", str(home / "bundle"), CONNECTION, "--federation-config", settings
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
    binaries = str(Path(sys.executable).parent)
    path = os.pathsep.join([binaries, os.environ.get("PATH", "")])
    env = {**os.environ, **QUIET, "FLWR_HOME": str(home.resolve()), "PATH": path}
    connection = {"address": f"127.0.0.1:{port}", "insecure": True}
    table = {"superlink": {"default": CONNECTION, CONNECTION: connection}}
    write_atomic(home / "config.toml", tomli_w.dumps(table).encode())
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--disable-runtime-dependency-installation"]
    with open(home / "superlink.log", "ab") as log:
        process = subprocess.Popen(
            command,
            env=env,
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


def _flwr(env: dict[str, str], *words: str) -> dict[str, Any]:
    """Run one `flwr` command and return its JSON answer."""
    done = subprocess.run(
        ["flwr", *words, "--format", "json"], env=env, capture_output=True, text=True, check=False
    )
    start = done.stdout.find("{")
    try:
        answer: dict[str, Any] = json.loads(done.stdout[start:])
    except ValueError:
        raise RoundError(
            f"flwr {words[0]}: {(done.stderr or done.stdout).strip()[-300:]}"
        ) from None
    if not answer.get("success", False):
        raise RoundError(f"flwr {words[0]}: {answer.get('error-message', 'failed')}")
    return answer


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
            runs = _flwr(env, "list", "--run-id", run_id)["runs"]
            if runs and str(runs[0]["status"]).startswith("finished"):
                return
        time.sleep(POLL_S)
