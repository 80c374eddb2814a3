"""The table of Show 4: who asks for what, and who refuses it.

`python -m tests.rounds.seal_table` brings a deployment of two sites up on loopback and prints it.
"""

import hashlib
import os
import ssl
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto import control_pb2, fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, runtime_pb2
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest

from intramural.core.bundle import bundle_files
from intramural.simulations.loopback import Loopback, await_true
from intramural.trust.proxy import PREFIX, VERBS
from tests.rounds.seal_meddler import Meddler
from tests.rounds.seal_net import NODES_S, Tapped
from tests.rounds.seal_peers import (
    Peer,
    enrolled,
    of_another_federation,
    revoked,
    without_certificate,
)
from tests.tiny import sites
from tests.trust.lines import connect, serving

SITES, FIRST = ("site-1", "site-2"), "site-1"
FEDERATION = "tiny"
HANDSHAKE = "no TLS"
CONTROL, RUNTIME = "/v1/control/", "/v1/runtime/"
RUN_ID = 1
HEARTBEAT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request that nobody but the coordinator's own host may make, or only a site's node."""

    what: str
    path: str
    body: bytes = b""
    method: str = "POST"
    headers: dict[str, str] | None = None
    """Flower's; None: the peer's own, signed by its own key."""


@dataclass(frozen=True, kw_only=True)
class First:
    """What others can see of the first site's node: its headers, signed, and its number."""

    headers: dict[str, str]
    key: bytes
    node_id: int


def submission() -> bytes:
    """Return a request for a run of our own bundle, whose ServerApp ends for want of a manifest."""
    content, _ = build_fab_from_files(bundle_files())
    fab = fab_pb2.Fab(hash_str=hashlib.sha256(content).hexdigest(), content=content)
    request = control_pb2.StartRunRequest(fab=fab)
    return bytes(request.SerializeToString())


def coordinators_own(run_id: int) -> list[Ask]:
    """Return the requests of Flower's control and runtime APIs, and its pages."""
    control = {
        "submit a run": ("start-run", submission()),
        "stop a run": ("stop-run", control_pb2.StopRunRequest(run_id=run_id)),
        "list runs": ("list-runs", control_pb2.ListRunsRequest()),
        "list nodes": ("list-nodes", control_pb2.ListNodesRequest()),
        "register a node": ("register-node", control_pb2.RegisterNodeRequest(public_key=b"k")),
    }
    runtime = {
        "acquire a task": ("acquire-task", runtime_pb2.AcquireTaskRequest()),
        "messages of an app": ("pull-messages", runtime_pb2.PullAppMessagesRequest()),
    }
    asks = [
        Ask(what=what, path=prefix + verb, body=_written(body), headers={})
        for prefix, table in ((CONTROL, control), (RUNTIME, runtime))
        for what, (verb, body) in table.items()
    ]
    listing = asks[2].body
    asks.append(Ask(what="list runs", path=f"{PREFIX}../control/list-runs", body=listing))
    pages = ("/docs", "/openapi.json", "/health")
    asks += [Ask(what=f"read {page}", path=page, method="GET", headers={}) for page in pages]
    return asks


def _written(body: Any) -> bytes:
    return body if isinstance(body, bytes) else bytes(body.SerializeToString())


def bodies(node_id: int, key: bytes) -> dict[str, bytes]:
    """Return a request of each kind of the fleet API, in the name of a node."""
    node, name = Node(node_id=node_id), "0" * 64
    reply = _message(src_node_id=node_id, dst_node_id=SUPERLINK_NODE_ID)
    found: dict[str, Any] = {
        "register-node": fleet_pb2.RegisterNodeFleetRequest(public_key=key),
        "activate-node": fleet_pb2.ActivateNodeRequest(
            public_key=key, heartbeat_interval=HEARTBEAT_S
        ),
        "deactivate-node": fleet_pb2.DeactivateNodeRequest(node_id=node_id),
        "unregister-node": fleet_pb2.UnregisterNodeFleetRequest(node_id=node_id),
        "send-node-heartbeat": heartbeat_pb2.SendNodeHeartbeatRequest(
            node=node, heartbeat_interval=HEARTBEAT_S
        ),
        "pull-messages": fleet_pb2.PullMessagesRequest(node=node),
        "push-messages": fleet_pb2.PushMessagesRequest(
            node=node, messages_list=[reply], message_object_trees=[_tree()]
        ),
        "get-run": GetRunRequest(node=node, run_id=RUN_ID),
        "get-fab": fab_pb2.GetFabRequest(node=node, hash_str=name, run_id=RUN_ID),
        "push-object": message_pb2.PushObjectRequest(node=node, run_id=RUN_ID, object_id=name),
        "pull-object": message_pb2.PullObjectRequest(node=node, run_id=RUN_ID, object_id=name),
        "confirm-message-received": message_pb2.ConfirmMessageReceivedRequest(
            node=node, run_id=RUN_ID, message_object_id=name
        ),
    }
    assert set(found) == VERBS
    return {verb: bytes(message.SerializeToString()) for verb, message in found.items()}


