"""A site's gate: the SuperNode's only way out, which lets no bundle in but the site's own."""

import argparse
import hashlib
import ipaddress
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.proto.fab_pb2 import Fab, GetFabResponse
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from intramural.client.audit import AuditLog
from intramural.client.enrol import SiteFolder
from intramural.core.bundle import bundle_files
from intramural.core.errors import JournalError
from intramural.core.journal import utc_now
from intramural.trust.alerts import Alerts, Clock
from intramural.trust.connection import Source
from intramural.trust.counters import Counters
from intramural.trust.denial import Denied
from intramural.trust.endings import Endings
from intramural.trust.gate import Chore, Gate, run_gate, status_text, tell_on_stdout
from intramural.trust.keys import PASSPHRASE
from intramural.trust.kit import read_kit
from intramural.trust.limits import MIB, GateLimits
from intramural.trust.proxy import (
    CONFIRM_RECEIVED,
    GET_FAB,
    PULL_MESSAGES,
    PULL_OBJECT,
    Call,
    Hold,
    Inspection,
    Proxy,
)
from intramural.trust.tls import client_context
from intramural.trust.upstream import Upstream

log = logging.getLogger(__name__)

LOOPBACK, NODE, COORDINATOR = "127.0.0.1", "node", "coordinator"
BUNDLE_REFUSED, OUT_OF_STEP = "bundle-refused", "node-out-of-step"
RUN_OVER = 403
"""Status of an answer about a run that is over, to which a SuperNode does as said in `answered`;
a coordinator's gate refuses with it as well, and is taken for that."""
KEEP_S = 60.0
"""Less than `GateLimits.idle_s_max`, after which the coordinator's gate closes a connection."""
BUNDLE_BYTES_MAX = MIB
STATUS_S = 5.0
PORT_DEFAULT = 9095
HOLDS = {PULL_MESSAGES: Hold(hold_s=3.5, pause_s=0.4)}
"""Flower's SuperNode waits 5 s for an answer, and sleeps 3 s after one without a message. Held here
and not at the coordinator: what is pulled must not be lost on a long way."""
_LOCAL_HOST = re.compile(r"(127\.0\.0\.1|localhost)(:[0-9]{1,5})?")


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """What a site's gate needs to know."""

    port: int
    """On loopback, for the SuperNode; 0: the system chooses."""
    coordinator: str
    """host:port of the coordinator's gate; the host as its certificate has it."""
    certificate: Path
    """The site's certificate."""
    key: Path
    """Its key."""
    authority: Path
    """The federation's CA."""
    bundle_hashes: frozenset[str]
    """SHA-256, hexadecimal, of the bundles that may come in."""
    status: Path
    """Where to write the status."""
    restart: Path | None = None
    """File that asks the supervisor to start the SuperNode anew; None: nobody does."""
    passphrase: str | None = field(default=None, repr=False)
    """Of the key's file."""
    limits: GateLimits = field(default_factory=GateLimits)
    """What it takes."""


class NodeGatekeeper:
    """Lets this machine's SuperNode out, and no strange bundle in.

    Guarantees:
        A bundle passes only if the SHA-256 of its bytes, computed here, is one of the site's own;
        what the node gets is made anew from those bytes, so that nothing rides along. What
        the answer says of its hash, and what was asked for, count for nothing. Requests from other
        machines, or made by a web page for another host name, do not pass. Other programs on
        this machine can use the gate as the SuperNode can.
    """

    def __init__(
        self, *, bundle_hashes: frozenset[str], alerts: Alerts, restart: Path | None = None
    ) -> None:
        """Take the hashes, whom to tell of other bundles, and what asks for another SuperNode."""
        self._bundle_hashes, self._alerts, self._restart = bundle_hashes, alerts, restart
        self.requests: Mapping[str, Inspection] = {}
        bundles = Inspection(
            bytes_max=BUNDLE_BYTES_MAX,
            look=self._own_bundle,
            too_long=lambda _: self._refused("", "too long"),
        )
        self.answers: Mapping[str, Inspection] = {GET_FAB: bundles}

    def identify(self, source: Source) -> str:
        """Take whoever is on this machine for the node."""
        try:
            if ipaddress.ip_address(source.address).is_loopback:
                return NODE
        except ValueError:
            pass
        raise Denied("not-loopback")

    def admit(self, call: Call) -> None:
        """Refuse what was addressed to another host: a browser's request under a rebound name."""
        if not _LOCAL_HOST.fullmatch(call.host):
            raise Denied("host")

    def answered(self, call: Call, status: int) -> None:
        """Ask for another SuperNode where this one is out of step with its messages.

        If a run ends between a message's delivery and its receipt, Flower's SuperNode (1.41) runs
        the message and yet goes on as if none had come. From then on it sends each reply only when
        the next message is there: the coordinator waits for a reply, and the node for a message.
        """
        if status == RUN_OVER and call.verb in (PULL_OBJECT, CONFIRM_RECEIVED):
            self._alerts.tell(OUT_OF_STEP, NODE)
            if self._restart is not None:
                with suppress(OSError):  # a full disk: the alert tells
                    self._restart.touch()

    def _own_bundle(self, call: Call, body: bytes) -> bytes:
        try:
            content = GetFabResponse.FromString(body).fab.content
        except DecodeError:
            raise self._refused("", "malformed") from None
        found = hashlib.sha256(content).hexdigest()
        if found not in self._bundle_hashes:
            raise self._refused(found, "not the one that this installation would build")
        own = GetFabResponse(fab=Fab(hash_str=found, content=content))
        return bytes(own.SerializeToString())

    def _refused(self, sha256: str, why: str) -> Denied:
        self._alerts.tell(BUNDLE_REFUSED, COORDINATOR, sha256=sha256, why=why)
        return Denied("bundle")


