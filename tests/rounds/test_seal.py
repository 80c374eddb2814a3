"""Seal: what a deployment of real processes refuses, and where it listens."""

import json
import re
import ssl
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from intramural.client import thin
from intramural.client.worker import address_of, socket_file
from intramural.core.config import load_config
from intramural.core.federation import FederationConfig
from intramural.core.journal import scan
from intramural.core.letter import Letter, read_reply
from intramural.core.messages import Refusal
from intramural.server.orders import Order
from intramural.simulations.loopback import await_end, await_true
from intramural.trust.keys import read_signing_key
from intramural.trust.seal import COORDINATOR, sealer, site_role
from tests.rounds.runs import run
from tests.rounds.seal_bundle import (
    MARKER,
    markers,
    node_without_gate,
    submit,
    told,
    write_code,
)
from tests.rounds.seal_census import Place, listening, spoken_to
from tests.rounds.seal_meddler import Meddler
from tests.rounds.seal_net import Tapped
from tests.rounds.seal_table import (
    FIRST,
    HANDSHAKE,
    SITES,
    Row,
    first_of,
    online,
    rows_of,
    sealed,
    table_of,
)
from tests.tiny import federation, sites, table
from tests.trust.lines import connect
from tests.trust.members import openssl

CODE_S, RUN_S, LOOK_S = 90.0, 300.0, 0.3
Deployment = tuple[Tapped, Meddler]
Json = dict[str, Any]
FLOWERS_OWN = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Yield a coordinator and two sites that are up; site-1's node speaks through a meddler."""
    with sealed(tmp_path_factory.mktemp("seal")) as both:
        yield both


def strays(net: Tapped) -> list[bytes]:
    """Return what was asked of SuperLink through its line but for the fleet API and its health."""
    said = net.taps["superlink"].said("up")
    return re.findall(rb"(?:GET|POST) /(?!v1/fleet/|health )\S*", said)


def is_refused(row: Row) -> bool:
    """Return whether a request was refused to all; that it was well formed its own host shows.

    A member under its own key passes the gate; that the key is not that of the node it names is
    for SuperLink to see, which verifies the signature.
    """
    by = dict(row.outcomes)
    site, host = by["other site"], by.pop("host, no gate", "SuperLink 200")
    is_number = row.what.endswith("its node id")
    words = ["SuperLink 401"] if is_number else ["gate 404 path", "gate 403 foreign-key"]
    words += [] if is_number else ["gate 403 message"]
    return host.startswith("SuperLink ") and by == {
        "CA only": HANDSHAKE,
        "other federation": HANDSHAKE,
        "other site": site if site in words else "refused",
        "revoked": "gate 403 unknown-certificate",
    }


@FLOWERS_OWN
def test_nobody_is_let_at_what_is_not_theirs(deployment: Deployment) -> None:
    net, meddler = deployment
    first, before = first_of(meddler), strays(net)
    nodes = online(net)
    rows = rows_of(net, first)
    print(f"\n{table_of(rows)}")
    assert [row for row in rows if not is_refused(row)] == []
    host = {row.what.partition(" (")[0]: row.outcomes.get("host, no gate") for row in rows[:5]}
    assert host["submit a run"] == host["list nodes"] == "SuperLink 200"  # without the gate
    assert strays(net) == before
    assert online(net) == nodes
    assert first.node_id in nodes
    log = (net.coordinator / "logs" / "gate.log").read_text()
    alerts = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert ("key-of-another-site", "site-3") in [(one["alert"], one["peer"]) for one in alerts]


def documented(net: Tapped, who: str) -> set[Place]:
    """Return where somebody may listen: the coordinator's gate at its address, else loopback."""
    line = net.lines[who]
    if who == "coordinator":
        return {("inet", f"127.0.0.1:{port}") for port in (net.gate_port, line["superlink"])}
    worker = socket_file(net.site_file(who)).resolve()
    ports = {("inet", f"127.0.0.1:{line[name]}") for name in ("gate", "runtime")}
    return ports | {("unix", str(worker))}


def dialled(net: Tapped, who: str) -> set[str]:
    """Return whom somebody may speak to: its own processes, and a site's gate the coordinator's."""
    line = net.lines[who]
    if who == "coordinator":
        ports = {line["superlink"], net.superlink_dialled}
    else:
        ports = {line["gate"], line["node"], line["runtime"], net.gate_port}
    return {f"127.0.0.1:{port}" for port in ports}


