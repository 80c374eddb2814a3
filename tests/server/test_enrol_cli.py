"""`intramural server init`, `enrol`, `rotate`, `revoke`, `renew`, `roster`: what they print."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from intramural.core.errors import ConfigError, TrustError
from intramural.core.files import write_json
from intramural.server.enrol import revoke_site
from intramural.trust.keys import PASSPHRASE, fingerprint, read_public
from intramural.trust.kit import SiteRequest, read_kit
from tests.trust.commands import asked, call, server_app, told
from tests.trust.members import clock, coordinator, request_of

SECRET = "correct horse battery staple"


@pytest.fixture(autouse=True)
def no_passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSPHRASE, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return coordinator(tmp_path / "c")


def sent(folder: Path, request: SiteRequest) -> Path:
    """Write a request as it comes from a site."""
    path = folder / f"{request.site}-{request.fingerprint[:5]}.json"
    write_json(path, request.model_dump(mode="json"))
    return path


def spoken(request: SiteRequest) -> str:
    return " ".join(request.fingerprint.split()[:2]) + "\n"


def test_init_prints_the_fingerprint_to_compare(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    text = call(server_app, "init", folder, "--name", "icd", "--host", "10.0.0.3")
    assert f"{folder}: coordinator of 'icd', at 10.0.0.3:8443" in text
    assert f"fingerprint: {fingerprint(read_public(folder / 'signing.pub'))}" in text
    words = ("--name", "icd", "--host", "h", "--port", "443", "--listen", "::")
    found = told(server_app, "init", tmp_path / "d", *words)
    public = read_public(tmp_path / "d" / "signing.pub")
    assert found == {
        "folder": str(tmp_path / "d"),
        "federation": "icd",
        "host": "h",
        "port": 443,
        "encrypted": False,
        "fingerprint": fingerprint(public),
    }
    assert 'listen = "::"' in (tmp_path / "d" / "coordinator.toml").read_text()


def test_init_names_every_option_that_is_wrong_and_makes_nothing(tmp_path: Path) -> None:
    words = ("--name", "ICD", "--host", "http://h", "--port", "0")
    with pytest.raises(ConfigError) as found:
        call(server_app, "init", tmp_path / "c", *words)
    lines = str(found.value).splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        "coordinator.name",
        "coordinator.host",
        "coordinator.port",
    ]
    assert not (tmp_path / "c").exists()


def test_a_passphrase_is_asked_for_twice_and_needed_from_then_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (tmp_path / "d", "--name", "icd", "--host", "h", "--passphrase")
    with pytest.raises(TrustError, match="shorter than 15 characters"):
        call(server_app, "init", *words, typed="short\nshort\n")
    assert told(server_app, "init", *words, typed=f"{SECRET}\n" * 2)["encrypted"] is True
    with pytest.raises(TrustError, match="has a passphrase; give --passphrase"):
        call(server_app, "renew", "--dir", tmp_path / "d")
    call(server_app, "renew", "--dir", tmp_path / "d", "--passphrase", typed=f"{SECRET}\n")
    monkeypatch.setenv(PASSPHRASE, SECRET)
    call(server_app, "renew", "--dir", tmp_path / "d")


def test_enrol_asks_for_two_groups_and_writes_a_kit(folder: Path, tmp_path: Path) -> None:
    request = request_of("a")
    path = sent(tmp_path, request)
    text = call(server_app, "enrol", path, "--dir", folder, typed=spoken(request))
    assert "a: enrolled; certificate valid until " in text
    assert f"send {folder / 'kits' / 'a.json'} to the site" in text
    assert fingerprint(read_public(folder / "signing.pub")) in text
    assert read_kit(folder / "kits" / "a.json").site == "a"
    assert "request of site 'a'" in asked(
        server_app, "enrol", path, "--dir", folder, typed=spoken(request)
    )


def test_enrol_prints_one_object_also_when_it_asks(folder: Path, tmp_path: Path) -> None:
    request, out = request_of("a"), tmp_path / "kit.json"
    words = ("enrol", sent(tmp_path, request), "--dir", folder, "--out", out, "--days", "30")
    found = told(server_app, *words, typed=spoken(request))
    kit = read_kit(out)
    assert found["kit"] == str(out)
    assert (found["site"], found["kind"], found["version"]) == ("a", "enrolled", 2)
    assert found["certificate"] == kit.open_roster().sites[0].certificates[0]
    assert found["fingerprint"] == kit.fingerprint
    again = told(server_app, *words, "--fingerprint", request.fingerprint)
    assert (again["kind"], again["version"]) == ("renewed", 3)


@pytest.mark.parametrize("command", ["enrol", "rotate"])
def test_a_fingerprint_that_differs_enrols_nobody(
    folder: Path, tmp_path: Path, command: str
) -> None:
    request = request_of("a")
    before = (folder / "roster.json").read_bytes()
    words = (command, sent(tmp_path, request), "--dir", folder)
    other = request_of("a", key="other")
    with pytest.raises(TrustError, match="another one than was told") as found:
        call(server_app, *words, typed=spoken(other))
    assert found.value.exit_code == 3
    for told_ in (other.fingerprint, spoken(request), "yes"):
        with pytest.raises(TrustError, match="another one than was told"):
            call(server_app, *words, "--fingerprint", told_)
    with pytest.raises(TrustError, match="was not compared"):
        call(server_app, *words)
    assert (folder / "roster.json").read_bytes() == before
    assert not (folder / "kits").exists()


def test_an_altered_request_is_refused_before_anybody_is_asked(
    folder: Path, tmp_path: Path
) -> None:
    content: dict[str, Any] = request_of("a").model_dump(mode="json") | {"site": "b"}
    path = tmp_path / "r.json"
    write_json(path, content)
    with pytest.raises(TrustError, match=r"r\.json: file has a signature that does not verify"):
        call(server_app, "enrol", path, "--dir", folder, typed="1\n")


def test_rotate_and_revoke_say_what_changed(folder: Path, tmp_path: Path) -> None:
    for site in ("a", "b"):
        request = request_of(site)
        words = ("enrol", sent(tmp_path, request), "--dir", folder)
        call(server_app, *words, "--fingerprint", request.fingerprint)
    new = request_of("a", key="a2")
    words = ("rotate", sent(tmp_path, new), "--dir", folder)
    assert "a: rotated; " in call(server_app, *words, typed=spoken(new))
    assert call(server_app, "revoke", "b", "--dir", folder) == "b: revoked\n"
    assert call(server_app, "revoke", "b", "--dir", folder) == "b: was revoked already\n"
    found = told(server_app, "revoke", "b", "--dir", folder)
    assert found == {"site": "b", "state": "revoked", "changed": False}


def test_roster_lists_sites_with_fingerprints(folder: Path, tmp_path: Path) -> None:
    assert "icd: version 1, 0 sites" in call(server_app, "roster", "--dir", folder)
    requests = [request_of("a"), request_of("st-elsewhere")]
    for request in requests:
        words = ("enrol", sent(tmp_path, request), "--dir", folder)
        call(server_app, *words, "--fingerprint", request.fingerprint)
    call(server_app, "revoke", "a", "--dir", folder)
    lines = call(server_app, "roster", "--dir", folder).splitlines()
    assert lines[0] == "icd: version 4, 2 sites"
    public = fingerprint(read_public(folder / "signing.pub"))
    assert lines[1] == f"coordinator's fingerprint: {public}"
    assert lines[2].split()[:2] == ["a", "revoked"]
    assert lines[2].endswith(requests[0].fingerprint)
    assert lines[3].split()[:2] == ["st-elsewhere", "enrolled"]
    found = told(server_app, "roster", "--dir", folder)
    assert (found["federation"], found["version"], found["behind"]) == ("icd", 4, 0)
    assert [site["state"] for site in found["sites"]] == ["revoked", "enrolled"]
    assert found["sites"][1]["fingerprint"] == requests[1].fingerprint
    assert len(found["sites"][1]["certificates"]) == 1


def test_roster_says_when_a_crash_left_it_behind_and_writes_nothing(
    folder: Path, tmp_path: Path
) -> None:
    request = request_of("a")
    words = ("enrol", sent(tmp_path, request), "--dir", folder)
    call(server_app, *words, "--fingerprint", request.fingerprint)
    shutil.copy(folder / "roster.json", tmp_path / "old")
    revoke_site(folder, "a", now=clock())
    os.replace(tmp_path / "old", folder / "roster.json")
    before = (folder / "roster.json").read_bytes()
    assert "roster.json lacks 1 of the journal's changes" in call(
        server_app, "roster", "--dir", folder
    )
    assert told(server_app, "roster", "--dir", folder)["behind"] == 1
    assert (folder / "roster.json").read_bytes() == before


def test_renew_prints_until_when(folder: Path) -> None:
    assert "tls.pem: valid until 20" in call(server_app, "renew", "--dir", folder)
    found = told(server_app, "renew", "--dir", folder)
    assert found.keys() == {"certificate", "ends"}


def test_commands_begin_in_the_folder_that_one_is_in(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert told(server_app, "roster")["federation"] == "icd"


def test_a_kit_that_cannot_be_written_is_told(folder: Path, tmp_path: Path) -> None:
    request = request_of("a")
    words = ("enrol", sent(tmp_path, request), "--dir", folder, "--out", tmp_path)
    with pytest.raises(ConfigError, match=r"run `intramural server enrol` again with another"):
        call(server_app, *words, "--fingerprint", request.fingerprint)
    # the site is enrolled; its request again gives the kit
    found = told(server_app, *words[:-2], "--fingerprint", request.fingerprint)
    assert json.loads(Path(found["kit"]).read_text())["site"] == "a"
