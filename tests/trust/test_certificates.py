"""Certificates: what they say, and that other implementations take them for what they are."""

import base64
import ipaddress
import textwrap
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from intramural.core.errors import TrustError
from intramural.trust.certificates import (
    Authority,
    certificate_digest,
    check_issued,
    check_times,
    issue_server_certificate,
    issue_site_certificate,
    new_authority,
    read_certificate,
    site_of,
    tls_key_of,
    to_pem,
)
from intramural.trust.csr import new_certificate_request, read_certificate_request
from intramural.trust.keys import new_tls_key, tls_key_digest
from tests.trust.members import NOW, openssl

KEY = new_tls_key()
AUTHORITY = new_authority("icd", new_tls_key(), now=NOW)
SITE = "st-elsewhere"


def site_certificate(
    site: str = SITE, authority: Authority = AUTHORITY, **options: Any
) -> x509.Certificate:
    request = read_certificate_request(new_certificate_request(site, KEY), site=site)
    return issue_site_certificate(authority, request, site=site, **{"now": NOW} | options)


def server_certificate(host: str = "fl.example.org", **options: Any) -> x509.Certificate:
    options = {"federation": "icd", "now": NOW, **options}
    return issue_server_certificate(AUTHORITY, KEY.public_key(), host=host, **options)


def verifier(time: datetime = NOW) -> verification.PolicyBuilder:
    store = verification.Store([AUTHORITY.certificate])
    return verification.PolicyBuilder().store(store).time(time)


def test_a_site_certificate_verifies_as_a_clients() -> None:
    verified = verifier().build_client_verifier().verify(site_certificate(), [])
    assert verified.subjects == [x509.UniformResourceIdentifier("intramural:site:st-elsewhere")]
    with pytest.raises(verification.VerificationError):
        verifier().build_client_verifier().verify(server_certificate(), [])


@pytest.mark.parametrize(
    ("host", "subject"),
    [
        ("fl.example.org", x509.DNSName("fl.example.org")),
        ("10.1.2.3", x509.IPAddress(ipaddress.ip_address("10.1.2.3"))),
        ("fd00::7", x509.IPAddress(ipaddress.ip_address("fd00::7"))),
    ],
)
def test_a_server_certificate_verifies_for_its_host_alone(
    host: str, subject: verification.Subject
) -> None:
    certificate = server_certificate(host)
    verifier().build_server_verifier(subject).verify(certificate, [])
    other = x509.DNSName("fl.example.com")
    with pytest.raises(verification.VerificationError):
        verifier().build_server_verifier(other).verify(certificate, [])
    with pytest.raises(verification.VerificationError):
        verifier().build_server_verifier(subject).verify(site_certificate(), [])


def test_openssl_takes_each_for_its_purpose_alone(tmp_path: Path) -> None:
    for name, certificate in (
        ("ca", AUTHORITY.certificate),
        ("site", site_certificate()),
        ("server", server_certificate()),
    ):
        (tmp_path / name).write_text(to_pem(certificate))
    at = int(NOW.timestamp())
    words = ("verify", "-x509_strict", "-attime", at, "-CAfile", tmp_path / "ca", "-purpose")
    openssl(*words, "sslclient", tmp_path / "site")
    openssl(*words, "sslserver", tmp_path / "server")
    openssl(*words, "sslserver", tmp_path / "site", fails=True)
    openssl(*words, "sslclient", tmp_path / "server", fails=True)
    openssl(*words, "sslserver", "-verify_hostname", "fl.example.org", tmp_path / "server")
    text = openssl("x509", "-in", tmp_path / "site", "-noout", "-text")
    assert "Subject: CN = st-elsewhere" in text
    assert "URI:intramural:site:st-elsewhere" in text
    assert "Issuer: O = icd, CN = authority" in text


def test_validity_is_from_five_minutes_ago_for_one_year_and_ten() -> None:
    for certificate, days in (
        (site_certificate(), 365),
        (server_certificate(), 365),
        (AUTHORITY.certificate, 3650),
        (site_certificate(days=7), 7),
    ):
        assert certificate.not_valid_before_utc == NOW - timedelta(minutes=5)
        assert certificate.not_valid_after_utc == NOW + timedelta(days=days)


