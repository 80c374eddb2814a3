"""A site's gate: nothing but the site's own bundle comes in, and nobody but the node goes out."""

import hashlib
import json
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.proto.fab_pb2 import Fab, GetFabResponse
from starlette.requests import Request
from starlette.responses import Response

from intramural.client.gate import (
    GateSettings,
    NodeGatekeeper,
    build_gate,
    own_bundle_hash,
    settings_of,
)
from intramural.core.bundle import write_bundle
from intramural.core.journal import scan, utc_now
from intramural.trust.alerts import Alerts
from intramural.trust.connection import Source
from intramural.trust.denial import Denied
from intramural.trust.keys import private_folder
from intramural.trust.limits import GateLimits
from tests.trust.lines import (
    PROTOBUF,
    Doorman,
    FakeUpstream,
    client,
    exchange,
    free_port,
    line,
    running,
    serving,
    wait_for,
)
from tests.trust.members import new_kit, request_of
from tests.trust.pki import Authority, Papers

GET_FAB, GET_RUN = "/v1/fleet/get-fab", "/v1/fleet/get-run"
OWN, OTHER = b"our own bundle", b"import os"
OWN_HASH, OTHER_HASH = (hashlib.sha256(one).hexdigest() for one in (OWN, OTHER))
FLOWERS_OWN = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")


class Site:
    """A site's gate, and a coordinator's gate with a fake SuperLink behind it."""

    def __init__(self, folder: Path) -> None:
        self.ca = Authority(folder / "ca")
        self.papers, self.server = self.ca.site("a"), self.ca.server()
        self.superlink = FakeUpstream()
        self.alerts: list[dict[str, Any]] = []
        self.file = folder / "state" / "gate.json"

    @contextmanager
    def coordinator(self, port: int = 0) -> Iterator[int]:
        with serving(self.superlink, free_port()) as address:
            doorman = Doorman({self.papers.digest: "a"})
            one = line(address, papers=self.server, doorman=doorman, small_bytes_max=8 << 20)
            with running(one.gate, port) as chosen:
                yield chosen

    @contextmanager
    def gate(self, coordinator: str, **changes: Any) -> Iterator[int]:
        settings: dict[str, Any] = {
            "port": 0,
            "coordinator": coordinator,
            "certificate": self.papers.certificate,
            "key": self.papers.key,
            "authority": self.papers.authority,
            "bundle_hashes": frozenset({OWN_HASH}),
            "status": self.file,
        }
        alerts = Alerts(self.alerts.append, now=utc_now)
        with running(build_gate(GateSettings(**settings | changes), alerts=alerts)) as port:
            yield port

    @contextmanager
    def node(self, **changes: Any) -> Iterator[httpx.Client]:
        """Yield a client where the SuperNode would be."""
        with (
            self.coordinator() as behind,
            self.gate(f"127.0.0.1:{behind}", **changes) as port,
            client(port) as one,
        ):
            yield one

    @property
    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.file.read_text())
        return found


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def bundle(content: bytes, **fields: Any) -> bytes:
    return bytes(GetFabResponse(fab=Fab(content=content, **fields)).SerializeToString())


def fetch(site: Site, node: httpx.Client, body: bytes, *, status: int = 200) -> httpx.Response:
    """Ask for a bundle; the coordinator answers with `body`."""

    async def answer(_: Request) -> Response:
        return Response(body, status, media_type="application/protobuf")

    site.superlink.answers[GET_FAB] = answer
    return node.post(GET_FAB, content=OWN_HASH.encode(), headers=PROTOBUF)


def test_bytes_pass_both_gates_as_they_are(site: Site) -> None:
    sent = bytes(range(256)) * 20_000
    mine = {"flwr-public-key": "k", "flwr-signature": "s", "flwr-timestamp": "t"}
    with site.node() as node:
        answer = node.post("/v1/fleet/push-object", content=sent, headers=PROTOBUF | mine)
    assert answer.text == hashlib.sha256(sent).hexdigest()
    seen = site.superlink.seen[0]
    assert (seen.size, seen.sha256) == (len(sent), answer.text)
    assert {name: seen.headers[name] for name in mine} == mine
    assert site.status["node"]["bytes_up"] == len(sent)
    assert site.status["coordinator"]["reachable"] is True


def test_the_sites_own_bundle_comes_in_and_nothing_rides_along(site: Site) -> None:
    with site.node() as node:
        answer = fetch(
            site, node, bundle(OWN, hash_str="x", verifications={"y": "z"}) + b"\x1a\x00"
        )
    assert answer.status_code == 200
    assert answer.content == bundle(OWN, hash_str=OWN_HASH)


