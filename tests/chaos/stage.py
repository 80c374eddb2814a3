"""Stage: one deployment of tiny sites under privacy, on which run after run is disturbed."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from intramural.core.config import check_config
from intramural.core.federation import FederationConfig
from intramural.core.journal import scan
from intramural.server.orders import Order
from intramural.server.settings import load_coordinator
from intramural.simulations.loopback import Loopback, await_end, free_ports
from tests.chaos.relay import Relay
from tests.rounds.runs import run
from tests.tiny import rows, site, table

SITES = ("site-1", "site-2")
ROUNDS = 3
WAIT_S = 300.0
DISK_BYTES = 64 << 20
"""Room for an answer, with the 16 MiB that a site wants free beside it, and soon full."""
SEED = 7
PRIVACY = {
    "unit": "record",
    "noise_multiplier": 1.0,
    "delta": 1e-3,
    "clip_norm": 1.0,
    "nominal_records": 60,
}


@dataclass
class Stage:
    """The deployment, the run that is on, and what disturbs it."""

    folder: Path
    base: Path
    net: Loopback
    relay: Relay
    expected: str = ""
    """Digest of the undisturbed simulation."""
    order: Order | None = None
    mounts: list[Path] = field(default_factory=list)

    def journal(self) -> list[tuple[str, Any]]:
        """Return kinds and rounds of the run's journal so far."""
        assert self.order is not None
        entries = scan(self.order.folder / "journal.jsonl").entries
        return [(entry.kind, entry.body.get("round")) for entry in entries]

    def sent(self, name: str) -> int:
        """Return how many updates a site has sent so far, over all runs."""
        path = self.net.folder / name / "state" / "journal.jsonl"
        entries = scan(path).entries if path.is_file() else ()
        return sum(
            e.kind in ("sent", "resent") and e.body.get("vector") is not None for e in entries
        )

    def kill(self, who: str, what: str) -> int | None:
        """Kill -9 a supervisor's child, or a process that Flower started below one."""
        if what == "serverapp":
            return self._kill_below(self.net.pid("coordinator", "superlink"), "flwr-serverapp")
        if what == "clientapp":
            return self._kill_below(self.net.pid(who, "supernode"), "flwr-clientapp")
        pid = self.net.pid(who, what)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return pid

    def _kill_below(self, pid: int | None, name: str) -> int | None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(pid).children(recursive=True):
                if any(name in word for word in process.cmdline()[:3]):
                    process.kill()
                    return int(process.pid)
        return None

    def begin(self, name: str) -> None:
        """Order a run."""
        self.order = self.net.order(self.folder / "federation.toml", name=name)

    def finish(self) -> dict[str, Any]:
        """Wait for the run's end and return how it stands, proved by both sides' own commands."""
        assert self.order is not None
        outcome = await_end(self.order, WAIT_S)
        found = {"outcome": outcome["error"], "digest": None, "verified": False}
        committed = [
            entry.body["digest"]
            for entry in scan(self.order.folder / "journal.jsonl").entries
            if entry.kind == "committed"
        ]
        found["digest"] = committed[-1] if committed else None
        found["verified"] = all(
            _call("server", "verify", self.order.name, "--dir", str(self.net.coordinator)) == 0
            if name == "coordinator"
            else _call("client", "verify", str(self.net.site_file(name))) == 0
            for name in ("coordinator", *SITES)
        )
        return found

    def fill(self, place: Path) -> Path:
        """Fill the small disk that is mounted at a place; return the file that fills it."""
        filler = place / "filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)
        return filler


def _call(*words: str) -> int:
    done = subprocess.run(["intramural", *words], capture_output=True, check=False, timeout=120)
    return done.returncode


def federation_table(base: Path) -> dict[str, Any]:
    """Return the federation of all runs."""
    return table(
        base,
        federation={"rounds": ROUNDS},
        sites={"min": len(SITES), "deadline_s": 240.0},
        strategy={"momentum": 0.5, "weights": "equal"},
        training={"local_steps": 40, "batch_size": 16},
        privacy=PRIVACY,
    )


def write_sites(folder: Path) -> None:
    """Write the sites' folders; each ledger and each state lies where a small disk can be."""
    records = rows()
    for number, name in enumerate(SITES):
        path = site(
            folder,
            name,
            records[number :: len(SITES)],
            data={
                "path": "records.jsonl",
                "text": "title",
                "label": "chapter",
                "name": "titles",
                "ledger": "ledger/titles.jsonl",
            },
            policy={
                "require_privacy": True,
                "epsilon_run": 1e6,
                "not_private_seed": SEED,
                "retries_max": 50,
            },
        )
        (path.parent / "ledger").mkdir()


@contextmanager
def stage(folder: Path, base: Path, *, disks: bool) -> Iterator[Stage]:
    """Set the stage: simulate what is expected, found the deployment, bring it up, approve."""
    config = federation_table(base)
    write_sites(folder / "simulated")
    federation = check_config(config, FederationConfig, source="chaos")
    report = run(folder / "simulation", federation, folder / "simulated")
    write_sites(folder / "net")
    net = Loopback(folder=folder / "net", sites=SITES)
    net.found(name="chaos")
    public = load_coordinator(net.coordinator).port  # in the kits; the relay takes it over
    (onward,) = free_ports(1)
    toml = net.coordinator / "coordinator.toml"
    toml.write_text(re.sub(rf"(?m)^port = {public}\b", f"port = {onward}", toml.read_text()))
    relay = Relay(public, onward=onward)
    one = Stage(folder=folder, base=base, net=net, relay=relay, expected=report["digest"])
    (folder / "federation.toml").write_text(tomli_w.dumps(config))
    try:
        if disks:
            _mount(one)
        with net.up():
            one.begin("calm")
            for name in SITES:
                net.approve(name, wait_s=WAIT_S)
            yield one
    finally:
        relay.close()
        for place in one.mounts:
            subprocess.run(["umount", "-l", str(place)], check=False)  # some process may still end


def _mount(one: Stage) -> None:
    """Put a small disk under each place whose disk is to be full once."""
    (one.net.coordinator / "runs").mkdir(exist_ok=True)
    for place in (
        one.net.coordinator / "runs",
        one.net.folder / SITES[0] / "ledger",
        one.net.folder / SITES[0] / "state",
    ):
        place.mkdir(exist_ok=True)
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)], check=True
        )
        one.mounts.append(place)


def wait_until(condition: Callable[[], bool], *, what: str, seconds: float = WAIT_S) -> None:
    """Wait, looking often: moments are short."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.002)
