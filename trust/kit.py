"""Request and kit: the two files that make a site a member, neither with a private key in it.

The site's request goes to the coordinator, the coordinator's kit comes back. Both can be read by
anybody; what is secret is never in them. Each is signed as a whole, so that it is enough that two
people compare one fingerprint a file, by voice.
"""

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509 import Certificate, CertificateSigningRequest
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from intramural.core.errors import TrustError
from intramural.core.values import Name
from intramural.trust.certificates import (
    PEM_CHARACTERS_MAX,
    certificate_digest,
    check_issued,
    check_times,
    read_certificate,
    site_of,
    tls_key_of,
    to_pem,
)
from intramural.trust.csr import new_certificate_request, read_certificate_request
from intramural.trust.document import (
    PublicKey,
    check_document,
    named,
    read_document,
    sign_document,
)
from intramural.trust.envelope import from_base64, to_base64
from intramural.trust.keys import fingerprint, public_bytes, tls_key_digest
from intramural.trust.roster import Roster, open_roster

REQUEST_TYPE = "application/vnd.intramural.request+json"
KIT_TYPE = "application/vnd.intramural.kit+json"

Pem = Annotated[str, StringConstraints(max_length=PEM_CHARACTERS_MAX)]
Port = Annotated[int, Field(ge=1, le=65535)]


class SiteRequest(BaseModel):
    """What a site asks to be enrolled with: its name and the public halves of its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    intramural: Literal["request"]
    """What this file is."""
    version: Literal[1]
    """Of the file's form."""
    site: Name
    """The site's name."""
    signing_key: PublicKey
    """Verifies the site's seals, and this file's signature."""
    certificate_request: Pem
    """PKCS 10, signed by the site's TLS key."""
    fingerprint: str
    """Of `signing_key`, to read aloud."""
    signature: str
    """By `signing_key`, over all other fields."""

    @property
    def public(self) -> bytes:
        """The signing key's 32 raw bytes."""
        return from_base64(self.signing_key, what="signing_key")

    @property
    def csr(self) -> CertificateSigningRequest:
        """The certificate request, checked."""
        return read_certificate_request(self.certificate_request, site=self.site)

    @property
    def tls_key(self) -> str:
        """Digest of the TLS key's public half."""
        return tls_key_digest(tls_key_of(self.csr))


def make_request(
    site: str, *, signing_key: Ed25519PrivateKey, tls_key: EllipticCurvePrivateKey
) -> SiteRequest:
    """Return a site's request; both keys sign, and so prove to be the site's."""
    public = public_bytes(signing_key)
    fields = {
        "intramural": "request",
        "version": 1,
        "site": site,
        "signing_key": to_base64(public),
        "certificate_request": new_certificate_request(site, tls_key),
        "fingerprint": fingerprint(public),
    }
    return SiteRequest.model_validate(sign_document(REQUEST_TYPE, fields, signing_key))


def read_request(path: Path) -> SiteRequest:
    """Read a request and verify all that can be verified without its sender.

    Raises:
        TrustError: The file is malformed, a field was altered, or one of the two keys did not
            sign.

    Guarantees:
        Whoever made the file holds both private keys. Who that is, only the fingerprint tells,
        compared with the site by voice.
    """
    with named(path):
        request, signed = read_document(path, SiteRequest)
        _check_fingerprint(request.fingerprint, request.public)
        check_document(REQUEST_TYPE, signed, key=request.public)
        read_certificate_request(request.certificate_request, site=request.site)
        return request


class Kit(BaseModel):
    """What makes a site a member: where the coordinator is, how to know it, and a certificate."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    intramural: Literal["kit"]
    """What this file is."""
    version: Literal[1]
    """Of the file's form."""
    federation: Name
    """The federation's name."""
    site: Name
    """Whose kit this is."""
    host: Annotated[str, StringConstraints(min_length=1, max_length=253)]
    """The coordinator's address: a DNS name or an IP address, as in its certificate."""
    port: Port
    """The port of the coordinator's gate."""
    authority: Pem
    """The federation's authority, which issued both ends' certificates."""
    certificate: Pem
    """The site's certificate."""
    coordinator_key: PublicKey
    """Verifies the coordinator's envelopes and seals, and this file's signature."""
    fingerprint: str
    """Of `coordinator_key`, to read aloud."""
    roster: dict[str, Any]
    """The signed roster in which the site stands."""
    signature: str
    """By `coordinator_key`, over all other fields."""

    @property
    def public(self) -> bytes:
        """The coordinator's signing key, 32 raw bytes."""
        return from_base64(self.coordinator_key, what="coordinator_key")

    def open_roster(self) -> Roster:
        """Return the roster, verified."""
        return open_roster(self.roster, key=self.public)

    def site_certificate(self) -> Certificate:
        """Return the site's certificate, read."""
        return read_certificate(self.certificate, what="site's certificate")

    def check_times(self, now: datetime) -> None:
        """Check that both certificates are valid.

        Raises:
            TrustError: One of them is not yet, or not any more.
        """
        check_times(self.site_certificate(), now=now, what="site's certificate")
        authority = read_certificate(self.authority, what="authority's certificate")
        check_times(authority, now=now, what="authority's certificate")


def make_kit(
    *,
    site: str,
    host: str,
    port: int,
    authority: Certificate,
    certificate: Certificate,
    roster: Roster,
    envelope: dict[str, Any],
    key: Ed25519PrivateKey,
) -> Kit:
    """Return a site's kit, signed by the coordinator.

    Args:
        site: Whose it is.
        host: What the site dials.
        port: As `host`.
        authority: The federation's authority.
        certificate: The site's.
        roster: In which the site stands with that certificate.
        envelope: The roster, signed.
        key: The coordinator's signing key.
    """
    public = public_bytes(key)
    fields = {
        "intramural": "kit",
        "version": 1,
        "federation": roster.federation,
        "site": site,
        "host": host,
        "port": port,
        "authority": to_pem(authority),
        "certificate": to_pem(certificate),
        "coordinator_key": to_base64(public),
        "fingerprint": fingerprint(public),
        "roster": envelope,
    }
    return Kit.model_validate(sign_document(KIT_TYPE, fields, key))


def read_kit(path: Path) -> Kit:
    """Read a kit and verify all that can be verified without the site's keys and the time.

    Raises:
        TrustError: The file is malformed, a field was altered, or its parts do not belong
            together.

    Guarantees:
        One coordinator key signed all of it: the address, the authority, the certificate and the
        roster, in which this site is enrolled with this certificate. Whose key that is, only the
        fingerprint tells, compared with the coordinator by voice.
    """
    with named(path):
        kit, signed = read_document(path, Kit)
        _check_fingerprint(kit.fingerprint, kit.public)
        check_document(KIT_TYPE, signed, key=kit.public)
        certificate = kit.site_certificate()
        authority = read_certificate(kit.authority, what="authority's certificate")
        check_issued(certificate, authority, what="site's certificate")
        roster = kit.open_roster()
        if roster.federation != kit.federation or site_of(certificate) != kit.site:
            raise TrustError("roster or certificate is of another name; ask for a new kit")
        if roster.site_of_certificate(certificate_digest(certificate)) != kit.site:
            raise TrustError(
                f"certificate is not that of {kit.site!r} in the roster; ask for a new kit"
            )
        return kit


def _check_fingerprint(told: str, public: bytes) -> None:
    if told != fingerprint(public):
        raise TrustError("fingerprint is not that of the key in the file; ask for it again")
