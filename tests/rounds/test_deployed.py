"""A deployment of real processes on loopback ends where the simulation of the same sites does."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import tomli_w
from typer.testing import CliRunner

from intramural.__main__ import app
from intramural.client.proof import prove
from intramural.core.journal import scan
from intramural.core.site import load_site
from intramural.server.orders import Order
from intramural.simulations.loopback import Loopback, await_end, await_true
from tests.rounds.runs import run
from tests.tiny import federation, sites, table

APPROVAL_S, RUN_S = 240.0, 240.0
SITES = ("site-1", "site-2")


@pytest.fixture
def net() -> Iterator[Loopback]:
    """Yield a coordinator and two sites that are enrolled, and not up.

    In a folder of its own: under tmp_path a worker's socket could pass 107 bytes.
    """
    with TemporaryDirectory(prefix="net-", ignore_cleanup_errors=True) as short:
        loopback = Loopback(folder=sites(Path(short) / "net", 2), sites=SITES)
        loopback.found(name="tiny")
        yield loopback


def ordered(net: Loopback, bert: Path, **sections: dict[str, object]) -> tuple[Order, str]:
    """Order a run; return it with the digest that the simulation ends at."""
    content = table(bert, sites={"min": 2}, strategy={"momentum": 0.5}, **sections)
    file = net.folder / "federation.toml"
    file.write_text(tomli_w.dumps(content))
    simulated = sites(net.folder / "simulated", 2)
    config = federation(bert, sites={"min": 2}, strategy={"momentum": 0.5}, **sections)
    report = run(net.folder / "simulation", config, simulated)
    return net.order(file, name="autumn"), report["digest"]


def call(*words: object) -> dict[str, object]:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, object] = json.loads(done.output)
    return found


def test_a_deployed_run_ends_at_the_simulations_digest(net: Loopback, bert: Path) -> None:
    order, expected = ordered(net, bert)
    with net.up():
        for name in SITES:
            assert not list((net.folder / name).glob("state/approved/*"))
            net.approve(name, wait_s=APPROVAL_S)
        assert await_end(order, RUN_S) == {"error": None, "exit_code": 0}
        status = call("server", "status", "--dir", net.coordinator, "--json")
        assert status["up"]
        gate = status["gate"]
        assert isinstance(gate, dict)
        assert set(gate["sites"]) >= set(SITES)
    shown = call("server", "show", "autumn", "--dir", net.coordinator, "--json")
    assert shown["digest"] == expected
    verified = call("server", "verify", "--dir", net.coordinator, "--json")
    assert verified["runs"][0]["rounds"] == 2  # type: ignore[index]
    for name in SITES:
        file = net.site_file(name)
        kinds = [entry.kind for entry in scan(file.parent / "state" / "journal.jsonl").entries]
        assert kinds.count("trained") == 2
        assert kinds.index("approved") < kinds.index("trained")
        assert "resent" not in kinds
        assert prove(load_site(file), file.parent / "state" / "journal.jsonl")["ledger"] is None


@pytest.mark.slow
def test_what_is_killed_in_a_round_is_started_again_and_changes_no_bit(
    net: Loopback, bert: Path
) -> None:
    order, expected = ordered(net, bert, training={"local_steps": 40})
    journal = order.folder / "journal.jsonl"

    def opened(round_: int) -> bool:
        found = [(e.kind, e.body.get("round")) for e in scan(journal).entries]
        return ("opened", round_) in found

    with net.up():
        for name in SITES:
            net.approve(name, wait_s=APPROVAL_S)
        await_true(lambda: opened(1), APPROVAL_S, what="round 1")
        time.sleep(1.0)
        for who, child in (("site-1", "worker"), ("site-2", "supernode")):
            pid = net.pid(who, child)
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        await_true(lambda: opened(2), RUN_S, what="round 2")
        for child in ("superlink", "gate"):
            pid = net.pid("coordinator", child)
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        assert await_end(order, RUN_S) == {"error": None, "exit_code": 0}
    assert (
        call("server", "show", "autumn", "--dir", net.coordinator, "--json")["digest"] == expected
    )
    call("server", "verify", "--dir", net.coordinator, "--json")
    for name in SITES:
        call("client", "verify", net.site_file(name), "--json")
