"""`client up`: a site's processes, kept going until it is told to stop."""

import os
import socket
import sys
import threading
from pathlib import Path

from intramural.client.enrol import SiteFolder, check_site
from intramural.client.thin import is_serving
from intramural.client.worker import (
    address_of,
    check_socket_path,
    socket_file,
    state_folder,
)
from intramural.core.children import QUIET, Child, Children, listens
from intramural.core.errors import ConfigError
from intramural.core.files import Held, exclusive
from intramural.core.journal import utc_now
from intramural.core.site import load_site
from intramural.trust.keys import PASSPHRASE

LOCK, STATUS, LOGS, FLOWER = "up.lock", "children.json", "logs", "flower"
LOOK_S = 0.25
WORKER_READY_S = 180.0
LOOPBACK = "127.0.0.1"
ENVIRONMENT = {
    **QUIET,
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
}
"""Nobody is called but the coordinator; and Flower's executor looks for work twenty times a second,
where its default is once."""


def site_up(site_file: Path, *, stop: threading.Event) -> None:
    """Keep a site's worker, gate and SuperNode going until `stop` is set.

    Args:
        site_file: site.toml of a site that has joined a federation.
        stop: Set by a signal's handler.

    Raises:
        ConfigError: site.toml is wrong, its folder's path is too long for the worker's socket, or
            the site is up already.
        TrustError: The site has not joined, or its keys or certificate cannot be used.
    """
    load_site(site_file)
    check_socket_path(socket_file(site_file))  # here: a worker that cannot start is tried for ever
    secret = os.environ.get(PASSPHRASE) or None
    check_site(site_file.resolve().parent, now=utc_now(), passphrase=secret)
    state = state_folder(site_file)
    try:
        with exclusive(state / LOCK):
            children = Children(_children(site_file), logs=state / LOGS, status=state / STATUS)
            with children:
                while not stop.is_set():
                    children.tend()
                    stop.wait(LOOK_S)
    except Held:
        raise ConfigError(f"{site_file}: the site is up already; see {state / STATUS}") from None


def _children(site_file: Path) -> list[Child]:
    """Return worker, gate and SuperNode; the two ports between them are any that are free."""
    file, path = str(site_file.resolve()), socket_file(site_file)
    gate, runtime = _free_port(), _free_port()
    binaries = Path(sys.executable).parent
    address = address_of(path)
    node = [str(binaries / "flower-supernode"), "--insecure", "--superlink", f"{LOOPBACK}:{gate}"]
    node += ["--host", LOOPBACK, "--port", str(runtime), "--isolation", "subprocess"]
    node += ["--node-config", f'worker="{address}"']
    search = os.pathsep.join([str(binaries), os.environ.get("PATH", "")])
    home = state_folder(site_file) / FLOWER
    return [
        Child(
            name="worker",
            command=[sys.executable, "-m", "intramural.client.worker", "--site", file],
            env=ENVIRONMENT,
            ready=lambda: is_serving(address),
            ready_s=WORKER_READY_S,
        ),
        Child(
            name="gate",
            command=[
                *(sys.executable, "-m", "intramural.client.gate"),
                *("--site", file, "--port", str(gate)),
            ],
            env=ENVIRONMENT,
            ready=lambda: listens(LOOPBACK, gate),
        ),
        Child(
            name="supernode",
            command=node,
            env=ENVIRONMENT | {"PATH": search, "FLWR_HOME": str(home.resolve())},
            restart=SiteFolder(root=site_file.resolve().parent).restart,
        ),
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port
