"""Proposal: a manifest that the coordinator proposed, as the site's files and journal hold it."""

import json
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from intramural.core.canonical import digest_bytes
from intramural.core.config import check_config
from intramural.core.errors import ConfigError, Refused, TrustError
from intramural.core.federation import FederationConfig
from intramural.core.journal import Entry
from intramural.trust.envelope import from_base64, parse_json

Status = Literal["pending", "approved", "refused"]
NAME_CHARACTERS_MAX = 64


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A manifest, and what the site's people said of it."""

    digest: str
    federation: FederationConfig
    envelope: str = field(repr=False)
    """As it came, with the coordinator's signature."""
    first_seen: str
    """ISO 8601, UTC."""
    status: Status
    by: tuple[str, ...] = ()
    """Who approved it so far, or refused it; empty where 'same-shape' approved it."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What the journal says of one manifest."""

    run: str
    """The federation's name."""
    status: Status
    by: tuple[str, ...] = ()
    same_shape: bool = False
    """Approved without asking."""
    seq: int
    """Of the entry that says so."""


def standings_of(entries: Iterable[Entry]) -> dict[str, Standing]:
    """Return where each manifest stands after a journal's entries, by digest.

    Entries of other kinds, which share the journal, are passed over.
    """
    found: dict[str, Standing] = {}
    for entry in entries:
        body = entry.body
        digest, run = str(body.get("manifest")), str(body.get("run"))
        fresh = Standing(run=run, status="pending", seq=entry.seq)
        match entry.kind:
            case "proposed":
                found[digest] = fresh
            case "approval":
                before = found.get(digest, fresh)
                names = before.by if before.status == "pending" else ()
                found[digest] = replace(fresh, by=(*names, str(body.get("by"))))
            case "approved":
                found[digest] = replace(
                    fresh,
                    status="approved",
                    by=tuple(body.get("by", ())),
                    same_shape=body.get("why") == "same-shape",
                )
            case "refused-by-people":
                found[digest] = replace(fresh, status="refused", by=tuple(body.get("by", ())))
    return found


def payload_of(envelope: str) -> bytes:
    """Return an envelope's payload; its signature is not verified.

    Raises:
        TrustError: It is no envelope.
    """
    value = parse_json(envelope)
    payload = value.get("payload") if isinstance(value, dict) else None
    if not isinstance(payload, str):
        raise TrustError("no DSSE envelope: it has no payload; ask for the manifest again")
    return from_base64(payload, what="envelope's payload")


def manifest_of(payload: bytes, *, source: str) -> FederationConfig:
    """Read a manifest.

    Raises:
        ConfigError: It is none that this version can read.
    """
    try:
        table = json.loads(payload)
    except (ValueError, RecursionError):
        raise ConfigError(f"{source}: is no JSON; ask the coordinator for the manifest") from None
    if not isinstance(table, dict):
        raise ConfigError(f"{source}: is no manifest; ask the coordinator for it")
    return check_config(table, FederationConfig, source=source)


def read_proposal(path: Path) -> Proposal:
    """Read a file of the store, which is named after its manifest's digest.

    Raises:
        Refused: It was changed or put there by hand.
    """
    place = f"{path.parent.name}/{path.name}"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        envelope, first_seen = str(content["envelope"]), str(content["first_seen"])
        payload = payload_of(envelope)
        federation = manifest_of(payload, source=place)
    except (OSError, ValueError, KeyError, TypeError, TrustError, ConfigError):
        raise Refused(f"{place} cannot be read: it was changed by hand; remove it") from None
    digest = f"sha256:{path.stem}"
    if not digest == digest_bytes(payload) == federation.digest:
        raise Refused(f"{place} holds another manifest than its name says; remove it")
    return Proposal(
        digest=digest,
        federation=federation,
        envelope=envelope,
        first_seen=first_seen,
        status="pending",
    )


def person_of(name: str) -> str:
    """Return what tells people apart: a name without case, in one spelling.

    Raises:
        ConfigError: It is no name.
    """
    plain = " ".join(unicodedata.normalize("NFKC", name).split())
    if not 0 < len(plain) <= NAME_CHARACTERS_MAX or not plain.isprintable():
        raise ConfigError(f"--by: a name has 1 to {NAME_CHARACTERS_MAX} printable characters")
    return plain.casefold()
