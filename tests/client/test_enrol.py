"""Enrolment at a site: keys that stay, and a kit that fits them or is refused."""

import json
import os
import shutil
import stat
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from intramural.client.enrol import (
    SiteFolder,
    check_site,
    examine_kit,
    init_site,
    join,
    rotate_site,
)
from intramural.core.errors import ConfigError, TrustError
from intramural.core.files import exclusive
from intramural.core.site import load_site
from intramural.server import enrol as at_coordinator
from intramural.trust.keys import new_tls_key, public_bytes, read_signing_key, write_key
from intramural.trust.kit import Kit, read_request
from tests.trust.members import NOW, clock, coordinator, new_kit, request_of, signing_key

SITE = "st-elsewhere"
PASSPHRASE = "correct horse battery staple"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    init_site(folder, name=SITE)
    return folder


@pytest.fixture
def fl(tmp_path: Path) -> Path:
    return coordinator(tmp_path / "c")


def written(folder: Path, kit: Kit) -> Path:
    path = folder / "from-mail.json"
    at_coordinator.write_kit(path, kit)
    return path


def enrolled(fl: Path, site: Path, **options: Any) -> Path:
    """Have the coordinator enrol what the site asked for; return the kit as it came by mail."""
    request = read_request(site / "trust" / "request.json")
    kit = at_coordinator.enrol_site(fl, request, now=clock(), **options).kit
    return written(fl, kit)


def rotated(fl: Path, site: Path) -> Path:
    rotate_site(site)
    request = read_request(site / "trust" / "next" / "request.json")
    return written(fl, at_coordinator.rotate_site(fl, request, now=clock()).kit)


def joined(site: Path, kit: Path, **options: Any) -> str:
    joining = examine_kit(site, kit, now=NOW, **options)
    join(site, joining)
    return joining.coordinator


def files(folder: Path) -> dict[str, bytes]:
    found = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def test_init_makes_keys_that_nobody_else_reads_and_a_request(tmp_path: Path) -> None:
    made = init_site(tmp_path / "site", name=SITE)
    place = SiteFolder(root=tmp_path / "site")
    assert set(files(place.root)) == {
        "site.toml",
        "trust/request.json",
        "trust/signing.key",
        "trust/tls.key",
    }
    assert stat.S_IMODE(place.trust.stat().st_mode) == 0o700
    for path in (place.tls_key, place.signing_key):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_request(place.trust / "request.json") == made
    assert made.public == public_bytes(read_signing_key(place.signing_key))
    assert "PRIVATE" not in (place.trust / "request.json").read_text()


def test_the_site_to_edit_is_well_formed_and_strict(site: Path) -> None:
    config = load_site(site / "site.toml")
    assert config.site.name == SITE
    assert config.policy.require_privacy
    assert config.policy.epsilon_lifetime == 10.0
    assert config.policy.approve == "ask"


def test_init_again_keeps_the_keys(site: Path) -> None:
    before = files(site)
    first = read_request(site / "trust" / "request.json")
    again = init_site(site, name=SITE)
    after = files(site)
    for name in ("site.toml", "trust/signing.key", "trust/tls.key"):
        assert after[name] == before[name]
    assert (again.public, again.tls_key) == (first.public, first.tls_key)


@pytest.mark.parametrize("lost", ["tls.key", "signing.key", "request.json"])
def test_an_init_that_crashed_goes_on_with_what_is_there(site: Path, lost: str) -> None:
    (site / "trust" / lost).unlink()
    before = files(site)
    made = init_site(site, name=SITE)
    after = files(site)
    assert {name: after[name] for name in before if name.endswith(".key")} == {
        name: content for name, content in before.items() if name.endswith(".key")
    }
    assert read_request(site / "trust" / "request.json") == made


