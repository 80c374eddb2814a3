"""Founding: a coordinator's folder, made once, and its own certificate renewed."""

import stat
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from cryptography import x509

from intramural.core.errors import ConfigError, TrustError
from intramural.core.journal import scan
from intramural.server.folder import CoordinatorFolder
from intramural.server.founding import init_coordinator, renew_coordinator
from intramural.server.settings import Coordinator, load_coordinator
from intramural.trust.certificates import check_issued, read_certificate, tls_key_of
from intramural.trust.keys import (
    new_signing_key,
    new_tls_key,
    public_bytes,
    read_public,
    read_signing_key,
    read_tls_key,
    tls_key_digest,
    write_key,
)
from intramural.trust.roster import load_roster
from tests.trust.members import NOW, clock, coordinator, openssl

PASSPHRASE = "correct horse battery staple"
SETTINGS = Coordinator(name="icd", host="fl.example.org")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_coordinators_folder_holds_what_it_should(tmp_path: Path) -> None:
    public = init_coordinator(tmp_path / "c", SETTINGS, now=clock())
    place = CoordinatorFolder(root=tmp_path / "c")
    assert set(files(place.root)) == {
        ".register.lock",
        "authority.pem",
        "coordinator.toml",
        "federation.toml",
        "journal.jsonl",
        "keys/authority.key",
        "keys/signing.key",
        "keys/tls.key",
        "roster.json",
        "signing.pub",
        "tls.pem",
    }
    assert stat.S_IMODE(place.keys.stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in place.keys.iterdir()} == {0o600}
    assert public == read_public(place.signing_public)
    assert public == public_bytes(read_signing_key(place.signing_key))
    roster = load_roster(place.roster, key=public)
    assert (roster.federation, roster.version, roster.sites) == ("icd", 1, ())
    assert load_coordinator(place.root) == SETTINGS
    (entry,) = scan(place.journal).entries
    assert (entry.kind, entry.body["federation"]) == ("created", "icd")
    assert entry.time == "2026-11-26T12:00:00.000+00:00"


def test_keys_and_certificates_belong_together(tmp_path: Path) -> None:
    place = CoordinatorFolder(root=coordinator(tmp_path / "c"))
    authority = read_certificate(place.authority.read_text())
    own = read_certificate(place.tls.read_text())
    check_issued(own, authority, what="x")
    assert tls_key_digest(tls_key_of(own)) == tls_key_digest(read_tls_key(place.tls_key))
    assert tls_key_digest(tls_key_of(authority)) == tls_key_digest(
        read_tls_key(place.authority_key)
    )
    keys = [place.authority_key, place.tls_key]
    assert len({tls_key_digest(read_tls_key(path)) for path in keys}) == 2
    assert own.not_valid_after_utc == NOW + timedelta(days=365)
    assert authority.not_valid_after_utc == NOW + timedelta(days=3650)
    words = ("verify", "-x509_strict", "-attime", int(NOW.timestamp()), "-purpose", "sslserver")
    openssl(*words, "-verify_hostname", "fl.example.org", "-CAfile", place.authority, place.tls)


def test_a_passphrase_encrypts_all_three_keys(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    init_coordinator(folder, SETTINGS, passphrase=PASSPHRASE, now=clock())
    for path in (folder / "keys").iterdir():
        assert path.read_text().startswith("-----BEGIN ENCRYPTED PRIVATE KEY-----")
    with pytest.raises(TrustError, match=r"signing\.key: has a passphrase"):
        renew_coordinator(folder, now=clock())
    renew_coordinator(folder, passphrase=PASSPHRASE, now=clock())


def test_a_folder_is_founded_once(tmp_path: Path) -> None:
    folder = coordinator(tmp_path / "c")
    before = files(folder)
    with pytest.raises(TrustError, match=f"{folder}: is a coordinator's already"):
        init_coordinator(folder, SETTINGS, now=clock())
    assert files(folder) == before


@pytest.mark.parametrize(
    "kept",
    [
        ["coordinator.toml"],
        ["keys/signing.key"],
        ["keys/signing.key", "signing.pub", "keys/authority.key"],
        ["keys/signing.key", "keys/authority.key", "keys/tls.key"],
        ["keys/signing.key", "keys/authority.key", "authority.pem"],
        ["keys/signing.key", "keys/authority.key", "authority.pem", "keys/tls.key", "tls.pem"],
        ["keys/signing.key", "keys/authority.key", "authority.pem", "journal.jsonl"],
    ],
)
def test_a_founding_that_crashed_goes_on_with_what_is_there(
    tmp_path: Path, kept: list[str]
) -> None:
    folder = coordinator(tmp_path / "c")
    before = files(folder)
    for name in before:
        if name not in kept:
            (folder / name).unlink()
    init_coordinator(folder, SETTINGS, now=clock())
    after = files(folder)
    assert set(after) == set(before)
    for name in set(kept) - {"tls.pem"}:  # that one is issued anew
        assert after[name] == before[name], name
    renew_coordinator(folder, now=clock())


def test_settings_that_say_something_else_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "coordinator.toml").write_text('[coordinator]\nname = "other"\nhost = "h"\n')
    with pytest.raises(ConfigError, match=r"coordinator\.toml: says something else"):
        init_coordinator(tmp_path, SETTINGS, now=clock())
    assert not list((tmp_path / "keys").iterdir())


