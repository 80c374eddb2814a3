"""Loopback: a whole deployment on this machine, as real processes, for chaos and benchmarks.

What `examples/two-hospitals/run.sh` does by hand: a coordinator and sites, each in its own folder
with its own keys, joined by TLS on loopback. No step is a shortcut: each is what a command does.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from intramural.client.approve_cli import approvals_of
from intramural.client.enrol import examine_kit, init_site, join
from intramural.core.errors import RoundError
from intramural.core.journal import utc_now
from intramural.core.site import load_site
from intramural.server.enrol import enrol_site, write_kit
from intramural.server.founding import init_coordinator
from intramural.server.orders import Order, place_order
from intramural.server.settings import Coordinator

STOP_S = 40.0
POLL_S = 0.1


@dataclass
class Loopback:
    """Coordinator and sites under one folder; each can be started, stopped and killed."""

    folder: Path
    sites: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    running: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    @property
    def coordinator(self) -> Path:
        """The coordinator's folder."""
        return self.folder / "coordinator"

    def site_file(self, site: str) -> Path:
        """Return a site's site.toml."""
        return self.folder / site / "site.toml"

    def found(self, *, name: str) -> None:
        """Make all keys and memberships; the sites' site.toml and records are there already."""
        port, superlink_port = free_ports(2)
        settings = Coordinator(
            name=name,
            host="127.0.0.1",
            listen="127.0.0.1",
            port=port,
            superlink_port=superlink_port,
        )
        init_coordinator(self.coordinator, settings)
        for site in self.sites:
            request = init_site(self.folder / site, name=site)
            kit = self.folder / f"{site}.kit"
            write_kit(kit, enrol_site(self.coordinator, request).kit)
            join(self.folder / site, examine_kit(self.folder / site, kit, now=utc_now()))

    def start(self, who: str) -> None:
        """Bring one up: 'coordinator', or a site's name."""
        words = ["server", "up", str(self.coordinator)]
        if who != "coordinator":
            words = ["client", "up", str(self.site_file(who))]
        with open(self.folder / f"{who}.log", "ab") as log:
            self.running[who] = subprocess.Popen(
                [sys.executable, "-m", "intramural", *words],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **self.environment},
            )

    def stop(self, who: str) -> None:
        """Bring one down as an operator would; kill it if it does not go."""
        process = self.running.pop(who, None)
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def order(self, federation: Path, *, name: str | None) -> Order:
        """Have a federation run by the coordinator that is up."""
        return place_order(self.coordinator, federation, name=name, models={}, passphrase=None)

    def approve(self, site: str, *, wait_s: float) -> None:
        """Approve what waits at a site, once it waits."""
        approvals = approvals_of(self.site_file(site), load_site(self.site_file(site)))
        waits = partial(approvals.proposals, "pending")
        await_true(lambda: bool(waits()), wait_s, what=f"a proposal at {site}")
        for proposal in waits():
            approvals.approve(proposal.digest, by="loopback")

    def pid(self, who: str, child: str) -> int | None:
        """Return the process number of one of a supervisor's children; None: not running."""
        folder = self.coordinator if who == "coordinator" else self.folder / who / "state"
        path = folder / "children.json"
        rows: list[dict[str, Any]] = (
            json.loads(path.read_text())["children"] if path.is_file() else []
        )
        return next((row["pid"] for row in rows if row["name"] == child), None)

    @contextmanager
    def up(self) -> Iterator["Loopback"]:
        """Have everybody up within the block."""
        try:
            for who in ("coordinator", *self.sites):
                self.start(who)
            yield self
        finally:
            for who in (*self.sites, "coordinator"):
                with contextlib.suppress(ProcessLookupError):
                    self.stop(who)


def await_true(condition: Callable[[], bool], seconds: float, *, what: str) -> None:
    """Wait until a condition holds.

    Raises:
        RoundError: It does not in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            raise RoundError(f"{what} did not come within {seconds:g} s; see the logs")
        time.sleep(POLL_S)


def await_end(order: Order, seconds: float) -> dict[str, Any]:
    """Wait for a run's outcome and return it."""
    await_true(lambda: order.outcome is not None, seconds, what=f"the end of {order.name}")
    outcome = order.outcome
    assert outcome is not None
    return outcome


def free_ports(count: int) -> list[int]:
    """Return ports of loopback that are free now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
