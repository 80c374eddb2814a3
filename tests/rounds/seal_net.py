"""Tapped: a deployment on loopback whose plain lines lead through the test."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from intramural.client.approve_cli import approvals_of
from intramural.client.worker import address_of, socket_file
from intramural.core.config import load_config
from intramural.core.errors import AwaitsApproval
from intramural.core.federation import FederationConfig
from intramural.core.site import load_site
from intramural.server.orders import Order
from intramural.server.settings import load_coordinator
from intramural.simulations.loopback import Loopback, await_true, free_ports
from tests.rounds.seal_tap import Tap, tapped

NODES_S = 90.0


@dataclass
class Tapped(Loopback):
    """Coordinator and sites; SuperLink, each gate and each worker is dialled through a tap."""

    lines: dict[str, dict[str, Any]] = field(default_factory=dict)
    """by who is started: the ports and addresses of `seal_up`"""
    taps: dict[str, Tap] = field(default_factory=dict)
    """'superlink', and by site 'SITE' (its node's line to its gate) and 'SITE-worker'"""

    @property
    def gate_port(self) -> int:
        """The coordinator's gate's."""
        return load_coordinator(self.coordinator).port

    @property
    def superlink_dialled(self) -> int:
        """The port at which SuperLink is dialled: its tap's."""
        return load_coordinator(self.coordinator).superlink_port

    @property
    def superlink_port(self) -> int:
        """SuperLink's own; that of coordinator.toml is the tap's."""
        return int(self.lines["coordinator"]["superlink"])

    def start(self, who: str) -> None:
        """Bring one up through its lines: 'coordinator', or a site's name."""
        place = self.coordinator if who == "coordinator" else self.site_file(who)
        words = ["-m", "tests.rounds.seal_up", str(place), json.dumps(self.lines[who])]
        with open(self.folder / f"{who}.log", "ab") as log:
            self.running[who] = subprocess.Popen(
                [sys.executable, *words],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **self.environment},
            )

    @contextmanager
    def lined(self, captures: Path, *, own: frozenset[str] = frozenset()) -> Iterator["Tapped"]:
        """Lay the lines, and have taps on them within the block.

        Args:
            captures: Where taps keep what passes.
            own: Sites whose node's line the test serves itself, at `lines[SITE]["node"]`.
        """
        with ExitStack() as stack:
            (superlink,) = free_ports(1)
            self.lines["coordinator"] = {"superlink": superlink}
            self.taps["superlink"] = stack.enter_context(
                tapped(self.superlink_dialled, superlink, captures / "superlink")
            )
            for site in self.sites:
                gate, runtime, node = free_ports(3)
                worker = self.folder / f"{site}.sock"
                self.lines[site] = {"gate": gate, "runtime": runtime, "node": node}
                self.lines[site]["worker"] = address_of(worker)
                self.taps[f"{site}-worker"] = stack.enter_context(
                    tapped(worker, socket_file(self.site_file(site)), captures / f"{site}-worker")
                )
                if site not in own:
                    self.taps[site] = stack.enter_context(tapped(node, gate, captures / site))
            yield self

    @contextmanager
    def up(self) -> Iterator["Tapped"]:
        """Have everybody up within the block; the sites go down at once, and not in turn."""
        with super().up():
            try:
                yield self
            finally:
                for site in set(self.sites) & set(self.running):
                    self.running[site].send_signal(signal.SIGTERM)

    def run(self, federation: Path, *, name: str) -> Order:
        """Order a run that the sites' people have approved before it greets them."""
        order = self.order(federation, name=name)
        config = load_config(federation, FederationConfig)
        for site in self.sites:
            approvals = approvals_of(self.site_file(site), load_site(self.site_file(site)))
            with suppress(AwaitsApproval):  # which is how it comes to wait
                approvals.admit(order.envelope, config)
            approvals.approve(config.digest, by="seal")
        return order

    def await_nodes(self) -> None:
        """Wait until each site's node was heard at the coordinator's gate."""
        status = self.coordinator / "gate" / "status.json"

        def heard() -> bool:
            if not status.is_file():
                return False
            return set(json.loads(status.read_text())["sites"]) >= set(self.sites)

        await_true(heard, NODES_S, what="a request of each site")