FORGED = {
    "another": bundle(OTHER),
    "with the right hash written on it": bundle(OTHER, hash_str=OWN_HASH),
    "after the right one": bundle(OWN) + bundle(OTHER),
    "with a byte more": bundle(OWN + b"\x00"),
    "empty": b"",
    "no protobuf": b"\xff\xff\xff",
}


def test_another_bundle_does_not_come_in(site: Site) -> None:
    with site.node() as node:
        for kind, body in FORGED.items():
            answer = fetch(site, node, body)
            assert (answer.status_code, answer.text) == (403, "refused: bundle\n"), kind
        for body in (bundle(b"x" * (1 << 20)), bundle(b"x" * (3 << 20))):
            assert fetch(site, node, body).status_code == 403
        for status in (201, 206, 300, 307):  # Flower reads any 2xx as a bundle, and follows 307
            assert fetch(site, node, bundle(OTHER), status=status).status_code == 502
        assert fetch(site, node, b"{}", status=404).text == "{}"
        assert fetch(site, node, bundle(OWN)).status_code == 200
    first = site.alerts[0]
    assert (first["alert"], first["sha256"]) == ("bundle-refused", OTHER_HASH)
    assert site.status["node"]["refusals"] == {"bundle": len(FORGED) + 2}


def test_no_bundle_comes_in_where_none_is_allowed(site: Site) -> None:
    with site.node(bundle_hashes=frozenset()) as node:
        assert fetch(site, node, bundle(OWN)).status_code == 403


@FLOWERS_OWN
def test_the_bundle_let_in_is_the_one_that_flower_would_build_here(tmp_path: Path) -> None:
    app, _ = write_bundle(tmp_path, {"resume": True})
    assert own_bundle_hash() == hashlib.sha256(build_fab_from_disk(app)).hexdigest()


@pytest.mark.parametrize(
    "host", ["gate.example", "127.0.0.1.gate.example", "10.0.0.1:80", "localhost.", "127.0.0.1:"]
)
def test_what_a_web_page_asks_of_a_rebound_name_is_refused(site: Site, host: str) -> None:
    head = f"POST {GET_RUN} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
    with site.node() as node:
        port = node.base_url.port or 0
        content = f"{head}Content-Type: application/protobuf\r\nContent-Length: 0\r\n\r\n"
        assert exchange(port, content.encode()).endswith(b"refused: host\n")
    assert site.superlink.seen == []


@pytest.mark.parametrize(
    ("verb", "status", "is_out"),
    [
        ("confirm-message-received", 403, True),
        ("pull-object", 403, True),
        ("confirm-message-received", 200, False),
        ("confirm-message-received", 503, False),
        ("push-messages", 403, False),
        ("pull-messages", 403, False),
    ],
)
def test_a_node_that_keeps_a_message_of_a_run_that_is_over_is_to_be_started_anew(
    site: Site, tmp_path: Path, verb: str, status: int, is_out: bool
) -> None:
    async def answer(_: Request) -> Response:
        return Response(b"", status, media_type="application/protobuf")

    site.superlink.answers[f"/v1/fleet/{verb}"] = answer
    restart = tmp_path / "restart"
    with site.node(restart=restart) as node:
        assert node.post(f"/v1/fleet/{verb}", headers=PROTOBUF).status_code == status
    assert restart.exists() == is_out
    assert ("node-out-of-step" in [one["alert"] for one in site.alerts]) == is_out


def test_only_this_machine_is_let_out() -> None:
    gatekeeper = NodeGatekeeper(bundle_hashes=frozenset(), alerts=Alerts(print, now=utc_now))
    for address in ("127.0.0.1", "127.8.9.1", "::1"):
        assert gatekeeper.identify(Source(address=address, certificate=None)) == "node"
    for address in ("10.0.0.1", "::ffff:10.0.0.1", "fe80::1", "0.0.0.0", "", "localhost"):
        with pytest.raises(Denied, match="not-loopback"):
            gatekeeper.identify(Source(address=address, certificate=None))


def test_without_a_coordinator_the_node_is_told_to_try_again_at_once(site: Site) -> None:
    behind = free_port()
    with site.gate(f"127.0.0.1:{behind}") as port, client(port) as node:
        began = time.monotonic()
        statuses = [node.post(GET_RUN, headers=PROTOBUF).status_code for _ in range(20)]
        assert time.monotonic() - began < 4  # of 20, each of which may not wait for a while
        assert statuses == [503] * 20
    assert [one["alert"] for one in site.alerts] == ["coordinator-unreachable"]
    assert site.alerts[0]["why"] == "connection refused"
    assert site.status["coordinator"]["reachable"] is False


