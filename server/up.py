"""`server up`: the coordinator's processes and runs, kept going until it is told to stop."""

import logging
import sys
import threading
from pathlib import Path

import httpx

from intramural.core.children import Child, Children, listens
from intramural.core.errors import ConfigError
from intramural.core.files import Held, exclusive
from intramural.server.flwr_cli import flower_home
from intramural.server.keeper import Keeper
from intramural.server.register import mend_roster
from intramural.server.settings import Coordinator, load_coordinator

LOCK, STATUS, LOGS, FLOWER = "up.lock", "children.json", "logs", "flower"
LOOK_S = 0.25
TASK_POLL_S = "0.05"
"""Pause of Flower's executor between two looks for work; its default of a second is a third of a
round without work."""

log = logging.getLogger(__name__)


def coordinator_up(home: Path, *, stop: threading.Event) -> None:
    """Keep gate, SuperLink and wanted runs going until `stop` is set.

    Args:
        home: The coordinator's folder, as `server init` made it.
        stop: Set by a signal's handler.

    Raises:
        ConfigError: The folder is no coordinator's, or another process keeps it up.
        TrustError: Its roster and journal contradict each other.
    """
    settings = load_coordinator(home)
    mend_roster(home)  # a crash may have left it one change behind the journal
    try:
        with exclusive(home / LOCK):
            _keep(home, settings, stop)
    except Held:
        raise ConfigError(
            f"{home}: a coordinator is up there already; see `server status`"
        ) from None


def is_up(home: Path) -> bool:
    """Return whether a supervisor keeps this coordinator."""
    try:
        with exclusive(home / LOCK):
            return False
    except Held:
        return True


def _keep(home: Path, settings: Coordinator, stop: threading.Event) -> None:
    address = f"127.0.0.1:{settings.superlink_port}"
    env = flower_home(home / FLOWER, address=address)
    keeper = Keeper(home, env)
    started: int | None = None
    children = Children(_children(home, settings, env), logs=home / LOGS, status=home / STATUS)
    with children:
        while not stop.is_set():
            is_ready = children.tend()
            pid = children.pid("superlink")
            if pid != started:
                keeper.superlink_started()
                started = pid
            if is_ready:
                keeper.tend()
            stop.wait(LOOK_S)


def _children(home: Path, settings: Coordinator, env: dict[str, str]) -> list[Child]:
    port = settings.superlink_port
    dialled = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.listen, settings.listen)
    superlink = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
    superlink += ["--database", str(home / FLOWER / "state.db"), "--isolation", "subprocess"]
    superlink += ["--disable-runtime-dependency-installation"]
    binaries = Path(sys.executable).parent
    gate = [sys.executable, "-m", "intramural.server.gate", "--dir", str(home.resolve())]
    return [
        Child(
            name="superlink",
            command=[str(binaries / superlink[0]), *superlink[1:]],
            env=env | {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": TASK_POLL_S},
            ready=lambda: _is_healthy(f"http://127.0.0.1:{port}/health"),
        ),
        Child(
            name="gate",
            command=gate,
            ready=lambda: listens(dialled, settings.port),
        ),
    ]


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(url, timeout=1.0, trust_env=False).is_success
    except httpx.HTTPError:
        return False