def test_other_implementations_refuse_before_and_after() -> None:
    certificate = site_certificate()
    for off in (timedelta(minutes=-4), timedelta(days=364)):
        verifier(NOW + off).build_client_verifier().verify(certificate, [])
    for off in (timedelta(minutes=-6), timedelta(days=366)):
        with pytest.raises(verification.VerificationError):
            verifier(NOW + off).build_client_verifier().verify(certificate, [])


def test_check_times_names_what_to_do() -> None:
    certificate = site_certificate()
    check_times(certificate, now=NOW - timedelta(minutes=5), what="x")
    check_times(certificate, now=NOW + timedelta(days=365), what="x")
    with pytest.raises(TrustError, match=r"x is valid from 2026-11-26 11:55 UTC, and here it is "):
        check_times(certificate, now=NOW - timedelta(minutes=6), what="x")
    with pytest.raises(TrustError, match="x ended on 2027-11-26; ask for a new one"):
        check_times(certificate, now=NOW + timedelta(days=365, seconds=1), what="x")


def test_no_certificate_outlives_its_authority() -> None:
    late = NOW + timedelta(days=3600)
    certificate = site_certificate(now=late)
    assert certificate.not_valid_after_utc == AUTHORITY.certificate.not_valid_after_utc
    with pytest.raises(TrustError, match="authority's certificate ended on 2036-11-23"):
        site_certificate(now=NOW + timedelta(days=3650))


def test_the_longest_names_fit() -> None:
    name = "a" * 63
    authority = new_authority(name, new_tls_key(), now=NOW)
    assert site_of(site_certificate(name, authority)) == name
    issue_server_certificate(authority, KEY.public_key(), federation=name, host="h", now=NOW)


def test_only_the_key_of_a_request_is_taken() -> None:
    builder = x509.CertificateSigningRequestBuilder()
    builder = builder.subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SITE)]))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    greedy = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    builder = builder.add_extension(greedy, critical=False)
    names = x509.SubjectAlternativeName([x509.DNSName("fl.example.org")])
    request = builder.add_extension(names, critical=False).sign(KEY, SHA256())
    read = read_certificate_request(request.public_bytes(Encoding.PEM).decode(), site=SITE)
    certificate = issue_site_certificate(AUTHORITY, read, site=SITE, now=NOW)
    plain = site_certificate()
    given = [(e.oid, e.critical, e.value) for e in certificate.extensions]
    assert given == [(e.oid, e.critical, e.value) for e in plain.extensions]
    assert tls_key_digest(tls_key_of(certificate)) == tls_key_digest(KEY)


def request_with(key: Any, *names: str, algorithm: Any = None) -> str:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return builder.sign(key, algorithm).public_bytes(Encoding.PEM).decode()


@pytest.mark.parametrize(
    ("pem", "message"),
    [
        ("", "malformed"),
        ("-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", "malf"),
        ("\ud800", "malformed"),
        (new_certificate_request(SITE, KEY) * 2, "not signed|malformed"),
        (" " + new_certificate_request(SITE, KEY), "not signed|malformed"),
        (new_certificate_request("other", KEY), "is of 'other', not of 'st-elsewhere'"),
        (request_with(KEY, SITE, SITE, algorithm=SHA256()), "is of '', not of"),
        (request_with(KEY, algorithm=SHA256()), "is of '', not of"),
        (
            request_with(rsa.generate_private_key(65537, 2048), SITE, algorithm=SHA256()),
            "not of an EC P-256",
        ),
        (
            request_with(ec.generate_private_key(ec.SECP384R1()), SITE, algorithm=SHA256()),
            "not of an EC P-256",
        ),
        (request_with(ed25519.Ed25519PrivateKey.generate(), SITE), "not of an EC P-256"),
        (to_pem(AUTHORITY.certificate), "malformed"),
    ],
)
def test_other_requests_are_refused(pem: str, message: str) -> None:
    with pytest.raises(TrustError, match=message):
        read_certificate_request(pem, site=SITE)