def test_nothing_listens_but_what_is_documented(deployment: Deployment) -> None:
    net, _ = deployment
    for who in ("coordinator", *SITES):
        assert listening(net, who) == documented(net, who)
        assert spoken_to(net, who) <= dialled(net, who)


@dataclass
class Seen:
    """Where each was seen to listen, and whom to speak to."""

    listening: dict[str, set[Place]] = field(default_factory=lambda: defaultdict(set))
    spoken_to: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))


@contextmanager
def watched(net: Tapped) -> Iterator[Seen]:
    """Look again and again within the block."""
    seen, stop = Seen(), threading.Event()

    def look() -> None:
        while not stop.wait(LOOK_S):
            for who in ("coordinator", *SITES):
                seen.listening[who] |= listening(net, who)
                seen.spoken_to[who] |= spoken_to(net, who)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def test_tls_13_alone_is_spoken(deployment: Deployment) -> None:
    net, _ = deployment
    papers = net.site_file(FIRST).parent / "trust"
    place = ["s_client", "-connect", f"127.0.0.1:{net.gate_port}", "-CAfile"]
    place += [str(papers / "authority.pem"), "-verify_return_error", "-cert"]
    place += [str(papers / "tls.pem"), "-key", str(papers / "tls.key")]
    assert re.search("New, TLSv1.3", openssl(*place, "-tls1_3"))
    old = ["-cipher", "ALL:@SECLEVEL=0"]
    for version in ("-tls1_2", "-tls1_1"):  # said hello, and got no byte in answer
        found = openssl(*place, version, *old, fails=True)
        assert re.search(r"has read 0 bytes and written [1-9]\d* bytes", found), found
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.load_verify_locations(papers / "authority.pem")
    bare.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        connect(net.gate_port, bare)


def ordered(net: Tapped, bert: Path, *, name: str, rounds: int) -> tuple[Order, Json]:
    """Order a run that both sites have approved; return it with the simulation's report."""
    told: Json = {"federation": {"name": name, "rounds": rounds}, "evaluation": {"every": 0}}
    told |= {"sites": {"min": 2}, "strategy": {"momentum": 0.5}}
    file = net.folder / f"{name}.toml"
    file.write_text(tomli_w.dumps(table(bert, **told)))
    simulated = sites(net.folder / f"{name}-simulated", 2)
    report = run(net.folder / f"{name}-simulation", federation(bert, **told), simulated)
    return net.run(file, name=name), report


@pytest.mark.slow
def test_a_bundle_with_code_runs_at_no_site_and_our_own_run_goes_on(
    deployment: Deployment, bert: Path, tmp_path: Path
) -> None:
    net, _ = deployment
    tell, superlink = tmp_path / "told.json", net.superlink_port
    code = write_code(tmp_path / "code", tell=tell, nodes=3)
    with node_without_gate(tmp_path / "bare", superlink=superlink):
        submit(code, tmp_path / "home", superlink=superlink)
        await_true(tell.is_file, CODE_S, what="the word of the bundle's ServerApp")
    found = told(tell)
    assert (len(found["asked"]), len(found["answered"])) == (3, 1)
    assert markers(tmp_path) == [tmp_path / "bare" / MARKER]  # where no gate is, it runs
    assert markers(net.folder) == []
    for site in SITES:
        refused = journalled(net, site, "bundle-refused")
        assert [body["why"] for body in refused] == [
            "not the one that this installation would build"
        ]
    with watched(net) as seen:
        order, report = ordered(net, bert, name="after-code", rounds=1)
        assert await_end(order, RUN_S) == {"error": None, "exit_code": 0}
    assert json.loads((order.folder / "report.json").read_text())["digest"] == report["digest"]
    for who in ("coordinator", *SITES):
        assert seen.listening[who] == documented(net, who)
        assert seen.spoken_to[who] <= dialled(net, who)


def journalled(net: Tapped, site: str, kind: str) -> list[Json]:
    """Return the bodies of a site's journal's entries of a kind."""
    journal = net.site_file(site).parent / "state" / "journal.jsonl"
    return [entry.body for entry in scan(journal).entries if entry.kind == kind]


