"""Enrolment: a name and its keys belong together, from the first kit to the last."""

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from intramural.core.errors import ConfigError, TrustError
from intramural.core.journal import scan
from intramural.server.enrol import enrol_site, revoke_site, rotate_site, write_kit
from intramural.server.folder import CoordinatorFolder
from intramural.server.settings import load_coordinator
from intramural.trust.certificates import certificate_digest, check_issued, read_certificate
from intramural.trust.keys import new_tls_key, read_public
from intramural.trust.kit import make_request, read_kit
from intramural.trust.roster import Roster, load_roster
from tests.trust.members import NOW, clock, coordinator, request_of, signing_key

A = request_of("a")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return coordinator(tmp_path / "c")


def roster(folder: Path) -> Roster:
    place = CoordinatorFolder(root=folder)
    return load_roster(place.roster, key=read_public(place.signing_public))


def state(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_enrolled_site_is_in_the_roster_with_its_key_and_certificate(folder: Path) -> None:
    done = enrol_site(folder, A, now=clock())
    assert (done.kind, done.kit.site, done.kit.federation) == ("enrolled", "a", "icd")
    assert (done.kit.host, done.kit.port) == ("fl.example.org", 8443)
    (entry,) = roster(folder).sites
    assert (entry.name, entry.state, entry.since) == ("a", "enrolled", "2026-11-26T12:00:00+00:00")
    assert entry.public == A.public
    assert entry.certificates == (certificate_digest(done.kit.certificate),)
    assert done.kit.open_roster() == roster(folder)
    assert done.kit.public == read_public(folder / "signing.pub")
    entry_ = scan(folder / "journal.jsonl").entries[-1]
    assert entry_.kind == "enrolled"
    assert entry_.body["tls_key"] == A.tls_key
    assert entry_.body["ends"] == "2027-11-26T12:00:00+00:00"


def test_the_kit_verifies_and_its_certificate_is_of_the_requests_key(
    folder: Path, tmp_path: Path
) -> None:
    done = enrol_site(folder, A, now=clock(), days=30)
    write_kit(tmp_path / "deep" / "kit.json", done.kit)
    kit = read_kit(tmp_path / "deep" / "kit.json")
    assert kit == done.kit
    certificate = kit.site_certificate()
    check_issued(certificate, read_certificate((folder / "authority.pem").read_text()), what="x")
    assert certificate.public_key() == A.csr.public_key()
    assert certificate.not_valid_after_utc == NOW + timedelta(days=30)


def test_the_same_request_again_renews_and_keeps_the_old_certificate(folder: Path) -> None:
    first = enrol_site(folder, A, now=clock())
    later = NOW + timedelta(days=300)
    second = enrol_site(folder, A, now=lambda: later)
    assert second.kind == "renewed"
    found = roster(folder)
    assert found.version == 3
    for kit in (first.kit, second.kit):  # both serve, so that a site can change over
        assert found.site_of_certificate(certificate_digest(kit.certificate)) == "a"
    (entry,) = found.sites
    assert entry.since == "2026-11-26T12:00:00+00:00"
    assert second.kit.site_certificate().not_valid_after_utc == later + timedelta(days=365)


def test_the_same_signing_key_may_come_with_a_new_tls_key(folder: Path) -> None:
    enrol_site(folder, A, now=clock())
    again = make_request("a", signing_key=signing_key("a"), tls_key=new_tls_key())
    assert enrol_site(folder, again, now=clock()).kind == "renewed"
    (entry,) = roster(folder).sites
    assert len(entry.certificates) == 2


def refused(folder: Path, message: str, command: Any, *words: Any) -> None:
    """Check that a command is refused with exit code 3 and changes nothing."""
    before = state(folder)
    with pytest.raises(TrustError, match=message) as found:
        command(folder, *words, now=clock())
    assert found.value.exit_code == 3
    assert state(folder) == before


def test_a_name_that_has_another_key_is_refused(folder: Path) -> None:
    enrol_site(folder, A, now=clock())
    thief = request_of("a", key="thief")
    refused(
        folder, "'a' is enrolled with another key; .*`intramural server rotate`", enrol_site, thief
    )


def test_a_key_that_is_another_sites_is_refused(folder: Path) -> None:
    enrol_site(folder, A, now=clock())
    same_signing = request_of("b", key="a")
    refused(
        folder,
        "signing key of this request was enrolled before, for site 'a'",
        enrol_site,
        same_signing,
    )
    tls = new_tls_key()
    enrol_site(folder, make_request("b", signing_key=signing_key("b"), tls_key=tls), now=clock())
    same_tls = make_request("c", signing_key=signing_key("c"), tls_key=tls)
    refused(
        folder, "TLS key of this request was enrolled before, for site 'b'", enrol_site, same_tls
    )


def test_a_rotation_puts_new_keys_in_the_place_of_the_old(folder: Path) -> None:
    old = enrol_site(folder, A, now=clock())
    new = request_of("a", key="a2")
    later = NOW + timedelta(days=1)
    done = rotate_site(folder, new, now=lambda: later)
    found = roster(folder)
    assert done.kind == "rotated"
    assert found.version == 3
    assert found.site_of_certificate(certificate_digest(old.kit.certificate)) is None
    assert found.site_of_certificate(certificate_digest(done.kit.certificate)) == "a"
    assert found.signing_key_of("a") == new.public
    (entry,) = found.sites
    assert entry.since == "2026-11-27T12:00:00+00:00"
    assert (
        enrol_site(folder, new, now=clock()).kind == "renewed"
    )  # another kit, if that one is lost


def test_old_keys_never_come_back(folder: Path) -> None:
    enrol_site(folder, A, now=clock())
    second = request_of("a", key="a2")
    rotate_site(folder, second, now=clock())
    refused(folder, "signing key of this request was enrolled before, for site 'a'", rotate_site, A)
    refused(folder, "'a' is enrolled with another key", enrol_site, A)
    # nor does one of them beside a new one
    tls = new_tls_key()
    third = make_request("a", signing_key=signing_key("a3"), tls_key=tls)
    rotate_site(folder, third, now=clock())
    mixed = make_request("a", signing_key=signing_key("a4"), tls_key=tls)
    refused(folder, "TLS key of this request was enrolled before", rotate_site, mixed)
    refused(folder, "has these keys already; .*`intramural server enrol`", rotate_site, third)


def test_a_rotation_is_for_known_sites(folder: Path) -> None:
    refused(folder, "'a' is not known; run `intramural server enrol`", rotate_site, A)


def test_a_revoked_site_is_out_and_its_name_stays_taken(folder: Path) -> None:
    done = enrol_site(folder, A, now=clock())
    enrol_site(folder, request_of("b"), now=clock())
    assert revoke_site(folder, "a", now=lambda: NOW + timedelta(hours=1)) is True
    found = roster(folder)
    assert found.site_of_certificate(certificate_digest(done.kit.certificate)) is None
    assert found.signing_key_of("a") is None
    assert found.signing_key_of("b") is not None
    entry = found.entry("a")
    assert entry is not None
    assert (entry.state, entry.since) == ("revoked", "2026-11-26T13:00:00+00:00")
    before = state(folder)
    assert revoke_site(folder, "a", now=clock()) is False
    assert state(folder) == before
    refused(folder, "'a' is revoked; .*new keys", enrol_site, A)
    refused(folder, "'a' is revoked; .*new keys", enrol_site, request_of("a", key="other"))
    refused(folder, "was enrolled before, for site 'a'", rotate_site, A)


def test_a_revoked_site_comes_back_with_new_keys_alone(folder: Path) -> None:
    old = enrol_site(folder, A, now=clock())
    revoke_site(folder, "a", now=clock())
    done = rotate_site(folder, request_of("a", key="a2"), now=clock())
    found = roster(folder)
    assert found.site_of_certificate(certificate_digest(done.kit.certificate)) == "a"
    assert found.site_of_certificate(certificate_digest(old.kit.certificate)) is None


def test_revoking_a_stranger_names_the_known(folder: Path) -> None:
    refused(folder, "'x' is not known; known sites: none", revoke_site, "x")
    enrol_site(folder, A, now=clock())
    enrol_site(folder, request_of("b"), now=clock())
    refused(folder, "'x' is not known; known sites: a, b", revoke_site, "x")


def test_revoking_needs_no_authority_key(folder: Path) -> None:
    enrol_site(folder, A, now=clock())
    (folder / "keys" / "authority.key").unlink()  # kept elsewhere, as it may be
    refused(folder, r"authority\.key: cannot read", enrol_site, request_of("b"))
    assert revoke_site(folder, "a", now=clock()) is True


def test_wrong_settings_change_nothing(folder: Path) -> None:
    table = load_coordinator(folder).model_dump() | {"name": "other"}
    (folder / "coordinator.toml").write_text(tomli_w.dumps({"coordinator": table}))
    before = state(folder)
    with pytest.raises(ConfigError, match=r"coordinator\.name: is fixed as 'icd'"):
        enrol_site(folder, A, now=clock())
    assert state(folder) == before


def test_an_authority_whose_time_is_over_enrols_nobody(folder: Path) -> None:
    def late() -> datetime:
        return NOW + timedelta(days=3651)

    before = state(folder)
    with pytest.raises(TrustError, match="authority's certificate ended on 2036-11-23"):
        enrol_site(folder, A, now=late)
    assert state(folder) == before


def test_a_new_address_is_in_the_next_kit(folder: Path) -> None:
    enrol_site(folder, A, now=clock())
    table = load_coordinator(folder).model_dump() | {"host": "10.0.0.3", "port": 443}
    (folder / "coordinator.toml").write_text(tomli_w.dumps({"coordinator": table}))
    kit = enrol_site(folder, A, now=clock()).kit
    assert (kit.host, kit.port) == ("10.0.0.3", 443)
