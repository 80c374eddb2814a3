"""Certificates for tests, made with `cryptography` alone: a second road to what the gates check."""

import datetime as dt
import hashlib
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NOW = dt.datetime.now(dt.UTC)
DAY, LONG = dt.timedelta(days=1), dt.timedelta(days=100)
SERVER, CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH


@dataclass(frozen=True, kw_only=True)
class Papers:
    """The files that one end of a connection needs."""

    certificate: Path
    key: Path
    authority: Path
    digest: str
    """Of the certificate."""


class Authority:
    """A CA with its files in a folder."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.file = folder / f"{name}.pem"
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = _usage(signs_certificates=True)
        self.certificate = (
            _builder(self.name, self.name, self.key.public_key(), -DAY, LONG)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(self.key, SHA256())
        )
        self.file.write_bytes(self.certificate.public_bytes(Encoding.PEM))

    def server(self, name: str = "server", *, host: str = "127.0.0.1") -> Papers:
        return self._issue(name, SERVER, host=host)

    def site(
        self,
        name: str,
        *,
        begins: dt.timedelta = -DAY,
        ends: dt.timedelta = LONG,
        use: x509.ObjectIdentifier = CLIENT,
        self_signed: bool = False,
        passphrase: bytes | None = None,
    ) -> Papers:
        return self._issue(
            name,
            use,
            begins=begins,
            ends=ends,
            self_signed=self_signed,
            passphrase=passphrase,
        )

    def _issue(
        self,
        name: str,
        use: x509.ObjectIdentifier,
        *,
        host: str = "",
        begins: dt.timedelta = -DAY,
        ends: dt.timedelta = LONG,
        self_signed: bool = False,
        passphrase: bytes | None = None,
    ) -> Papers:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        issuer, signer = (subject, key) if self_signed else (self.name, self.key)
        aki = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
        certificate = (
            _builder(subject, issuer, key.public_key(), begins, ends)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
            .add_extension(x509.SubjectAlternativeName([_alternative(host, name)]), critical=False)
            .add_extension(aki, critical=False)
            .sign(signer, SHA256())
        )
        files = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        files[0].write_bytes(certificate.public_bytes(Encoding.PEM))
        hidden = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
        files[1].touch(mode=0o600)
        files[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, hidden))
        digest = hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()
        return Papers(
            certificate=files[0], key=files[1], authority=self.file, digest=f"sha256:{digest}"
        )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    begins: dt.timedelta,
    ends: dt.timedelta,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + begins)
        .not_valid_after(NOW + ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _alternative(host: str, name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        is_host = bool(host)
        return x509.DNSName(host) if is_host else x509.UniformResourceIdentifier(f"site:{name}")


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
