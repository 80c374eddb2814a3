"""TLS: who gets a handshake, who does not, and what files are refused by name."""

import datetime as dt
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from intramural.core.errors import TrustError
from intramural.trust.tls import client_context, server_context
from tests.trust.pki import SERVER, Authority, Papers

HOUR = dt.timedelta(hours=1)
HOST = "127.0.0.1"


def served_by(papers: Papers) -> ssl.SSLContext:
    return server_context(papers.certificate, papers.key, papers.authority)


def dialled_by(papers: Papers) -> ssl.SSLContext:
    return client_context(papers.certificate, papers.key, papers.authority)


def shake(server: ssl.SSLContext, client: ssl.SSLContext, host: str = HOST) -> ssl.SSLObject:
    """Shake hands in memory and carry a byte each way; return the client's end."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=host),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    for end, other in (ends, ends[::-1]):
        end.write(b"x")
        assert other.read(1) == b"x"
    return ends[0]


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def other_ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("other"))


def test_members_speak_tls_13_and_see_each_others_certificates(ca: Authority) -> None:
    client = shake(served_by(ca.server()), dialled_by(ca.site("a")))
    assert client.version() == "TLSv1.3"
    alternatives = (client.getpeercert() or {})["subjectAltName"]
    assert alternatives == (("IP Address", HOST),)


def test_no_ticket_lets_a_client_skip_the_next_handshake(ca: Authority) -> None:
    session = shake(served_by(ca.server()), dialled_by(ca.site("a"))).session
    assert session is None or not session.has_ticket


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_1])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated:DeprecationWarning")
def test_an_older_version_is_refused_by_both_ends(ca: Authority, version: ssl.TLSVersion) -> None:
    old = [dialled_by(ca.site("a")), served_by(ca.server())]
    for context in old:
        context.minimum_version, context.maximum_version = version, version
    with pytest.raises(ssl.SSLError):
        shake(served_by(ca.server()), old[0])
    with pytest.raises(ssl.SSLError):
        shake(old[1], dialled_by(ca.site("a")))


def test_a_client_without_certificate_is_refused(ca: Authority) -> None:
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.load_verify_locations(ca.file)
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        shake(served_by(ca.server()), bare)


CLIENTS: dict[str, Callable[[Authority, Authority], Papers]] = {
    "self-signed": lambda ca, _: ca.site("self", self_signed=True),
    "of another CA": lambda _, other: other.site("a"),
    "expired": lambda ca, _: ca.site("late", ends=-HOUR),
    "not yet valid": lambda ca, _: ca.site("early", begins=HOUR),
    "meant for servers": lambda ca, _: ca.site("server-as-client", use=SERVER),
}


@pytest.mark.parametrize("kind", CLIENTS)
def test_a_client_certificate_that_is_wrong_is_refused(
    ca: Authority, other_ca: Authority, kind: str
) -> None:
    papers = CLIENTS[kind](ca, other_ca)
    client = client_context(papers.certificate, papers.key, ca.file)  # it does trust the server
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(served_by(ca.server()), client)


def test_a_server_certificate_that_is_wrong_is_refused(ca: Authority, other_ca: Authority) -> None:
    client = dialled_by(ca.site("a"))
    with pytest.raises(ssl.SSLCertVerificationError, match="IP address mismatch"):
        shake(served_by(ca.server(host="10.0.0.1")), client)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake(served_by(ca.server(host="gate.example")), client, "other.example")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(served_by(other_ca.server()), client)
    with pytest.raises(ssl.SSLCertVerificationError):  # a site cannot pass as the coordinator
        shake(served_by(ca.site("b")), client)


def test_only_the_federations_authority_is_trusted_and_no_secret_is_logged(
    ca: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "secrets"))
    for context in (served_by(ca.server()), dialled_by(ca.site("a"))):
        assert len(context.get_ca_certs()) == 1
        assert context.verify_mode == ssl.CERT_REQUIRED
        assert context.keylog_filename is None
    assert dialled_by(ca.site("a")).check_hostname


def test_a_key_with_a_passphrase_is_opened_by_it_alone(ca: Authority) -> None:
    papers = ca.site("locked", passphrase=b"correct horse battery")
    files = papers.certificate, papers.key, papers.authority
    shake(served_by(ca.server()), client_context(*files, passphrase="correct horse battery"))
    for passphrase in (None, "wrong"):
        with pytest.raises(TrustError, match=r"locked\.key.*passphrase"):
            client_context(*files, passphrase=passphrase)


def test_files_that_cannot_be_used_are_named(ca: Authority, tmp_path: Path) -> None:
    good, other, none = ca.server("good"), ca.server("other"), tmp_path / "none"
    text = tmp_path / "text.pem"
    text.write_text("not PEM")
    cases = [
        ((none, good.key, ca.file), "none: no such file"),
        ((good.certificate, none, ca.file), "none: cannot read"),
        ((good.certificate, good.key, none), "none: no such file"),
        ((text, good.key, ca.file), r"text\.pem: is no certificate"),
        ((good.certificate, good.key, text), r"text\.pem: is no certificate"),
        ((good.certificate, good.key, good.certificate), r"good\.pem: holds no CA"),
        ((good.certificate, other.key, ca.file), r"good\.pem: is not of the key .*other\.key"),
    ]
    for files, message in cases:
        with pytest.raises(TrustError, match=message):
            server_context(*files)


def test_a_key_that_others_can_read_is_refused(ca: Authority) -> None:
    papers = ca.server("open")
    papers.key.chmod(0o640)
    with pytest.raises(TrustError, match=r"open\.key.*chmod 600"):
        served_by(papers)
