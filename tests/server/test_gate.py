"""The coordinator's gate: only enrolled sites, each under its own node, and replies alone."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree
from flwr.proto.node_pb2 import Node
from starlette.requests import Request
from starlette.responses import Response

from intramural.core.files import write_json
from intramural.core.journal import utc_now
from intramural.server.gate import GateSettings, build_gate
from intramural.server.roster_watch import RosterWatch
from intramural.server.settings import PORT_DEFAULT
from intramural.trust.alerts import Alerts
from intramural.trust.keys import public_bytes, write_public
from intramural.trust.roster import Roster, RosterEntry, sign_roster
from tests.trust.lines import PROTOBUF, FakeUpstream, client, free_port, running, serving
from tests.trust.members import entry_of, signing_key
from tests.trust.pki import Authority, Papers


class Coordinator:
    """A gate with its SuperLink and two sites, a and b."""

    def __init__(self, folder: Path) -> None:
        self.ca = Authority(folder / "ca")
        self.a, self.b = self.ca.site("a"), self.ca.site("b")
        self.sites: dict[str, str] = {self.a.digest: "a", self.b.digest: "b"}
        self.state = folder / "gate"
        self.superlink = FakeUpstream()
        self.alerts: list[dict[str, Any]] = []
        self.time_s = 0.0
        self.papers = self.ca.server()

    @contextmanager
    def up(self) -> Iterator[int]:
        """Run SuperLink and gate; yield the gate's port."""
        with serving(self.superlink, free_port()) as address:
            settings = GateSettings(
                host="127.0.0.1",
                port=0,
                superlink=address,
                certificate=self.papers.certificate,
                key=self.papers.key,
                authority=self.papers.authority,
                state=self.state,
            )
            gate = build_gate(
                settings,
                site_of=self.sites.get,
                alerts=Alerts(self.alerts.append, now=utc_now),
                clock=lambda: self.time_s,
            )
            with running(gate) as port:
                yield port

    @property
    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.state / "status.json").read_text())
        return found


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return Coordinator(tmp_path)


def ask(peer: httpx.Client, verb: str, *, key: str = "a-1", body: bytes = b"x") -> str:
    """Return 'ok', or why the gate refused."""
    headers = PROTOBUF | {"flwr-public-key": base64.b64encode(key.encode()).decode()}
    answer = peer.post(f"/v1/fleet/{verb}", content=body, headers=headers)
    return "ok" if answer.is_success else answer.text.removeprefix("refused: ").strip()


def test_each_site_speaks_under_its_own_node_alone(coordinator: Coordinator) -> None:
    with (
        coordinator.up() as port,
        client(port, coordinator.a) as a,
        client(port, coordinator.b) as b,
    ):
        assert ask(a, "get-run") == "unknown-key"
        assert ask(a, "register-node") == "ok"
        assert ask(b, "register-node", key="b-1") == "ok"
        assert [ask(a, "get-run"), ask(b, "get-run", key="b-1")] == ["ok", "ok"]
        assert [ask(b, "get-run"), ask(a, "get-run", key="b-1")] == ["foreign-key"] * 2
        assert ask(b, "register-node") == "foreign-key"
        assert a.post("/v1/fleet/get-run", headers=PROTOBUF).status_code == 401
    assert coordinator.superlink.paths.count("/v1/fleet/get-run") == 2
    sites = coordinator.status["sites"]
    assert sites["a"]["refusals"] == {"foreign-key": 1, "no-key": 1, "unknown-key": 1}
    assert sites["b"]["refusals"] == {"foreign-key": 2}
    alerts = [(one["alert"], one["peer"]) for one in coordinator.status["alerts"]]
    assert sorted(alerts) == [("key-of-another-site", "a"), ("key-of-another-site", "b")]


def test_a_registration_that_superlink_refuses_binds_nothing(coordinator: Coordinator) -> None:
    async def refuse(_: Request) -> Response:
        return Response(b"{}", 409, media_type="application/json")

    coordinator.superlink.answers["/v1/fleet/register-node"] = refuse
    with coordinator.up() as port, client(port, coordinator.a) as a:
        assert ask(a, "register-node") == "{}"
        assert ask(a, "get-run") == "unknown-key"
        coordinator.superlink.answers.clear()
        assert ask(a, "register-node", key="a-2") == "ok"


