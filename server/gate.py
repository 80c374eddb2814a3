"""The coordinator's gate: lets enrolled sites at Flower's fleet API, each under its own node."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.fleet_pb2 import PushMessagesRequest
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from intramural.core.canonical import digest_bytes
from intramural.core.journal import utc_now
from intramural.server.bindings import Bindings
from intramural.server.folder import CoordinatorFolder
from intramural.server.roster_watch import RosterWatch
from intramural.server.settings import load_coordinator
from intramural.trust.alerts import Alerts, Clock
from intramural.trust.certificates import holder_of
from intramural.trust.connection import Source
from intramural.trust.counters import Counters
from intramural.trust.denial import Denied
from intramural.trust.endings import Endings
from intramural.trust.gate import Chore, Gate, run_gate, status_text, tell_on_stdout
from intramural.trust.keys import PASSPHRASE
from intramural.trust.limits import GateLimits
from intramural.trust.proxy import OK, PUSH_MESSAGES, Call, Inspection, Proxy
from intramural.trust.tls import server_context
from intramural.trust.upstream import Upstream

SUPERLINK = "superlink"
SUPERLINK_KEEP_S = 3.0
"""SuperLink closes a connection after 5 s without a request (uvicorn's default)."""
TABLE_S, STATUS_S = 1.0, 5.0
NODE_KEY = "flwr-public-key"

SiteOf = Callable[[str], str | None]
"""Digest of a client certificate -> its site; None: unknown or revoked."""


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """What the coordinator's gate needs to know."""

    host: str
    """Address to listen at."""
    port: int
    """0: the system chooses."""
    superlink: str
    """host:port of SuperLink, on loopback."""
    certificate: Path
    """The gate's certificate."""
    key: Path
    """Its key."""
    authority: Path
    """The federation's CA."""
    state: Path
    """Folder for `bindings.json` and `status.json`."""
    passphrase: str | None = field(default=None, repr=False)
    """Of the key's file."""
    limits: GateLimits = field(default_factory=GateLimits)
    """What it takes."""

    @property
    def own(self) -> dict[str, Path]:
        """The federation's certificates on this side, by what to call them."""
        return {
            "coordinator's certificate": self.certificate,
            "authority's certificate": self.authority,
        }


class SiteGatekeeper:
    """Names peers by their certificates, and holds each to its own Flower node.

    Guarantees:
        A request passes only while its certificate is on the roster, and under a node key that is
        this site's (`Bindings`). One that the authority issued and the roster does not list,
        revoked or replaced, is told of by the name in it. SuperLink checks that the request is
        signed by that key and names the key's node; it does not check who a pushed message claims
        to come from, or that it is a reply at all: with flwr 1.41 a node could hand orders to
        another node in SuperLink's name (tried, and delivered). So that is looked at here.
    """

    def __init__(
        self,
        *,
        site_of: SiteOf,
        bindings: Bindings,
        limits: GateLimits,
        alerts: Alerts,
        endings: Endings,
    ) -> None:
        """Take the roster's question, the table of node keys, and whom to tell."""
        self._site_of, self._bindings = site_of, bindings
        self._alerts, self._endings = alerts, endings
        replies = Inspection(  # a reply's arrays are not in it: they follow as objects
            bytes_max=limits.small_bytes_max, look=own_reply, too_long=lambda _: Denied("message")
        )
        self.requests: Mapping[str, Inspection] = {PUSH_MESSAGES: replies}
        self.answers: Mapping[str, Inspection] = {}

    def identify(self, source: Source) -> str:
        """Return the site of the connection's certificate."""
        certificate = source.certificate
        if certificate is None:
            raise Denied("unknown-certificate")
        site = self._site_of(digest_bytes(certificate))
        if site is None:
            self._alerts.tell("revoked-certificate", holder_of(certificate))
            raise Denied("unknown-certificate")
        self._endings.watch(site, certificate)
        return site

    def admit(self, call: Call) -> None:
        """Let a site speak under its own key alone."""
        self._bindings.admit(call.peer, call.verb, call.headers.get(NODE_KEY, ""))

    def answered(self, call: Call, status: int) -> None:
        """Bind a key that SuperLink registered, or let go of one that it unregistered."""
        if status == OK:
            self._bindings.accepted(call.peer, call.verb, call.headers[NODE_KEY])


def own_reply(call: Call, body: bytes) -> bytes:
    """Let a pushed message pass if it is one reply to the coordinator, in the sender's own name.

    Raises:
        Denied: It is not.
    """
    try:
        request = PushMessagesRequest.FromString(body)
    except DecodeError:
        raise Denied("message") from None
    if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
        raise Denied("message")
    metadata = request.messages_list[0].metadata
    is_reply = metadata.reply_to_message_id and metadata.dst_node_id == SUPERLINK_NODE_ID
    if not is_reply or metadata.src_node_id != request.node.node_id:
        raise Denied("message")
    return body


def build_gate(
    settings: GateSettings,
    *,
    site_of: SiteOf,
    alerts: Alerts,
    now: Clock = utc_now,
    clock: Callable[[], float] = time.monotonic,
) -> Gate:
    """Return the gate, which does not listen yet.

    Args:
        settings: Where and with what.
        site_of: Asked at each request.
        alerts: Told what an operator should know.
        now: The time, for the status.
        clock: Seconds that never go back, for limits.

    Raises:
        TrustError: Certificate, key, authority or the table of node keys cannot be used.
    """
    tls = server_context(
        settings.certificate, settings.key, settings.authority, passphrase=settings.passphrase
    )
    upstream = Upstream(
        f"http://{settings.superlink}",
        name=SUPERLINK,
        limits=settings.limits,
        alerts=alerts,
        keep_s=SUPERLINK_KEEP_S,
    )
    table = settings.state / "bindings.json"
    bindings = Bindings(table, alerts=alerts, clock=clock)
    counters, endings = Counters(now=now), Endings(settings.own, alerts=alerts)
    gatekeeper = SiteGatekeeper(
        site_of=site_of,
        bindings=bindings,
        limits=settings.limits,
        alerts=alerts,
        endings=endings,
    )

    def status() -> bytes:
        return status_text(
            pid=os.getpid(),
            superlink=upstream.as_json(),
            sites=counters.snapshot(),
            certificates=endings.look(),  # before the alerts, to which it may add
            alerts=list(alerts.recent),
        )

    return Gate(
        proxy=Proxy(
            upstream=upstream,
            gatekeeper=gatekeeper,
            limits=settings.limits,
            counters=counters,
            clock=clock,
        ),
        upstream=upstream,
        limits=settings.limits,
        alerts=alerts,
        tls=tls,
        chores=(
            Chore(path=table, content=bindings.content, every_s=TABLE_S),
            Chore(path=settings.state / "status.json", content=status, every_s=STATUS_S),
        ),
    )


def settings_of(folder: Path) -> GateSettings:
    """Return the settings that a coordinator's folder holds.

    Raises:
        ConfigError: coordinator.toml is wrong.
    """
    coordinator, place = load_coordinator(folder), CoordinatorFolder(root=folder)
    return GateSettings(
        host=coordinator.listen,
        port=coordinator.port,
        superlink=f"127.0.0.1:{coordinator.superlink_port}",
        certificate=place.tls,
        key=place.tls_key,
        authority=place.authority,
        state=folder / "gate",
        passphrase=os.environ.get(PASSPHRASE) or None,
    )


def main(words: Sequence[str] | None = None) -> int:
    """Run the gate of a coordinator's folder until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m intramural.server.gate", description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="The coordinator's folder.")
    folder: Path = parser.parse_args(words).dir

    def build(alerts: Alerts) -> tuple[Gate, str, int]:
        settings, place = settings_of(folder), CoordinatorFolder(root=folder)
        roster = RosterWatch(place.roster, public=place.signing_public, alerts=alerts)
        gate = build_gate(settings, site_of=roster.site_of, alerts=alerts)
        return gate, settings.host, settings.port

    return run_gate(build, sink=tell_on_stdout, now=utc_now)


if __name__ == "__main__":
    sys.exit(main())