def test_a_federation_that_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "federation.toml").write_text("# mine")
    init_coordinator(tmp_path, SETTINGS, now=clock())
    assert (tmp_path / "federation.toml").read_text() == "# mine"


def edit(folder: Path, **changes: Any) -> None:
    table = load_coordinator(folder).model_dump() | changes
    (folder / "coordinator.toml").write_text(tomli_w.dumps({"coordinator": table}))


def test_renew_issues_for_the_host_that_is_named_now(tmp_path: Path) -> None:
    folder = coordinator(tmp_path / "c")
    place = CoordinatorFolder(root=folder)
    before = files(folder)
    edit(folder, host="10.0.0.3")
    made = renew_coordinator(folder, now=lambda: NOW + timedelta(days=300))
    own = read_certificate(place.tls.read_text())
    assert own == made
    names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.3"]
    assert own.not_valid_after_utc == NOW + timedelta(days=665)
    entry = scan(place.journal).entries[-1]
    assert (entry.kind, entry.body["host"]) == ("coordinator-renewed", "10.0.0.3")
    changed = {name for name, content in files(folder).items() if before[name] != content}
    assert changed == {"tls.pem", "journal.jsonl", "coordinator.toml"}


def test_the_federations_name_is_fixed(tmp_path: Path) -> None:
    folder = coordinator(tmp_path / "c")
    edit(folder, name="other")
    with pytest.raises(ConfigError, match=r"coordinator\.name: is fixed as 'icd'"):
        renew_coordinator(folder, now=clock())


def test_renew_of_what_is_no_coordinator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrustError, match="run `intramural server init` first"):
        renew_coordinator(tmp_path / "none", now=clock())
    assert not (tmp_path / "none").exists()


def test_keys_that_were_exchanged_are_noticed(tmp_path: Path) -> None:
    for name, key, message in (
        ("authority.key", new_tls_key(), r"authority\.pem: is not keys/authority\.key's"),
        ("signing.key", new_signing_key(), r"signing\.pub: is not keys/signing\.key's"),
        ("signing.key", new_tls_key(), r"signing\.key: is not an Ed25519 key"),
    ):
        folder = coordinator(tmp_path / f"{name}{message[-3:]}")
        (folder / "keys" / name).unlink()
        write_key(folder / "keys" / name, key)
        with pytest.raises(TrustError, match=message):
            renew_coordinator(folder, now=clock())


def test_an_authority_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = coordinator(tmp_path / "c") / "authority.pem"
    path.write_bytes(b"\xff")
    with pytest.raises(TrustError, match=r"authority\.pem: cannot read"):
        renew_coordinator(tmp_path / "c", now=clock())
    path.unlink()
    with pytest.raises(TrustError, match=r"authority\.pem: cannot read"):
        renew_coordinator(tmp_path / "c", now=clock())


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    folder = coordinator(tmp_path / "c")
    (folder / "keys" / "signing.key").chmod(0o644)
    with pytest.raises(TrustError, match=r"signing\.key: mode 0644 .*chmod 600"):
        renew_coordinator(folder, now=clock())


def test_a_file_where_the_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file.*mend that, and run again"):
        init_coordinator(tmp_path / "file" / "c", SETTINGS, now=clock())