def as_pem(der: bytes, label: str) -> str:
    """Return bytes as PEM, whatever they are."""
    lines = "\n".join(textwrap.wrap(base64.b64encode(der).decode(), 64))
    return f"-----BEGIN {label}-----\n{lines}\n-----END {label}-----\n"


def test_a_request_in_which_a_signed_bit_changed_is_refused() -> None:
    request = read_certificate_request(new_certificate_request(SITE, KEY), site=SITE)
    der = request.public_bytes(Encoding.DER)
    assert as_pem(der, "CERTIFICATE REQUEST") == request.public_bytes(Encoding.PEM).decode()
    for place in range(8 * len(der)):
        flipped = bytearray(der)
        flipped[place // 8] ^= 1 << place % 8
        try:
            read = read_certificate_request(
                as_pem(bytes(flipped), "CERTIFICATE REQUEST"), site=SITE
            )
        except TrustError:
            continue
        # the count of a BIT STRING's unused bits: the file's own signature covers that
        assert read.tbs_certrequest_bytes == request.tbs_certrequest_bytes


def test_a_certificate_in_which_a_signed_bit_changed_is_refused() -> None:
    certificate = site_certificate()
    der = certificate.public_bytes(Encoding.DER)
    for place in range(8 * len(der)):
        flipped = bytearray(der)
        flipped[place // 8] ^= 1 << place % 8
        try:
            changed = read_certificate(as_pem(bytes(flipped), "CERTIFICATE"))
            check_issued(changed, AUTHORITY.certificate, what="x")
        except TrustError:
            continue
        assert changed.tbs_certificate_bytes == certificate.tbs_certificate_bytes


def test_a_certificate_reads_back_and_its_digest_is_of_its_der() -> None:
    certificate = site_certificate()
    pem, der = to_pem(certificate), certificate.public_bytes(Encoding.DER)
    assert read_certificate(pem) == certificate
    printed = certificate.fingerprint(SHA256()).hex()
    assert certificate_digest(pem) == certificate_digest(der) == f"sha256:{printed}"
    assert certificate_digest(certificate) == certificate_digest(der)


@pytest.mark.parametrize(
    "pem",
    [
        "",
        "x",
        to_pem(AUTHORITY.certificate) * 2,
        to_pem(AUTHORITY.certificate) + "\n",
        "# ours\n" + to_pem(AUTHORITY.certificate),
        to_pem(AUTHORITY.certificate)[:-40],
        new_certificate_request(SITE, KEY),
        "é",
    ],
)
def test_what_is_not_one_certificate_is_refused(pem: str) -> None:
    with pytest.raises(TrustError, match="x is not one certificate in PEM"):
        read_certificate(pem, what="x")


def test_site_of_takes_a_site_certificate_alone() -> None:
    assert site_of(site_certificate()) == SITE
    for certificate in (server_certificate(), AUTHORITY.certificate):
        with pytest.raises(TrustError, match="certificate is not a site's"):
            site_of(certificate)


def test_check_issued_takes_the_issuer_alone() -> None:
    certificate = site_certificate()
    check_issued(certificate, AUTHORITY.certificate, what="x")
    twin = new_authority("icd", new_tls_key(), now=NOW)  # the same names, another key
    for other in (twin.certificate, certificate, server_certificate()):
        with pytest.raises(TrustError, match="x was not issued by the authority beside it"):
            check_issued(certificate, other, what="x")


def test_an_issuer_that_is_no_authority_is_refused() -> None:
    # signed by itself, and without the right to issue
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "self")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name)
    builder = builder.public_key(KEY.public_key()).serial_number(1)
    builder = builder.not_valid_before(NOW).not_valid_after(NOW + timedelta(days=1))
    bare = builder.sign(KEY, SHA256())
    never = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    for certificate in (bare, never.sign(KEY, SHA256())):
        with pytest.raises(TrustError, match="is not an authority's"):
            check_issued(certificate, certificate, what="x")
