"""Certificates (X.509 v3, EC P-256): the authority's, the coordinator's and the sites'.

A site's name is the certificate's common name and its URI `intramural:site:NAME`.
"""

import ipaddress
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from intramural.core.canonical import digest_bytes
from intramural.core.errors import TrustError

AUTHORITY_DAYS, CERTIFICATE_DAYS = 3650, 365
BACKDATED = timedelta(minutes=5)
"""How much slower than ours a peer's clock may go for it to take a new certificate."""
SITE_URI = "intramural:site:"
COORDINATOR_URI = "intramural:coordinator:"
PEM_CHARACTERS_MAX = 16_384
MALFORMED = (
    ValueError,
    TypeError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
    CryptographyDeprecationWarning,
)
"""What the cryptography library raises at a stranger's bytes."""

_NO_USE = dict.fromkeys(
    (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    ),
    False,
)


@dataclass(frozen=True, kw_only=True)
class Authority:
    """What issues certificates."""

    certificate: x509.Certificate
    key: EllipticCurvePrivateKey


def new_authority(
    federation: str, key: EllipticCurvePrivateKey, *, now: datetime, days: int = AUTHORITY_DAYS
) -> Authority:
    """Return the federation's authority: a certificate that it signs itself.

    Args:
        federation: The federation's name.
        key: The authority's own key.
        now: Aware; the certificate is valid from five minutes before.
        days: How long it is valid.
    """
    name = subject_of("authority", federation=federation)
    public = key.public_key()
    builder = _builder(name, name, public, now, now + timedelta(days=days))
    builder = (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.KeyUsage(**_NO_USE | {"key_cert_sign": True, "crl_sign": True}), critical=True
        )
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
    )
    return Authority(certificate=builder.sign(key, SHA256()), key=key)


def issue_server_certificate(
    authority: Authority,
    public: EllipticCurvePublicKey,
    *,
    federation: str,
    host: str,
    now: datetime,
    days: int = CERTIFICATE_DAYS,
) -> x509.Certificate:
    """Return the coordinator's certificate, for TLS servers alone.

    Args:
        authority: The issuer.
        public: The public half of the coordinator's TLS key.
        federation: The federation's name.
        host: What the sites dial: a DNS name or an IP address, as it will stand in their kits.
        now: Aware.
        days: How long it is valid, at most as long as the authority.
    """
    names = [_host_name(host), x509.UniformResourceIdentifier(COORDINATOR_URI + federation)]
    subject, use = subject_of("coordinator", federation=federation), ExtendedKeyUsageOID.SERVER_AUTH
    return _issue(authority, public, subject, names, use, now, days)


def issue_site_certificate(
    authority: Authority,
    request: x509.CertificateSigningRequest,
    *,
    site: str,
    now: datetime,
    days: int = CERTIFICATE_DAYS,
) -> x509.Certificate:
    """Return a site's certificate, for TLS clients alone.

    Only the key is taken from the request: what else the site asked for is not looked at.

    Args:
        authority: The issuer.
        request: As `trust/csr.py` checked it.
        site: The site's name.
        now: Aware.
        days: How long it is valid, at most as long as the authority.
    """
    names = [x509.UniformResourceIdentifier(SITE_URI + site)]
    public = tls_key_of(request, what="certificate request")
    return _issue(
        authority, public, subject_of(site), names, ExtendedKeyUsageOID.CLIENT_AUTH, now, days
    )


