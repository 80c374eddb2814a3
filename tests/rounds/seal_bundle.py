"""A bundle that carries code, as somebody on the coordinator's host could submit it to SuperLink.

It names the entry point that our own bundle names, and ships a package of our name: Flower puts a
bundle's folder before what is installed, so that this one would run in its place.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from intramural.core.bundle import CLIENT_APP
from intramural.core.children import QUIET
from intramural.server.flwr_cli import CONNECTION, call_flwr, flower_home
from intramural.simulations.loopback import free_ports

MARKER = "the-bundles-code-ran-here"
ANSWERS_S, STOP_S = 20.0, 30.0

CLIENT = f'''
import os, pathlib
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

pathlib.Path(os.environ["FLWR_HOME"], "{MARKER}").write_text("here")
app = ClientApp()

@app.query()
def query(message, context):
    return Message(RecordDict(), reply_to=message)
'''

SERVER = """
import json, pathlib, time
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    told = context.run_config
    while len(list(grid.get_node_ids())) < told["nodes"]:
        time.sleep(0.5)
    nodes = list(grid.get_node_ids())
    asked = [Message(RecordDict(), node, "query") for node in nodes]
    replies = list(grid.send_and_receive(asked, timeout=told["answers-s"]))
    good = [reply.metadata.src_node_id for reply in replies if not reply.has_error()]
    pathlib.Path(told["tell"]).write_text(json.dumps({"asked": nodes, "answered": good}))
"""


def write_code(folder: Path, *, tell: Path, nodes: int) -> Path:
    """Write the bundle.

    Args:
        folder: Gets it.
        tell: Where its ServerApp says which nodes it asked, and which answered.
        nodes: How many nodes it waits for.
    """
    table: dict[str, Any] = {
        "project": {"name": "intramural-run", "version": "0.1.0", "dependencies": []},
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "intramural",
                    "components": {"serverapp": "errand:app", "clientapp": CLIENT_APP},
                    "config": {"tell": str(tell), "nodes": nodes, "answers-s": ANSWERS_S},
                }
            }
        },
    }
    package = folder / "intramural"
    (package / "client").mkdir(parents=True)
    for name in ("", "client/"):
        (package / f"{name}__init__.py").write_text("")
    (package / "client" / "app.py").write_text(CLIENT)
    (folder / "errand.py").write_text(SERVER)
    (folder / "pyproject.toml").write_text(tomli_w.dumps(table))
    return folder


def submit(folder: Path, home: Path, *, superlink: int) -> str:
    """Submit a bundle to SuperLink, on its own host; return the run's number."""
    env = flower_home(home, address=f"127.0.0.1:{superlink}")
    return str(call_flwr(env, "run", str(folder), CONNECTION)["run-id"])


@contextmanager
def node_without_gate(home: Path, *, superlink: int) -> Iterator[None]:
    """Have a SuperNode of plain Flower up that dials SuperLink itself; it says goodbye at the end.

    Nothing that it starts is left behind.
    """
    home.mkdir(parents=True)
    (runtime,) = free_ports(1)
    binaries = Path(sys.executable).parent
    command = [str(binaries / "flower-supernode"), "--insecure"]
    command += ["--superlink", f"127.0.0.1:{superlink}", "--host", "127.0.0.1"]
    command += ["--port", str(runtime), "--isolation", "subprocess"]
    path = os.pathsep.join([str(binaries), os.environ["PATH"]])
    env = {**os.environ, **QUIET, "PATH": path, "FLWR_HOME": str(home)}
    with open(home / "log", "ab") as log:
        process = subprocess.Popen(
            command,
            env=env,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def markers(folder: Path) -> list[Path]:
    """Return where a bundle's code ran, of the Flower homes under a folder."""
    return sorted(folder.rglob(MARKER))


def told(path: Path) -> dict[str, list[int]]:
    """Return what the bundle's ServerApp said."""
    found: dict[str, list[int]] = json.loads(path.read_text())
    return found