def under_its_key(first: First) -> list[Ask]:
    """Return all of the fleet API under the first site's key, with headers that its node signed."""
    return [
        Ask(what=f"{verb}, its key", path=PREFIX + verb, body=body, headers=first.headers)
        for verb, body in sorted(bodies(first.node_id, first.key).items())
    ]


def under_its_number(first: First, peer: Peer) -> list[Ask]:
    """Return the fleet API under the peer's own key, in the name of the first site's node."""
    begins = {"register-node", "activate-node"}  # these name a key and no node
    return [
        Ask(what=f"{verb}, its node id", path=PREFIX + verb, body=body)
        for verb, body in sorted(bodies(first.node_id, peer.public).items())
        if verb not in begins
    ]


def to_another_node(first: First, own: int) -> list[Ask]:
    """Return messages that a node would hand to another: in its own name, and in SuperLink's."""
    asks = []
    for who, source in (("its own", own), ("SuperLink's", SUPERLINK_NODE_ID)):
        message = _message(src_node_id=source, dst_node_id=first.node_id)
        message.metadata.reply_to_message_id = ""
        request = fleet_pb2.PushMessagesRequest(
            node=Node(node_id=own), messages_list=[message], message_object_trees=[_tree()]
        )
        what = f"message to its node in {who} name"
        body = bytes(request.SerializeToString())
        asks.append(Ask(what=what, path=f"{PREFIX}push-messages", body=body))
    return asks


def _message(**metadata: Any) -> message_pb2.Message:
    fields: dict[str, Any] = {
        "run_id": RUN_ID,
        "reply_to_message_id": "0" * 64,
        "message_type": "train",
    } | metadata
    return message_pb2.Message(metadata=message_pb2.Metadata(**fields))


def _tree() -> message_pb2.ObjectTree:
    return message_pb2.ObjectTree(object_id="0" * 64)


def answer_to(ask: Ask, peer: Peer) -> bytes:
    """Return what comes back, byte for byte; nothing: the handshake failed."""
    headers = peer.headers() if ask.headers is None else ask.headers
    lines = [f"{ask.method} {ask.path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if ask.method == "POST":
        lines += ["Content-Type: application/protobuf", f"Content-Length: {len(ask.body)}"]
    got = b""
    try:
        with connect(peer.port, peer.tls) as line:
            line.sendall("\r\n".join([*lines, "", ""]).encode() + ask.body)
            while piece := line.recv(1 << 16):
                got += piece
    except (ssl.SSLError, ConnectionError):
        pass  # what came before it counts
    return got


def outcome_of(answer: bytes) -> str:
    """Return who said what, in a few words: the gate's word, or SuperLink's status."""
    if not answer:
        return HANDSHAKE
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1].decode()
    if body.startswith(b"refused: "):
        return f"gate {status} {body.decode().removeprefix('refused: ').strip()}"
    return f"SuperLink {status}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What becomes of one request, by peer."""

    what: str
    outcomes: dict[str, str]


