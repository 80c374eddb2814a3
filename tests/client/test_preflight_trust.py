"""Preflight of a membership: keys, kit, certificates, clock, and the coordinator dialled."""

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from intramural.client.enrol import SiteFolder, examine_kit, init_site, join
from intramural.trust.certificates import (
    Authority,
    certificate_digest,
    issue_server_certificate,
    issue_site_certificate,
    new_authority,
    to_pem,
)
from intramural.trust.keys import new_tls_key, write_key
from intramural.trust.roster import Roster
from intramural.trust.tls import server_context
from tests.client.preflights import DAY, NOW, checks, only, own
from tests.trust.members import entry_of, new_kit


@pytest.fixture
def member(tmp_path: Path) -> Path:
    """Return the site.toml of a site that joined; its certificate is of a year from 2026-11-26."""
    place = own(tmp_path)
    request = init_site(place.parent, name="st-elsewhere")
    joined(place, new_kit(request).model_dump_json())
    return place


def joined(place: Path, kit: str, *, now: datetime = NOW) -> None:
    path = place.parent / "came.json"
    path.write_text(kit)
    join(place.parent, examine_kit(place.parent, path, now=now))


def test_a_members_keys_kit_and_certificates(member: Path) -> None:
    found = checks(member)
    names = ("keys", "kit", "site's certificate", "authority's certificate", "coordinator")
    assert {name: only(found, name).state for name in names} == dict.fromkeys(names, "ok")
    assert "valid until 2027-11-26, 360 days" in only(found, "site's certificate").told
    assert "fl.example.org:8443 not dialled" in only(found, "coordinator").told


@pytest.mark.parametrize(
    ("now", "state", "words"),
    [
        (NOW + 340 * DAY, "warn", "20 days"),
        (NOW + 400 * DAY, "fail", "ended on 2027-11-26"),
        (NOW - 30 * DAY, "fail", "which is to come"),
    ],
)
def test_a_certificates_days(member: Path, now: datetime, state: str, words: str) -> None:
    found = only(checks(member, now=now), "site's certificate")
    assert (found.state, words in found.told, bool(found.remedy)) == (state, True, True)


def test_a_key_that_others_can_read_fails(member: Path) -> None:
    key = SiteFolder(root=member.parent).signing_key
    key.chmod(0o644)
    found = checks(member)["keys"][0]
    assert (found.state, "mode 0644" in found.told) == ("fail", True)
    assert "chmod 600" in found.remedy
    key.unlink()
    assert checks(member)["keys"][0].state == "fail"


def test_a_key_with_a_passphrase_needs_it(tmp_path: Path) -> None:
    place, words = own(tmp_path), "correct horse battery staple"
    init_site(place.parent, name="st-elsewhere", passphrase=words)
    assert only(checks(place, passphrase=words), "keys").state == "ok"
    assert checks(place)["keys"][0].state == "fail"


def test_a_kit_of_another_site_or_other_keys_fails(member: Path) -> None:
    kit = SiteFolder(root=member.parent).kit
    whole = kit.read_text()
    text = member.read_text()
    member.write_text(text.replace("st-elsewhere", "general"))
    assert "is that of 'st-elsewhere'" in only(checks(member), "kit").told
    member.write_text(text)
    kit.write_text(whole.replace('"port": 8443', '"port": 8444').replace('"port":8443', '"port":1'))
    assert only(checks(member), "kit").state == "fail"
    kit.write_text(whole)
    assert only(checks(member), "kit").state == "ok"
    key = SiteFolder(root=member.parent).tls_key
    key.unlink()
    write_key(key, new_tls_key())
    assert "kit is for another key" in only(checks(member), "kit").told


class Answer(BaseHTTPRequestHandler):
    """Answers everything by 501 and the date, as a gate that lets nothing through would."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def date_time_string(self, timestamp: float | None = None) -> str:
        shift: float = getattr(self.server, "shift_s", 0.0)
        return super().date_time_string(datetime.now().timestamp() + shift)


@contextmanager
def gate(authority: Authority, folder: Path, *, shift_s: float = 0.0) -> Iterator[int]:
    """Serve over TLS with client certificates on a free port of loopback; yield the port."""
    key, now = new_tls_key(), datetime.now(UTC)
    certificate = issue_server_certificate(
        authority, key.public_key(), federation="icd", host="127.0.0.1", now=now
    )
    folder.mkdir(parents=True)
    (folder / "tls.pem").write_text(to_pem(certificate))
    (folder / "authority.pem").write_text(to_pem(authority.certificate))
    write_key(folder / "tls.key", key)
    context = server_context(folder / "tls.pem", folder / "tls.key", folder / "authority.pem")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.shift_s = shift_s  # type: ignore[attr-defined]
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def member_of(authority: Authority, folder: Path, port: int) -> Path:
    """Return the site.toml of a site that joined the coordinator at a port of loopback."""
    place, now = own(folder), datetime.now(UTC)
    request = init_site(place.parent, name="st-elsewhere")
    certificate = issue_site_certificate(authority, request.csr, site="st-elsewhere", now=now)
    entry = entry_of(
        "st-elsewhere", certificate_digest(certificate), signing_key=request.signing_key
    )
    roster = Roster(federation="icd", version=2, sites=(entry,))
    changes: dict[str, Any] = {"certificate": certificate, "roster": roster}
    kit = new_kit(request, authority, host="127.0.0.1", port=port, **changes)
    joined(place, kit.model_dump_json(), now=now)
    return place


@pytest.mark.parametrize(
    ("shift_s", "state"), [(0.0, "ok"), (150.0, "warn"), (-150.0, "warn"), (900.0, "fail")]
)
def test_online_the_coordinator_is_dialled_and_clocks_compared(
    tmp_path: Path, shift_s: float, state: str
) -> None:
    authority = new_authority("icd", new_tls_key(), now=datetime.now(UTC))
    with gate(authority, tmp_path / "gate", shift_s=shift_s) as port:
        place = member_of(authority, tmp_path, port)
        found = checks(place, online=True, now=datetime.now(UTC))
    assert "accepts connections" in only(found, "coordinator").told
    assert only(found, "clock").state == state


def test_online_a_gate_of_another_authority_and_none_at_all_are_told(tmp_path: Path) -> None:
    mine, other = (new_authority("icd", new_tls_key(), now=datetime.now(UTC)) for _ in range(2))
    with gate(other, tmp_path / "gate") as port:
        place = member_of(mine, tmp_path, port)
        found = checks(place, online=True, now=datetime.now(UTC))
        assert only(found, "coordinator").state == "ok"
        assert only(found, "clock").state == "fail"
        assert ssl.SSLCertVerificationError.__name__ in only(found, "clock").told
    found = checks(place, online=True, now=datetime.now(UTC))
    assert (only(found, "coordinator").state, "clock" in found) == ("fail", False)