def build_gate(
    settings: GateSettings,
    *,
    alerts: Alerts,
    now: Clock = utc_now,
    clock: Callable[[], float] = time.monotonic,
) -> Gate:
    """Return the gate, which does not listen yet; it must listen at `LOOPBACK`.

    Args:
        settings: Where to, and with what.
        alerts: Told of strange bundles, of a SuperNode out of step, and when the coordinator goes
            and comes.
        now: The time, for the status.
        clock: Seconds that never go back, for limits.

    Raises:
        TrustError: Certificate, key or authority cannot be used.
    """
    upstream = Upstream(
        f"https://{settings.coordinator}",
        name=COORDINATOR,
        limits=settings.limits,
        alerts=alerts,
        tls=client_context(
            settings.certificate, settings.key, settings.authority, passphrase=settings.passphrase
        ),
        keep_s=KEEP_S,
    )
    own = {
        "site's certificate": settings.certificate,
        "authority's certificate": settings.authority,
    }
    counters, endings = Counters(now=now), Endings(own, alerts=alerts)

    def status() -> bytes:
        return status_text(
            pid=os.getpid(),
            coordinator=upstream.as_json(),
            node=counters.snapshot().get(NODE),
            certificates=endings.look(),  # before the alerts, to which it may add
            alerts=list(alerts.recent),
        )

    return Gate(
        proxy=Proxy(
            upstream=upstream,
            gatekeeper=NodeGatekeeper(
                bundle_hashes=settings.bundle_hashes, alerts=alerts, restart=settings.restart
            ),
            limits=settings.limits,
            counters=counters,
            clock=clock,
            holds=HOLDS,
        ),
        upstream=upstream,
        limits=settings.limits,
        alerts=alerts,
        tls=None,
        chores=(Chore(path=settings.status, content=status, every_s=STATUS_S),),
    )


def own_bundle_hash() -> str:
    """Return the SHA-256 of the bundle that this installation would build, hexadecimal."""
    from flwr.cli.build import build_fab_from_files  # here: the command line takes its time

    bundle, _ = build_fab_from_files(bundle_files())
    return hashlib.sha256(bundle).hexdigest()


def settings_of(site: Path, *, port: int) -> GateSettings:
    """Return the settings that the folder of a site.toml holds.

    Raises:
        TrustError: The kit cannot be used.
    """
    place = SiteFolder(root=site.resolve().parent)
    kit = read_kit(place.kit)
    host = f"[{kit.host}]" if ":" in kit.host else kit.host
    return GateSettings(
        port=port,
        coordinator=f"{host}:{kit.port}",
        certificate=place.certificate,
        key=place.tls_key,
        authority=place.authority,
        bundle_hashes=frozenset({own_bundle_hash()}),
        status=place.root / "state" / "gate.json",
        restart=place.restart,
        passphrase=os.environ.get(PASSPHRASE) or None,
    )


def main(words: Sequence[str] | None = None) -> int:
    """Run a site's gate until SIGTERM; a refused bundle also goes to the site's journal."""
    parser = argparse.ArgumentParser(prog="python -m intramural.client.gate", description=__doc__)
    parser.add_argument("--site", type=Path, required=True, help="The site's site.toml.")
    parser.add_argument(
        "--port", type=int, default=PORT_DEFAULT, help="Port on loopback; 0: any that is free."
    )
    told = parser.parse_args(words)

    def build(alerts: Alerts) -> tuple[Gate, str, int]:
        settings = settings_of(told.site, port=told.port)
        return build_gate(settings, alerts=alerts), LOOPBACK, settings.port

    with ThreadPoolExecutor(1) as writer:  # the journal may be held, and the gate must not wait
        journal = told.site.resolve().parent / "state" / "journal.jsonl"

        def sink(alert: dict[str, Any]) -> None:
            tell_on_stdout(alert)
            if alert["alert"] == BUNDLE_REFUSED:
                writer.submit(_note, journal, alert)

        return run_gate(build, sink=sink, now=utc_now)


def _note(journal: Path, alert: dict[str, Any]) -> None:
    try:
        audit = AuditLog(journal)
        try:
            audit.append(BUNDLE_REFUSED, **{key: alert[key] for key in ("sha256", "why", "times")})
        finally:
            audit.close()
    except JournalError as error:
        log.error("%s", error)


if __name__ == "__main__":
    sys.exit(main())
