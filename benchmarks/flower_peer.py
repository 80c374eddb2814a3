"""Flower, deployed on loopback as its documentation shows: the peer of `round_floor`."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import httpx
import tomli_w
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from intramural.core.children import QUIET
from intramural.core.files import write_atomic
from intramural.server.flwr_cli import CONNECTION, call_flwr
from intramural.server.folder import CoordinatorFolder
from intramural.simulations.loopback import await_true, free_ports

NOOP = Path(__file__).parent / "flower_noop"
WAIT_S = 600.0
STOP_S = 15.0


@dataclass
class FlowerPeer:
    """A SuperLink with TLS, node authentication and SQLite, and its SuperNodes."""

    folder: Path
    coordinator: Path
    """Folder of a coordinator of ours, whose certificate for loopback is used."""
    nodes: int
    _env: dict[str, str] = field(default_factory=dict)
    _runs: int = 0

    @contextmanager
    def up(self) -> Iterator["FlowerPeer"]:
        """Have SuperLink and SuperNodes up within the block."""
        place = CoordinatorFolder(root=self.coordinator)
        port, *node_ports = free_ports(1 + self.nodes)
        address = f"127.0.0.1:{port}"
        binaries = Path(sys.executable).parent
        path = os.pathsep.join([str(binaries), os.environ.get("PATH", "")])
        self._env = {**QUIET, "FLWR_HOME": str(self.folder.resolve()), "PATH": path}
        connection = {"address": address, "root-certificates": str(place.authority.resolve())}
        table = {"superlink": {"default": CONNECTION, CONNECTION: connection}}
        write_atomic(self.folder / "config.toml", tomli_w.dumps(table).encode())
        link = ["flower-superlink", "--host", "127.0.0.1", "--port", str(port)]
        link += ["--ssl-certfile", str(place.tls), "--ssl-keyfile", str(place.tls_key)]
        link += ["--ssl-ca-certfile", str(place.authority), "--enable-supernode-auth"]
        link += ["--database", str(self.folder / "state.db")]
        link += ["--disable-runtime-dependency-installation"]
        with ExitStack() as stack:
            stack.enter_context(self._process("superlink", link))
            health = f"https://{address}/health"
            await_true(lambda: _answers(health, place.authority), 60, what="Flower's SuperLink")
            for number, node_port in enumerate(node_ports):
                key = self._register(number)
                node = ["flower-supernode", "--superlink", address, "--port", str(node_port)]
                node += ["--root-certificates", str(place.authority)]
                node += ["--auth-supernode-private-key", str(key)]
                stack.enter_context(self._process(f"supernode-{number}", node))
            yield self

    def _register(self, number: int) -> Path:
        key = generate_private_key(SECP384R1())
        private, public = self.folder / f"node-{number}", self.folder / f"node-{number}.pub"
        write_atomic(
            private, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        )
        write_atomic(public, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
        call_flwr(self._env, "supernode", "register", str(public), CONNECTION)
        return private

    @contextmanager
    def _process(self, name: str, command: list[str]) -> Iterator[None]:
        command[0] = str(Path(sys.executable).parent / command[0])
        with open(self.folder / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                command,
                env={**os.environ, **self._env},
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def rounds(self, elements: int, *, rounds: int) -> list[float]:
        """Run FedAvg over clients that train nothing; return each round's seconds."""
        self._runs += 1
        out = self.folder / f"times-{self._runs}.json"
        app = self.folder / "app"
        shutil.rmtree(app, ignore_errors=True)
        shutil.copytree(NOOP, app / "noop", ignore=shutil.ignore_patterns("__pycache__"))
        settings = {"elements": elements, "rounds": rounds, "out": str(out.resolve())}
        components = {"serverapp": "noop.app_server:app", "clientapp": "noop.app_client:app"}
        flower = {"publisher": "benchmark", "components": components, "config": settings}
        table = {
            "project": {
                "name": "noop",
                "version": "1.0.0",
                "license": "Apache-2.0",
                "dependencies": [],
            },
            "tool": {"flwr": {"app": flower}},
        }
        write_atomic(app / "pyproject.toml", tomli_w.dumps(table).encode())
        call_flwr(self._env, "run", str(app), CONNECTION)
        await_true(out.is_file, WAIT_S, what="Flower's rounds")
        time.sleep(0.2)
        times: list[float] = json.loads(out.read_text())
        return [after - before for before, after in pairwise(times)]


def _answers(url: str, authority: Path) -> bool:
    try:
        return httpx.get(url, verify=str(authority), timeout=1.0, trust_env=False).is_success
    except httpx.HTTPError:
        return False
