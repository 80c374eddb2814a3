"""A federation on a cluster of two Ray nodes ends at the bits of one process."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from intramural.core.site import load_site
from intramural.server.watcher import Watcher
from intramural.simulations.engines import Engine
from intramural.simulations.simulate import Simulation, simulate
from intramural.simulations.sites import Deal
from tests.tiny import Json, federation, rows, site

ray = pytest.importorskip("ray")
START_S = 60.0
STOP_S = 20.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def ray_node(log: Path, *options: str) -> Iterator[None]:
    """Run one Ray node of one processor, and end it with all it started."""
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus", "1"]
    command += ["--disable-usage-stats", *options]
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(STOP_S)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        process.wait(STOP_S)


def nodes_of(address: str) -> int:
    """Return how many nodes of a cluster are alive, asked in a process of its own."""
    code = (
        "import ray, sys; ray.init(address=sys.argv[1], logging_level='ERROR');"
        "print(sum(node['Alive'] for node in ray.nodes()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, address],
        check=False,
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    return int(done.stdout.split()[-1]) if done.returncode == 0 else 0


@contextmanager
def cluster(folder: Path) -> Iterator[str]:
    """Run two nodes on this machine, and yield the cluster's address."""
    address = f"127.0.0.1:{free_port()}"
    head = ["--head", "--node-ip-address", "127.0.0.1", "--port", address.partition(":")[2]]
    second = ["--address", address, "--node-ip-address", "127.0.0.1"]
    # Ray's sockets lie in its folder, and a socket's path may have 107 bytes: not under tmp_path.
    with TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as short:
        head += ["--include-dashboard", "false", "--temp-dir", short]
        yield from _both(folder, address, head, second)


def _both(folder: Path, address: str, head: list[str], second: list[str]) -> Iterator[str]:
    with ray_node(folder / "head.log", *head):
        deadline = time.monotonic() + START_S
        while not nodes_of(address):
            assert time.monotonic() < deadline, (folder / "head.log").read_text()
        with ray_node(folder / "second.log", *second):
            while nodes_of(address) < 2:
                assert time.monotonic() < deadline, (folder / "second.log").read_text()
            yield address


def simulated(folder: Path, bert: Path, engine: Engine) -> Json:
    config = federation(bert, sites={"min": 3}, evaluation={"every": 0})
    deal = Deal(
        federation=config,
        template=load_site(site(folder, "template", rows())),
        sites=3,
        partition="iid",
        folder=folder / "out",
    )
    return simulate(Simulation(deal=deal, engine=engine, compare=frozenset()), watcher=Watcher())


@pytest.mark.slow
def test_two_nodes_end_at_the_same_bits_as_one_process(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = simulated(tmp_path / "alone", bert, "inprocess")
    with cluster(tmp_path) as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        spread = simulated(tmp_path / "spread", bert, "ray")
    assert spread["digest"] == alone["digest"]
    assert [r["sites"] for r in spread["rounds"]] == [["site-1", "site-2", "site-3"]] * 2