def shifted(letter: Letter) -> Letter:
    """Return a letter whose vector differs in one bit of one number."""
    assert letter.vector is not None
    return replace(letter, vector=bytes([letter.vector[0] ^ 1]) + letter.vector[1:])


def heavier(letter: Letter) -> Letter:
    """Return an update that would count a thousand times as much."""
    header = re.sub(r'"weight":(\d+)', r'"weight":\g<1>000', letter.header)
    assert header != letter.header
    return replace(letter, header=header)


def sealed_by(role: str, key: Ed25519PrivateKey, letter: Letter) -> Letter:
    """Return a letter sealed anew."""
    return replace(letter, seal=sealer(role, key)(letter.header.encode(), letter.vector))


@dataclass
class Forger:
    """Sends what an attacker without a key can send in place of a site's updates."""

    net: Tapped
    genuine: list[Letter] = field(default_factory=list)

    def __call__(self, letter: Letter) -> Letter | None:
        self.genuine.append(letter)
        key = read_signing_key(self.net.site_file("site-2").parent / "trust" / "signing.key")
        attempts = {
            1: shifted,
            2: lambda own: sealed_by(site_role(FIRST), key, own),
            4: lambda _: self.genuine[0],  # round 2 gets round 1's very answer
            5: heavier,
        }
        forge = attempts.get(len(self.genuine))
        return None if forge is None else forge(letter)


@pytest.mark.slow
def test_what_was_altered_or_replayed_is_refused_and_journalled(
    deployment: Deployment, bert: Path
) -> None:
    net, meddler = deployment
    forger = meddler.forge = Forger(net)
    order, report = ordered(net, bert, name="forged", rounds=3)
    assert await_end(order, RUN_S) == {"error": None, "exit_code": 0}
    # Flower took each forgery: its signature covers a time alone, which was good for 300 s
    assert meddler.forged == [(200, True)] * 4
    entries = scan(order.folder / "journal.jsonl").entries
    refused = [e.body for e in entries if e.kind == "refused" and e.body["site"] == FIRST]
    reasons = [(body["round"], body["reason"]) for body in refused]
    assert reasons == [(1, "trust"), (1, "trust"), (2, "wire"), (2, "trust")]
    assert json.loads((order.folder / "report.json").read_text())["digest"] == report["digest"]
    trained = [b["round"] for b in journalled(net, FIRST, "trained") if b["run"] == "forged"]
    assert trained == [1, 2, 3]  # what was refused was asked again, and not trained again
    check_requests(net, order, meddler, forger)


def check_requests(net: Tapped, order: Order, meddler: Meddler, forger: Forger) -> None:
    """Send the worker what passed its node's line, as it was and altered."""
    envelope = order.envelope
    manifest = load_config(order.folder / "federation.toml", FederationConfig).digest
    marks = ('"kind":"TrainRequest"', manifest)
    asked = [one for one in meddler.requests() if all(mark in one.header for mark in marks)]
    first, last = asked[0], asked[-1]
    trained = len(journalled(net, FIRST, "trained"))
    key = read_signing_key(net.site_file("site-2").parent / "trust" / "signing.key")
    renumbered = replace(last, header=last.header.replace('"round":3', '"round":4'))
    assert renumbered != last
    for spoilt in (shifted(last), renumbered, sealed_by(COORDINATOR, key, last)):
        assert reason_of(asked_of_worker(net, envelope, spoilt)) == "trust"
        journal = journalled(net, FIRST, "refused")[-1]
        assert journal == {"reason": "trust", "letter": spoilt.digest}
    assert asked_of_worker(net, envelope, last) == forger.genuine[-1]  # the very same answer
    assert journalled(net, FIRST, "resent")[-1]["letter"] == last.digest
    assert reason_of(asked_of_worker(net, envelope, first)) == "stale"
    assert journalled(net, FIRST, "refused")[-1]["letter"] == first.digest
    assert len(journalled(net, FIRST, "trained")) == trained


def asked_of_worker(net: Tapped, envelope: str, letter: Letter) -> Letter:
    """Hand a letter to the first site's worker, as any program of that site's user could."""
    return thin.ask(address_of(socket_file(net.site_file(FIRST))), envelope, letter)


def reason_of(answer: Letter) -> str:
    """Return why a letter was refused."""
    reply = read_reply(answer)
    assert isinstance(reply, Refusal)
    assert answer.seal is not None
    return reply.reason