def test_a_coordinator_that_comes_back_is_found(site: Site) -> None:
    behind, quick = free_port(), GateLimits(retry_s=0.05)
    with site.gate(f"127.0.0.1:{behind}", limits=quick) as port, client(port) as node:
        for _ in range(2):
            with site.coordinator(behind):
                wait_for(lambda: node.post(GET_RUN, headers=PROTOBUF).status_code == 200)
            wait_for(lambda: node.post(GET_RUN, headers=PROTOBUF).status_code == 503)
    words = [one["alert"].removeprefix("coordinator-") for one in site.alerts]
    assert words == ["unreachable", "reachable", "unreachable"]  # not that all is well at first


def whys(site: Site, papers: Papers, *, host: str = "127.0.0.1") -> str:
    """Return why the gate says that it cannot speak with a coordinator of these papers."""
    with ExitStack() as stack:
        address = stack.enter_context(serving(site.superlink, free_port()))
        one = line(address, papers=papers, doorman=Doorman({site.papers.digest: "a"}))
        behind = stack.enter_context(running(one.gate))
        port = stack.enter_context(site.gate(f"{host}:{behind}"))
        node = stack.enter_context(client(port))
        assert node.post(GET_RUN, headers=PROTOBUF).status_code == 503
    assert site.superlink.seen == []
    return str(site.alerts.pop()["why"])


def test_a_false_coordinator_gets_not_a_byte_and_the_reason_is_told(
    site: Site, tmp_path: Path
) -> None:
    others = Authority(tmp_path / "others")
    assert "self-signed certificate in certificate chain" in whys(site, others.server())
    assert "IP address mismatch" in whys(site, site.ca.server(host="10.0.0.1"))
    assert "Hostname mismatch" in whys(site, site.server, host="localhost")
    assert "unsuitable certificate purpose" in whys(site, site.ca.site("b"))


def test_a_site_whose_certificate_is_refused_learns_so(site: Site, tmp_path: Path) -> None:
    stranger = Authority(tmp_path / "others").site("a")
    site.papers = Papers(
        certificate=stranger.certificate,
        key=stranger.key,
        authority=site.ca.file,
        digest=stranger.digest,
    )
    assert "it may refuse the certificate shown" in whys(site, site.server)


def test_an_older_tls_is_not_spoken(site: Site) -> None:
    with site.coordinator() as behind:
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        old.load_verify_locations(site.ca.file)
        old.load_cert_chain(site.papers.certificate, site.papers.key)
        with pytest.raises(ssl.SSLError):
            exchange(behind, b"", old)


def member(folder: Path, site: Site, *, port: int) -> Path:
    """Write what `client join` leaves of a site; return its site.toml."""
    trust = folder / "trust"
    private_folder(trust)
    kit = new_kit(request_of("a"), host="127.0.0.1", port=port)
    (trust / "kit.json").write_text(kit.model_dump_json())
    site.papers.key.rename(trust / "tls.key")
    site.papers.certificate.rename(trust / "tls.pem")
    site.ca.file.rename(trust / "authority.pem")  # not the kit's, so that the fake passes
    return folder / "site.toml"


@FLOWERS_OWN
def test_as_a_process_it_serves_a_sites_folder_until_told(tmp_path: Path, site: Site) -> None:
    with site.coordinator() as behind, ExitStack() as stack:
        site_toml = member(tmp_path, site, port=behind)
        assert settings_of(site_toml, port=1).bundle_hashes == {own_bundle_hash()}
        words = ["-m", "intramural.client.gate", "--site", str(site_toml), "--port", "0"]
        gate = stack.enter_context(
            subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True)
        )
        assert gate.stdout is not None
        first = json.loads(gate.stdout.readline())
        assert (first["alert"], first["host"]) == ("listening", "127.0.0.1")
        with client(first["port"]) as node:
            assert fetch(site, node, bundle(OTHER)).status_code == 403
        second = json.loads(gate.stdout.readline())
        assert (second["alert"], second["sha256"]) == ("bundle-refused", OTHER_HASH)
        gate.send_signal(signal.SIGTERM)
        assert gate.wait(10) == 0
    assert site.status["node"]["refusals"] == {"bundle": 1}
    (entry,) = scan(tmp_path / "state" / "journal.jsonl").entries
    assert (entry.kind, entry.body["sha256"]) == ("bundle-refused", OTHER_HASH)
