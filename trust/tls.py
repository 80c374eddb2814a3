"""TLS contexts of the two gates: version 1.3 alone, both ends certified by the federation's CA."""

import ssl
from pathlib import Path

from intramural.core.errors import TrustError
from intramural.trust.keys import read_tls_key


def server_context(
    certificate: Path, key: Path, authority: Path, *, passphrase: str | None = None
) -> ssl.SSLContext:
    """Return the context of a server that asks every client for a certificate.

    Args:
        certificate: PEM file: the server's certificate.
        key: PEM file: its private key, EC P-256.
        authority: PEM file: the federation's CA, the only one trusted.
        passphrase: Needed when the key's file is encrypted.

    Raises:
        TrustError: A file is missing, holds something else, or key and certificate differ.

    Guarantees:
        No byte reaches HTTP before the client has proved to hold the key of a certificate that
        this CA signed, is in date and is meant for clients. The system's CAs are not trusted, no
        older version is spoken, no session is resumed without a handshake, and no environment
        variable makes the library log session keys. Whether a certificate was revoked is not
        looked at here: whoever serves asks per request who the certificate's owner is.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER, certificate, key, authority, passphrase)
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET
    return context


def client_context(
    certificate: Path, key: Path, authority: Path, *, passphrase: str | None = None
) -> ssl.SSLContext:
    """Return the context of a client that shows its certificate; see `server_context`.

    Guarantees:
        As `server_context`, of the server's certificate; and the certificate must name, as a
        subject alternative name, the host that was asked for.
    """
    context = _context(ssl.PROTOCOL_TLS_CLIENT, certificate, key, authority, passphrase)
    context.check_hostname = True
    context.hostname_checks_common_name = False
    return context


def _context(
    side: int, certificate: Path, key: Path, authority: Path, passphrase: str | None
) -> ssl.SSLContext:
    # Not create_default_context: that trusts the system's CAs and obeys SSLKEYLOGFILE.
    context = ssl.SSLContext(side)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    read_tls_key(key, passphrase=passphrase)  # its errors name the file; OpenSSL's do not
    for path in (certificate, authority):
        if not path.is_file():
            raise TrustError(f"{path}: no such file; restore it, or join the federation again")
    try:
        context.load_verify_locations(cafile=authority)
    except (ssl.SSLError, OSError) as error:
        raise TrustError(f"{authority}: is no certificate in PEM; restore it") from error
    if not context.get_ca_certs():
        raise TrustError(f"{authority}: holds no CA certificate; restore authority.pem")
    try:
        # A callable, for without one OpenSSL asks for the passphrase on the terminal.
        context.load_cert_chain(certificate, key, password=lambda: passphrase or "")
    except (ssl.SSLError, OSError) as error:
        reason = getattr(error, "reason", None)
        if reason == "KEY_VALUES_MISMATCH":
            raise TrustError(f"{certificate}: is not of the key {key}; restore both") from error
        raise TrustError(f"{certificate}: is no certificate in PEM; restore it") from error
    return context