def rows_of(net: Tapped, first: First) -> list[Row]:
    """Make all requests as all peers; the last column is SuperLink's own host, with no gate."""
    port = net.gate_port
    other = enrolled(net, port, name="site-3")
    peers = [
        without_certificate(net, port),
        of_another_federation(net, port, name=FEDERATION),
        other,
        revoked(net, port, name="site-4"),
    ]
    host = Peer(name="host, no gate", tls=None, port=net.superlink_port)
    own = settle(other)
    rows = []
    for ask in coordinators_own(submitted(host)):
        outcomes = {peer.name: outcome_of(answer_to(ask, peer)) for peer in (*peers, host)}
        rows.append(Row(what=f"{ask.what} ({ask.path})", outcomes=outcomes))
    for number in range(len(under_its_key(first))):
        outcomes = {p.name: outcome_of(answer_to(under_its_key(first)[number], p)) for p in peers}
        rows.append(Row(what=under_its_key(first)[number].what, outcomes=outcomes))
    for number in range(len(under_its_number(first, other))):
        asks = {peer.name: (under_its_number(first, peer)[number], peer) for peer in peers}
        outcomes = {name: outcome_of(answer_to(ask, peer)) for name, (ask, peer) in asks.items()}
        rows.append(Row(what=asks[other.name][0].what, outcomes=outcomes))
    for ask in to_another_node(first, own):
        outcomes = {peer.name: outcome_of(answer_to(ask, peer)) for peer in peers}
        rows.append(Row(what=ask.what, outcomes=outcomes))
    leave(other, own)
    return rows


def submitted(host: Peer) -> int:
    """Submit a run where that is allowed; return its number."""
    ask = Ask(what="submit", path=f"{CONTROL}start-run", body=submission(), headers={})
    return int(control_pb2.StartRunResponse.FromString(_body(answer_to(ask, host))).run_id)


def online(net: Tapped) -> set[int]:
    """Return the nodes that SuperLink has online, as it says on its own host."""
    host = Peer(name="host", tls=None, port=net.superlink_port)
    ask = Ask(what="list nodes", path=f"{CONTROL}list-nodes", headers={})
    found = control_pb2.ListNodesResponse.FromString(_body(answer_to(ask, host)))
    return {node.node_id for node in found.nodes_info if node.status == "online"}


def settle(peer: Peer) -> int:
    """Register and activate a member's own node, which is its right; return the node's number."""
    asks = bodies(0, peer.public)
    for verb in ("register-node", "activate-node"):
        answer = answer_to(Ask(what=verb, path=PREFIX + verb, body=asks[verb]), peer)
        assert outcome_of(answer) == "SuperLink 200", answer
    return int(fleet_pb2.ActivateNodeResponse.FromString(_body(answer)).node_id)


def leave(peer: Peer, own: int) -> None:
    """Take the member's own node away again."""
    asks = bodies(own, peer.public)
    for verb in ("deactivate-node", "unregister-node"):
        answer = answer_to(Ask(what=verb, path=PREFIX + verb, body=asks[verb]), peer)
        assert outcome_of(answer) == "SuperLink 200", answer


def _body(answer: bytes) -> bytes:
    return answer.partition(b"\r\n\r\n")[2]


def first_of(meddler: Meddler) -> First:
    """Return what was seen of the first site's node on its own line."""
    headers = meddler.headers_of("pull-messages")
    request = next(one for one in meddler.exchanges if one.verb == "activate-node")
    key = fleet_pb2.ActivateNodeRequest.FromString(request.body).public_key
    node_id = fleet_pb2.ActivateNodeResponse.FromString(request.answer).node_id
    return First(headers=headers, key=key, node_id=node_id)


def table_of(rows: Sequence[Row]) -> str:
    """Return rows as a Markdown table."""
    names = list(rows[0].outcomes)
    lines = [f"| request | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        cells = [row.outcomes.get(name, "") for name in names]
        lines.append(f"| {row.what} | {' | '.join(cells)} |")
    return "\n".join(lines)


@contextmanager
def sealed(folder: Path) -> Iterator[tuple[Tapped, Meddler]]:
    """Have a coordinator and two sites up; the first site's node speaks through a meddler."""
    net = Tapped(folder=sites(folder / "net", len(SITES)), sites=SITES)
    net.environment = {"OMP_NUM_THREADS": "1"}
    Loopback.found(net, name=FEDERATION)
    with net.lined(folder / "captures", own=frozenset({FIRST})):
        line = net.lines[FIRST]
        meddler = Meddler(gate=line["gate"])
        with serving(meddler, line["node"]), net.up():  # type: ignore[arg-type]
            net.await_nodes()
            await_true(lambda: meddler.saw("pull-messages"), NODES_S, what="a look for messages")
            yield net, meddler


def main() -> None:
    """Print the table."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder, sealed(Path(folder)) as (net, meddler):
        print(table_of(rows_of(net, first_of(meddler))))


if __name__ == "__main__":
    main()
