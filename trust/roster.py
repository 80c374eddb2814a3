"""Roster: the sites of a federation with their keys, signed by the coordinator, in versions."""

from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from intramural.core.canonical import canonical_json
from intramural.core.errors import TrustError
from intramural.core.values import Name
from intramural.trust.document import PublicKey, named
from intramural.trust.envelope import ENVELOPE_BYTES_MAX, from_base64, open_envelope, sign

ROSTER_TYPE = "application/vnd.intramural.roster+json"

Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
Time = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$")]


class RosterEntry(BaseModel):
    """One site."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Name
    """The site's name."""
    signing_key: PublicKey
    """What its messages are sealed with."""
    certificates: tuple[Digest, ...]
    """Digests of the certificates it may dial with; several while one is renewed."""
    state: Literal["enrolled", "revoked"]
    """A revoked site stays listed, so that its name is not given to another."""
    since: Time
    """When it came to this state, or to these keys."""

    @property
    def public(self) -> bytes:
        """The signing key's 32 raw bytes."""
        return from_base64(self.signing_key, what="signing key")


class Roster(BaseModel):
    """All sites that ever were in a federation, and which of them are now."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    federation: Name
    """The federation's name."""
    version: Annotated[int, Field(ge=1)]
    """Grows by one with every change; of two signed rosters the higher holds."""
    sites: tuple[RosterEntry, ...] = ()
    """By name."""

    @model_validator(mode="after")
    def _nothing_is_shared(self) -> "Roster":
        names = [site.name for site in self.sites]
        keys = [site.signing_key for site in self.sites]
        certificates = [digest for site in self.sites for digest in site.certificates]
        if names != sorted(set(names)):
            raise ValueError("sites are out of order, or one is listed twice")
        if len(set(keys)) < len(keys) or len(set(certificates)) < len(certificates):
            raise ValueError("two sites share a key or a certificate")
        return self

    def entry(self, name: str) -> RosterEntry | None:
        """Return a site's entry, revoked or not."""
        return next((site for site in self.sites if site.name == name), None)

    def site_of_certificate(self, digest: str) -> str | None:
        """Return the site that a certificate lets in; None: unknown or revoked."""
        return next((site.name for site in self._enrolled() if digest in site.certificates), None)

    def signing_key_of(self, name: str) -> bytes | None:
        """Return the 32 bytes that verify a site's seals; None: unknown or revoked."""
        return next((site.public for site in self._enrolled() if site.name == name), None)

    def _enrolled(self) -> list[RosterEntry]:
        return [site for site in self.sites if site.state == "enrolled"]

    def with_entry(self, entry: RosterEntry) -> "Roster":
        """Return the next version, in which a site is new or changed."""
        others = [site for site in self.sites if site.name != entry.name]
        sites = tuple(sorted([*others, entry], key=lambda site: site.name))
        return Roster(federation=self.federation, version=self.version + 1, sites=sites)

    def payload(self) -> bytes:
        """Return what is signed: canonical JSON."""
        return canonical_json(self.model_dump(mode="json"))


def sign_roster(roster: Roster, key: Ed25519PrivateKey) -> dict[str, Any]:
    """Return the roster in an envelope."""
    return sign(ROSTER_TYPE, roster.payload(), key)


def open_roster(envelope: dict[str, Any] | str | bytes, *, key: bytes) -> Roster:
    """Return the roster of an envelope.

    Args:
        envelope: The envelope, or its JSON text.
        key: The coordinator's public key.

    Raises:
        TrustError: The envelope does not verify, or holds no roster.
    """
    payload = open_envelope(envelope, payload_type=ROSTER_TYPE, key=key)
    try:
        roster = Roster.model_validate_json(payload)
    except ValidationError:
        raise TrustError("roster is malformed; check that both ends have equal versions") from None
    if roster.payload() != payload:
        raise TrustError("roster is not canonical JSON; check that both ends have equal versions")
    return roster


def load_roster(path: Path, *, key: bytes, version_min: int = 0) -> Roster:
    """Read roster.json; a few milliseconds for a hundred sites, so that it can be read anew.

    Args:
        path: The file.
        key: The coordinator's public key, 32 raw bytes.
        version_min: The highest version seen so far, by whoever reads it again and again.

    Raises:
        TrustError: The file is missing, does not verify, or is older than `version_min`.

    Guarantees:
        The coordinator signed this roster. An older one that it also signed is noticed only
        through `version_min`: without it, a copy put back would let revoked sites in.
    """
    with named(path):
        try:
            with open(path, "rb") as file:
                content = file.read(ENVELOPE_BYTES_MAX + 1)
        except OSError as error:
            raise TrustError(f"cannot read: {error.strerror}; restore it") from error
        roster = open_roster(content, key=key)
        if roster.version < version_min:
            raise TrustError(
                f"version {roster.version} is older than {version_min}, seen before; restore it"
            )
        return roster