def test_strangers_and_the_revoked_are_refused_at_once(coordinator: Coordinator) -> None:
    with coordinator.up() as port:
        with client(port, coordinator.ca.site("stranger")) as stranger:
            assert ask(stranger, "register-node") == "unknown-certificate"
        with client(port, coordinator.a) as a:
            assert ask(a, "register-node") == "ok"
            del coordinator.sites[coordinator.a.digest]  # while the connection is kept
            assert ask(a, "get-run") == "unknown-certificate"
    assert coordinator.superlink.paths == ["/v1/fleet/register-node"]
    assert coordinator.status["sites"][""]["refusals"]["unknown-certificate"] >= 1
    told = [(one["alert"], one["peer"]) for one in coordinator.status["alerts"]]
    assert told == [("revoked-certificate", "stranger"), ("revoked-certificate", "a")]


def test_a_certificate_that_ends_soon_is_told_of_when_it_is_used(coordinator: Coordinator) -> None:
    late = coordinator.ca.site("late", ends=timedelta(days=12, hours=1))
    coordinator.sites[late.digest] = "late"
    with (
        coordinator.up() as port,
        client(port, coordinator.a) as a,
        client(port, late) as b,
    ):
        assert [ask(a, "register-node"), ask(b, "register-node", key="b")] == ["ok", "ok"]
    (told,) = coordinator.status["alerts"]
    ends = (datetime.now(UTC) + timedelta(days=12, hours=1)).date().isoformat()
    assert (told["alert"], told["peer"], told["days"]) == ("certificate-ends", "late", 12)
    assert told["ends"] == ends
    found = coordinator.status["certificates"]
    own = ["authority's certificate", "coordinator's certificate"]
    assert sorted(found) == ["a", *own, "late"]
    assert found["late"].startswith(ends)


def test_a_second_node_of_a_site_waits_and_is_told_of(coordinator: Coordinator) -> None:
    with coordinator.up() as port, client(port, coordinator.a) as a:
        assert ask(a, "register-node") == "ok"
        coordinator.time_s += 9
        assert ask(a, "register-node", key="a-2") == "second-node"
        coordinator.time_s += 1
        assert ask(a, "register-node", key="a-2") == "ok"
        assert ask(a, "get-run") == "superseded-key"
        assert ask(a, "unregister-node") == "ok"
        assert ask(a, "get-run", key="a-2") == "ok"
    words = [one["alert"] for one in coordinator.alerts]
    assert words == ["second-node", "replaced-node-speaks"]


def test_a_restarted_gate_knows_its_nodes_and_a_site_its_new_certificate(
    coordinator: Coordinator,
) -> None:
    with coordinator.up() as port, client(port, coordinator.a) as a:
        assert ask(a, "register-node") == "ok"
    renewed = coordinator.ca.site("a-renewed")
    coordinator.sites = {coordinator.b.digest: "b", renewed.digest: "a"}
    with (
        coordinator.up() as port,
        client(port, renewed) as a,
        client(port, coordinator.b) as b,
    ):
        assert ask(a, "get-run") == "ok"
        assert ask(b, "get-run") == "foreign-key"
        assert ask(b, "register-node") == "foreign-key"


SUPERLINK, MINE, OTHER = 1, 7, 8


def reply(**changes: Any) -> Message:
    fields: dict[str, Any] = {
        "src_node_id": MINE,
        "dst_node_id": SUPERLINK,
        "reply_to_message_id": "m",
    }
    return Message(metadata=Metadata(**fields | changes))


def pushed(*messages: Message, node: int = MINE, trees: int = 1) -> bytes:
    request = PushMessagesRequest(
        node=Node(node_id=node),
        messages_list=messages,
        message_object_trees=[ObjectTree(object_id="0")] * trees,
    )
    return bytes(request.SerializeToString())


FORGED = {
    "another's reply": pushed(reply(src_node_id=OTHER)),
    "an order to another": pushed(
        reply(src_node_id=SUPERLINK, dst_node_id=OTHER, reply_to_message_id="")
    ),
    "no reply": pushed(reply(reply_to_message_id="")),
    "to another": pushed(reply(dst_node_id=OTHER)),
    "of no node": pushed(reply(), node=0),
    "nothing": pushed(trees=0),
    "two": pushed(reply(), reply(src_node_id=OTHER), trees=2),
    "two with one tree": pushed(reply(), reply(src_node_id=OTHER)),
    "no tree": pushed(reply(), trees=0),
    "no protobuf": b"\xff\xff\xff",
    "too long": pushed(reply(reply_to_message_id="m" * 1_100_000)),
}


def test_a_site_can_push_its_own_replies_and_no_other_message(coordinator: Coordinator) -> None:
    with coordinator.up() as port, client(port, coordinator.a) as a:
        assert ask(a, "register-node") == "ok"
        for kind, body in FORGED.items():
            reason = "body-size" if kind == "too long" else "message"
            assert ask(a, "push-messages", body=body) == reason, kind
        assert ask(a, "push-messages", body=pushed(reply())) == "ok"
    seen = coordinator.superlink.seen
    assert [one.path for one in seen] == ["/v1/fleet/register-node", "/v1/fleet/push-messages"]
    assert seen[1].size == len(pushed(reply()))