@contextmanager
def strictly() -> Iterator[None]:
    """Make an error of what the cryptography library still reads with a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", CryptographyDeprecationWarning)
        yield


def _issue(
    authority: Authority,
    public: EllipticCurvePublicKey,
    subject: x509.Name,
    names: Sequence[x509.GeneralName],
    use: x509.ObjectIdentifier,
    now: datetime,
    days: int,
) -> x509.Certificate:
    issuer = authority.certificate
    end = min(now + timedelta(days=days), issuer.not_valid_after_utc)
    if end <= now:
        raise TrustError(
            f"the authority's certificate ended on {issuer.not_valid_after_utc:%Y-%m-%d}; "
            "begin a new federation with `intramural server init`"
        )
    builder = _builder(subject, issuer.subject, public, now, end)
    issuer_key = authority.key.public_key()
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**_NO_USE | {"digital_signature": True}), critical=True)
        .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False
        )
        .sign(authority.key, SHA256())
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: EllipticCurvePublicKey,
    now: datetime,
    end: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before((now - BACKDATED).astimezone(UTC))
        .not_valid_after(end.astimezone(UTC))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def subject_of(common_name: str, *, federation: str | None = None) -> x509.Name:
    """Return a subject; a site's has no federation in it, so that none looks like an authority."""
    organisation = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation)] if federation else []
    return x509.Name([*organisation, x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def common_name_of(subject: x509.Name) -> str:
    """Return the common name of a subject that consists of nothing else; else an empty text."""
    names = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == len(list(subject)) == 1 else ""


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def tls_key_of(
    holder: x509.Certificate | x509.CertificateSigningRequest, *, what: str = "certificate"
) -> EllipticCurvePublicKey:
    """Return the public key of a certificate or of a request; `what` names it in errors.

    Raises:
        TrustError: It is not an EC P-256 key.
    """
    key = holder.public_key()
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP256R1):
        raise TrustError(f"{what} is not of an EC P-256 key; ask for a new one")
    return key


def to_pem(certificate: x509.Certificate) -> str:
    """Return a certificate as PEM text."""
    return certificate.public_bytes(Encoding.PEM).decode()


def read_certificate(pem: str, *, what: str = "certificate") -> x509.Certificate:
    """Read one certificate; `what` names it in errors.

    Raises:
        TrustError: The text is not one PEM certificate of an EC P-256 key and nothing else.
    """
    try:
        with strictly():
            certificate = x509.load_pem_x509_certificate(pem[: PEM_CHARACTERS_MAX + 1].encode())
        is_whole = to_pem(certificate) == pem
        tls_key_of(certificate, what=what)
    except MALFORMED:
        is_whole = False
    if not is_whole:
        raise TrustError(f"{what} is not one certificate in PEM; ask for it again")
    return certificate


def certificate_digest(certificate: str | bytes | x509.Certificate) -> str:
    """Return `sha256:` and the digest of a certificate's DER bytes, given as PEM, DER or read.

    Raises:
        TrustError: PEM text is not a certificate. DER bytes are taken as they are.
    """
    if isinstance(certificate, str):
        certificate = read_certificate(certificate)
    if isinstance(certificate, x509.Certificate):
        certificate = certificate.public_bytes(Encoding.DER)
    return digest_bytes(certificate)


def ends_of(certificate: bytes) -> datetime:
    """Return when a certificate ends, given as DER bytes that TLS has verified."""
    return x509.load_der_x509_certificate(certificate).not_valid_after_utc


def holder_of(certificate: bytes) -> str:
    """Return the common name in a certificate, given as DER bytes that TLS has verified."""
    return common_name_of(x509.load_der_x509_certificate(certificate).subject)


def site_of(certificate: x509.Certificate) -> str:
    """Return the site that a certificate names.

    Raises:
        TrustError: It is not a site's, or its two names differ.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        uses = list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except (x509.ExtensionNotFound, *MALFORMED):
        uris, uses = [], []
    name = common_name_of(certificate.subject)
    if uris != [SITE_URI + name] or uses != [ExtendedKeyUsageOID.CLIENT_AUTH]:
        raise TrustError("certificate is not a site's; ask the coordinator for a kit")
    return name


def check_issued(certificate: x509.Certificate, authority: x509.Certificate, *, what: str) -> None:
    """Check that an authority issued a certificate; `what` names it in errors.

    Raises:
        TrustError: Another issuer, or one that is no authority.
    """
    try:
        constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints).value
        authority.verify_directly_issued_by(authority)
        certificate.verify_directly_issued_by(authority)
    except x509.ExtensionNotFound:
        constraints = x509.BasicConstraints(ca=False, path_length=None)
    except MALFORMED:
        raise TrustError(
            f"{what} was not issued by the authority beside it; ask for both again"
        ) from None
    if not constraints.ca:
        raise TrustError("authority's certificate is not an authority's; ask for it again")


def check_times(certificate: x509.Certificate, *, now: datetime, what: str) -> None:
    """Check that a certificate is valid now; `what` names it in errors.

    Raises:
        TrustError: It is not yet, or not any more.
    """
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begin:
        raise TrustError(
            f"{what} is valid from {begin:%Y-%m-%d %H:%M} UTC, and here it is "
            f"{now.astimezone(UTC):%Y-%m-%d %H:%M}; set this machine's clock"
        )
    if now > end:
        raise TrustError(f"{what} ended on {end:%Y-%m-%d}; ask for a new one")
