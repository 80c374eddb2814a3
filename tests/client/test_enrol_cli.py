"""`intramural client init`, `rotate`, `join`, and the whole way with the coordinator's commands."""

from pathlib import Path
from typing import Any

import pytest

from intramural.client.enrol import check_site
from intramural.core.errors import ConfigError, TrustError
from intramural.core.journal import utc_now
from intramural.trust.keys import PASSPHRASE
from intramural.trust.kit import read_request
from tests.trust.commands import asked, call, client_app, server_app, told

SECRET = "correct horse battery staple"


@pytest.fixture(autouse=True)
def no_passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSPHRASE, raising=False)


@pytest.fixture
def fl(tmp_path: Path) -> Path:
    call(server_app, "init", tmp_path / "c", "--name", "icd", "--host", "fl.example.org")
    return tmp_path / "c"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    call(client_app, "init", tmp_path / "site", "--name", "st-elsewhere")
    return tmp_path / "site"


def enrolled(fl: Path, site: Path, *, command: str = "enrol") -> dict[str, Any]:
    """Enrol as two people do: the coordinator types what the site reads aloud."""
    folder = "trust/next" if command == "rotate" else "trust"
    request = site / folder / "request.json"
    words = (command, request, "--dir", fl)
    return told(server_app, *words, typed=" ".join(read_request(request).fingerprint.split()[:2]))


def test_init_prints_what_to_send_and_what_to_read_aloud(tmp_path: Path) -> None:
    text = call(client_app, "init", tmp_path / "s", "--name", "st-elsewhere")
    path = tmp_path / "s" / "trust" / "request.json"
    request = read_request(path)
    assert f"st-elsewhere: send {path} to the coordinator; it holds no secret" in text
    assert f"read aloud: {request.fingerprint}" in text
    assert told(client_app, "init", tmp_path / "s", "--name", "st-elsewhere") == {
        "site": "st-elsewhere",
        "request": str(path),
        "encrypted": False,
        "fingerprint": request.fingerprint,
    }


def test_the_whole_way(fl: Path, site: Path) -> None:
    kit = enrolled(fl, site)
    words = ("join", kit["kit"], "--dir", site)
    shown = asked(client_app, *words, typed="no\n")
    assert f"fingerprint: {kit['fingerprint']}" in shown
    assert "kit of site 'st-elsewhere', for fl.example.org:8443" in shown
    text = call(client_app, *words, typed="yes\n")
    assert "st-elsewhere: member of 'icd' at fl.example.org:8443" in text
    check_site(site, now=utc_now())
    found = told(client_app, *words)  # known by now: nobody is asked
    assert found == {
        "site": "st-elsewhere",
        "federation": "icd",
        "host": "fl.example.org",
        "port": 8443,
        "coordinator": "known",
        "fingerprint": kit["fingerprint"],
        "ends": kit["ends"],
    }


def test_a_fingerprint_given_asks_nothing(fl: Path, site: Path) -> None:
    kit = enrolled(fl, site)
    words = ("join", kit["kit"], "--dir", site, "--fingerprint", kit["fingerprint"])
    assert "compare" not in asked(client_app, *words)
    assert told(client_app, *words)["site"] == "st-elsewhere"


def test_a_kit_whose_fingerprint_nobody_confirmed_is_not_installed(fl: Path, site: Path) -> None:
    kit = enrolled(fl, site)
    words = ("join", kit["kit"], "--dir", site)
    for typed, message in (("no\n", "not confirmed"), ("", "not compared"), ("y\n", "not confi")):
        with pytest.raises(TrustError, match=message):
            call(client_app, *words, typed=typed)
    wrong = "1" + kit["fingerprint"][1:] if kit["fingerprint"][0] != "1" else "2"
    with pytest.raises(TrustError, match="another one than was told"):
        call(client_app, *words, "--fingerprint", wrong)
    assert not (site / "trust" / "kit.json").exists()


def test_a_coordinator_whose_key_changed_is_asked_for_loudly(
    fl: Path, site: Path, tmp_path: Path
) -> None:
    kit = enrolled(fl, site)
    call(client_app, "join", kit["kit"], "--dir", site, typed="yes\n")
    call(server_app, "init", tmp_path / "again", "--name", "icd", "--host", "fl.example.org")
    other = enrolled(tmp_path / "again", site)
    words = ("join", other["kit"], "--dir", site)
    assert "key is ANOTHER one than before" in asked(client_app, *words, typed="no\n")
    with pytest.raises(TrustError, match="not confirmed"):
        call(client_app, *words, typed="no\n")
    assert told(client_app, *words, typed="yes\n")["coordinator"] == "changed"


def test_a_fingerprint_is_checked_also_for_a_known_coordinator(fl: Path, site: Path) -> None:
    kit = enrolled(fl, site)
    call(client_app, "join", kit["kit"], "--dir", site, typed="yes\n")
    with pytest.raises(TrustError, match="another one than was told"):
        call(client_app, "join", kit["kit"], "--dir", site, "--fingerprint", "1")


def test_rotate_and_join_again(fl: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(client_app, "join", enrolled(fl, site)["kit"], "--dir", site, typed="yes\n")
    monkeypatch.chdir(site)
    found = told(client_app, "rotate")
    assert found["request"] == "trust/next/request.json"
    kit = enrolled(fl, site, command="rotate")
    assert kit["kind"] == "rotated"
    assert told(client_app, "join", kit["kit"])["coordinator"] == "known"
    listed = told(server_app, "roster", "--dir", fl)["sites"]
    assert [one["fingerprint"] for one in listed] == [found["fingerprint"]]
    check_site(site, now=utc_now())


def test_a_passphrase_is_asked_for_twice_at_init_and_once_later(fl: Path, tmp_path: Path) -> None:
    site = tmp_path / "s"
    words = ("init", site, "--name", "st-elsewhere", "--passphrase")
    assert told(client_app, *words, typed=f"{SECRET}\n" * 2)["encrypted"] is True
    kit = enrolled(fl, site)
    joining = ("join", kit["kit"], "--dir", site, "--fingerprint", kit["fingerprint"])
    with pytest.raises(TrustError, match="has a passphrase; give --passphrase"):
        call(client_app, *joining)
    call(client_app, *joining, "--passphrase", typed=f"{SECRET}\n")
    check_site(site, now=utc_now(), passphrase=SECRET)


def test_wrong_use_has_exit_code_2(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="client init: name: ") as found:
        call(client_app, "init", tmp_path / "x", "--name", "St Elsewhere")
    assert found.value.exit_code == 2