def test_the_status_tells_what_each_site_did(coordinator: Coordinator) -> None:
    with coordinator.up() as port, client(port, coordinator.a) as a:
        ask(a, "register-node", body=b"x" * 10)
        ask(a, "get-run", body=b"x" * 5)
    found = coordinator.status
    assert found["superlink"]["reachable"] is True
    site = found["sites"]["a"]
    assert site.pop("last_seen").endswith("+00:00")
    assert site == {
        "connected": True,
        "requests": 2,
        "bytes_up": 15,
        "bytes_down": 2 * 64,  # the fake answers a digest's 64 digits
        "refusals": {},
    }


def roster_of(*entries: RosterEntry, version: int) -> dict[str, Any]:
    roster = Roster(federation="icd", version=version, sites=entries)
    return sign_roster(roster, signing_key("coordinator"))


def test_a_roster_holds_from_the_moment_it_is_written(tmp_path: Path) -> None:
    path, public = tmp_path / "roster.json", tmp_path / "signing.pub"
    alerts: list[dict[str, Any]] = []
    write_public(public, public_bytes(signing_key("coordinator")))
    digest = f"sha256:{'0' * 64}"
    enrolled, revoked = entry_of("a", digest), entry_of("a", digest, state="revoked")
    write_json(path, roster_of(version=1))
    told = Alerts(alerts.append, now=utc_now)
    watch = RosterWatch(path, public=public, alerts=told)
    answers = [watch.site_of(digest)]
    for envelope in (
        roster_of(enrolled, version=2),
        roster_of(revoked, version=3),
        roster_of(enrolled, version=2),  # a copy put back
        {"payload": "", "payloadType": "", "signatures": []},
    ):
        write_json(path, envelope)
        answers += [watch.site_of(digest), watch.site_of(digest)]
    path.unlink()
    answers.append(watch.site_of(digest))
    assert answers == [None, "a", "a", *[None] * 7]
    assert {one["alert"] for one in alerts} == {"roster-unusable"}


def coordinator_folder(folder: Path, papers: Papers, *, site: Papers, ports: list[int]) -> None:
    """Write what a gate reads of a coordinator's folder."""
    (folder / "keys").mkdir()
    os.link(papers.key, folder / "keys" / "tls.key")
    os.link(papers.certificate, folder / "tls.pem")
    os.link(papers.authority, folder / "authority.pem")
    write_public(folder / "signing.pub", public_bytes(signing_key("coordinator")))
    write_json(folder / "roster.json", roster_of(entry_of("a", site.digest), version=2))
    (folder / "coordinator.toml").write_text(
        f'[coordinator]\nname = "icd"\nhost = "127.0.0.1"\nlisten = "127.0.0.1"\n'
        f"port = {ports[0]}\nsuperlink_port = {ports[1]}\n"
    )


def test_as_a_process_it_serves_a_coordinators_folder_until_told(tmp_path: Path) -> None:
    ca, ports = Authority(tmp_path / "ca"), [free_port(), free_port()]
    site, home = ca.site("a"), tmp_path / "home"
    home.mkdir()
    coordinator_folder(home, ca.server(), site=site, ports=ports)
    command = [sys.executable, "-m", "intramural.server.gate", "--dir", str(home)]
    with (
        serving(FakeUpstream(), ports[1]),
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as gate,
    ):
        assert gate.stdout is not None
        first = json.loads(gate.stdout.readline())
        assert (first["alert"], first["port"]) == ("listening", ports[0])
        with client(ports[0], site) as a:
            assert ask(a, "register-node") == "ok"
        gate.send_signal(signal.SIGTERM)
        assert gate.wait(10) == 0
    assert list(json.loads((home / "gate" / "bindings.json").read_text())["sites"]) == ["a"]
    assert json.loads((home / "gate" / "status.json").read_text())["sites"]["a"]["requests"] == 1


def test_as_a_process_it_says_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "intramural.server.gate", "--dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 2
    assert f"{tmp_path}/coordinator.toml: cannot read" in done.stderr
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ca, port = Authority(tmp_path / "ca"), taken.getsockname()[1]
        site = ca.site("a")
        coordinator_folder(tmp_path, ca.server(), site=site, ports=[port, PORT_DEFAULT])
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 2
    assert f"cannot listen at 127.0.0.1:{port}: " in done.stderr