def test_a_site_toml_that_is_there_is_kept_and_must_have_the_name(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    for content in ('[site]\nname = "other"\n', "site = 3\n", "\n"):
        path.write_text(content)
        with pytest.raises(ConfigError, match=r"site\.toml: site\.name: is not 'st-elsewhere'"):
            init_site(tmp_path, name=SITE)
        assert not (tmp_path / "trust").exists()
    path.write_text(f'# mine\n[site]\nname = "{SITE}"\n')
    init_site(tmp_path, name=SITE)
    assert path.read_text().startswith("# mine")


def test_a_name_is_a_name_and_a_folder_is_one_sites(site: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="client init: name: "):
        init_site(tmp_path / "x", name="St Elsewhere")
    assert not (tmp_path / "x").exists()
    (site / "site.toml").unlink()
    with pytest.raises(TrustError, match=r"request\.json: is of site 'st-elsewhere'"):
        init_site(site, name="other")


def test_from_init_to_member(fl: Path, site: Path) -> None:
    kit = enrolled(fl, site)
    assert joined(site, kit) == "new"
    place = SiteFolder(root=site)
    found = check_site(site, now=NOW)
    assert (found.site, found.federation, found.host) == (SITE, "icd", "fl.example.org")
    assert place.certificate.read_text() == found.certificate
    assert place.authority.read_bytes() == (fl / "authority.pem").read_bytes()
    assert found.public == public_bytes(read_signing_key(fl / "keys" / "signing.key"))


def test_a_kit_again_and_a_renewed_one_come_from_a_known_coordinator(fl: Path, site: Path) -> None:
    kit = enrolled(fl, site)
    joined(site, kit)
    before = files(site)
    assert joined(site, kit) == "known"
    assert files(site) == before
    assert joined(site, enrolled(fl, site, days=30)) == "known"
    check_site(site, now=NOW + timedelta(days=29))
    with pytest.raises(TrustError, match="site's certificate ended on 2026-12-26"):
        check_site(site, now=NOW + timedelta(days=31))


def test_with_a_passphrase(fl: Path, tmp_path: Path) -> None:
    site = tmp_path / "s"
    init_site(site, name=SITE, passphrase=PASSPHRASE)
    kit = enrolled(fl, site)
    with pytest.raises(TrustError, match="has a passphrase; give --passphrase"):
        examine_kit(site, kit, now=NOW)
    with pytest.raises(TrustError, match="passphrase is wrong"):
        examine_kit(site, kit, now=NOW, passphrase="another one, and long")
    joined(site, kit, passphrase=PASSPHRASE)
    check_site(site, now=NOW, passphrase=PASSPHRASE)


def refused(site: Path, kit: Path, message: str, **options: Any) -> None:
    """Check that a kit is refused, and that nothing at the site changed."""
    before = files(site)
    with pytest.raises(TrustError, match=message) as found:
        examine_kit(site, kit, **{"now": NOW, **options})
    assert found.value.exit_code == 3
    assert "\n" not in str(found.value)
    assert files(site) == before


def test_a_kit_for_others_is_refused(fl: Path, site: Path, tmp_path: Path) -> None:
    other = written(tmp_path, new_kit(request_of("other")))
    refused(site, other, "is of site 'other', and this is 'st-elsewhere'")
    both_keys_differ = written(tmp_path, new_kit(request_of(SITE)))
    refused(site, both_keys_differ, r"kit is for another key than .*tls\.key")
    kit = enrolled(fl, site)
    (site / "trust" / "signing.key").unlink()
    write_key(site / "trust" / "signing.key", signing_key("x"))
    refused(site, kit, r"kit is for another key than .*signing\.key")
    (site / "trust" / "tls.key").unlink()
    refused(site, kit, r"kit is for another key than .*tls\.key")
    write_key(site / "trust" / "tls.key", new_tls_key())
    refused(site, kit, r"kit is for another key than .*tls\.key")


def test_a_kit_out_of_its_time_is_refused(fl: Path, site: Path) -> None:
    kit = enrolled(fl, site)
    refused(site, kit, "ended on 2027-11-26", now=NOW + timedelta(days=366))
    refused(site, kit, "set this machine's clock", now=NOW - timedelta(minutes=6))
    examine_kit(site, kit, now=NOW - timedelta(minutes=4))  # a clock that is slow, a little


def test_an_altered_kit_is_refused_and_changes_nothing(fl: Path, site: Path) -> None:
    kit = enrolled(fl, site)
    content = json.loads(kit.read_text())
    for change in ({"host": "evil.example"}, {"port": 1}, {"federation": "other"}):
        kit.write_text(json.dumps(content | change))
        refused(site, kit, "signature that does not verify")


def test_an_older_kit_is_refused(fl: Path, site: Path) -> None:
    first = enrolled(fl, site)
    old = first.read_bytes()
    joined(site, enrolled(fl, site))
    first.write_bytes(old)
    refused(site, first, "is older than the kit in use, of roster version 2 before 3")


def test_a_coordinator_with_another_key_is_told(site: Path, tmp_path: Path, fl: Path) -> None:
    joined(site, enrolled(fl, site))
    again = coordinator(tmp_path / "again")
    assert joined(site, enrolled(again, site)) == "changed"


def test_without_init_there_is_nothing_to_join(tmp_path: Path) -> None:
    kit = written(tmp_path, new_kit(request_of(SITE)))
    for command in (lambda f: examine_kit(f, kit, now=NOW), rotate_site):
        with pytest.raises(TrustError, match="run `intramural client init` first"):
            command(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_site_that_has_not_joined_is_told(site: Path) -> None:
    with pytest.raises(TrustError, match=r"kit\.json: is not there; run `intramural client join`"):
        check_site(site, now=NOW)


def test_rotated_keys_wait_until_their_kit_comes(fl: Path, site: Path) -> None:
    joined(site, enrolled(fl, site))
    before = files(site)
    first = rotate_site(site)
    after = files(site)
    assert {name: after[name] for name in before} == before  # the old ones serve meanwhile
    assert set(after) - set(before) == {
        "trust/next/request.json",
        "trust/next/signing.key",
        "trust/next/tls.key",
    }
    check_site(site, now=NOW)
    again = rotate_site(site)
    assert (again.public, again.tls_key) == (first.public, first.tls_key)
    assert joined(site, rotated(fl, site)) == "known"
    found = check_site(site, now=NOW)
    assert found.open_roster().signing_key_of(SITE) == first.public
    assert not (site / "trust" / "next").exists()
    assert read_request(site / "trust" / "request.json").public == first.public
    assert rotate_site(site).public != first.public  # and again from there


def test_a_renewed_kit_for_the_old_keys_leaves_waiting_ones_alone(fl: Path, site: Path) -> None:
    joined(site, enrolled(fl, site))
    waiting = rotate_site(site)
    joined(site, enrolled(fl, site))
    check_site(site, now=NOW)
    assert read_request(site / "trust" / "next" / "request.json") == waiting


def dying(at: int) -> Callable[[Any, Any], None]:
    """Return a rename that fails at its n-th call, as a machine that loses power does."""
    real, calls = os.replace, iter(range(100))

    def rename(source: Any, target: Any) -> None:
        if next(calls) == at:
            raise OSError(5, "Input/output error", str(target))
        real(source, target)

    return rename


def test_a_joining_cut_short_anywhere_is_noticed_and_finished_by_joining_again(
    fl: Path, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined(site, enrolled(fl, site))
    kit = rotated(fl, site)
    new = read_request(site / "trust" / "next" / "request.json")
    steps = 0
    for at in range(6):  # two keys, the request, two certificates, the kit
        copy = tmp_path / f"copy{at}"
        shutil.copytree(site, copy)
        joining = examine_kit(copy, kit, now=NOW)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying(at))
            with pytest.raises(ConfigError, match="Input/output error; mend that"):
                join(copy, joining)
        if at:  # before the first step nothing has changed, and the old membership is whole
            with pytest.raises(TrustError, match=r"joining was not finished|for another key"):
                check_site(copy, now=NOW)
        else:
            check_site(copy, now=NOW)
        assert joined(copy, kit) == "known"
        assert check_site(copy, now=NOW).open_roster().signing_key_of(SITE) == new.public
        assert not (copy / "trust" / "next").exists()
        steps += 1
    assert steps == 6


@pytest.mark.parametrize("name", ["tls.pem", "authority.pem", "kit.json"])
def test_an_altered_file_of_a_member_is_noticed(fl: Path, site: Path, name: str) -> None:
    joined(site, enrolled(fl, site))
    path = site / "trust" / name
    content = path.read_bytes()
    path.write_bytes(content.replace(b"M", b"N", 1))
    with pytest.raises(TrustError):
        check_site(site, now=NOW)
    path.unlink()
    with pytest.raises(TrustError):
        check_site(site, now=NOW)
    path.write_bytes(content)
    check_site(site, now=NOW)


@pytest.mark.parametrize("damage", [b"", b"{}", None])
def test_joining_again_replaces_whatever_was_damaged(
    fl: Path, site: Path, damage: bytes | None
) -> None:
    kit = enrolled(fl, site)
    joined(site, kit)
    for name in ("tls.pem", "authority.pem", "kit.json"):
        (site / "trust" / name).unlink()
        if damage is not None:
            (site / "trust" / name).write_bytes(damage)
    assert joined(site, kit) == "new"  # whose key the kit in use had is lost: somebody is asked
    check_site(site, now=NOW)


def test_a_folder_in_use_is_told(fl: Path, site: Path) -> None:
    with (
        exclusive(site / "trust" / ".lock"),
        pytest.raises(ConfigError, match="another command is at work there"),
    ):
        init_site(site, name=SITE)
