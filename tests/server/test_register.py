"""Register: the journal comes first, and roster.json can always be made from it."""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from intramural.core.canonical import digest_json
from intramural.core.errors import ConfigError, JournalError, TrustError
from intramural.core.files import exclusive, write_json
from intramural.core.journal import Journal, scan
from intramural.server.enrol import enrol_site, revoke_site
from intramural.server.folder import CoordinatorFolder
from intramural.server.register import (
    mend_roster,
    open_register,
    standing_of,
    versions_behind,
)
from intramural.trust.keys import public_bytes, read_public, read_signing_key
from intramural.trust.roster import Roster, load_roster, sign_roster
from tests.trust.members import clock, coordinator, entry_of, request_of, signing_key


@pytest.fixture
def place(tmp_path: Path) -> CoordinatorFolder:
    """Return a coordinator with one site."""
    folder = coordinator(tmp_path / "c")
    enrol_site(folder, request_of("a"), now=clock())
    return CoordinatorFolder(root=folder)


def roster(place: CoordinatorFolder) -> Roster:
    return load_roster(place.roster, key=read_public(place.signing_public))


def behind(place: CoordinatorFolder) -> int:
    return versions_behind(place.root)[1]


def test_each_change_is_journalled_with_what_it_makes_and_grows_the_version(
    place: CoordinatorFolder,
) -> None:
    enrol_site(place.root, request_of("b"), now=clock())
    revoke_site(place.root, "a", now=clock())
    entries = scan(place.journal).entries
    assert [(e.kind, e.body["roster_version"]) for e in entries] == [
        ("created", 1),
        ("enrolled", 2),
        ("enrolled", 3),
        ("revoked", 4),
    ]
    assert entries[3].body["entry"] == json.loads(roster(place).payload())["sites"][0]
    assert behind(place) == 0
    for count in range(1, 5):  # each prefix of the journal gives the roster of that time
        standing = standing_of(entries[:count], key=read_public(place.signing_public))
        assert standing is not None
        assert standing.roster.version == count


def crashed(place: CoordinatorFolder, change: Callable[[], Any]) -> None:
    """Make a change, and leave the disk as a crash between journal and roster.json does."""
    old = place.root / "old"
    shutil.copy(place.roster, old)
    change()
    os.replace(old, place.roster)


def test_after_a_crash_before_the_roster_the_old_one_holds_until_mended(
    place: CoordinatorFolder,
) -> None:
    (certificate,) = roster(place).sites[0].certificates
    crashed(place, lambda: revoke_site(place.root, "a", now=clock()))
    # the revocation is decided, and not in force: a gate still reads the old roster
    assert roster(place).site_of_certificate(certificate) == "a"
    assert behind(place) == 1
    # mending needs no private key, for the journal holds the new roster's signature
    shutil.rmtree(place.keys)
    assert mend_roster(place.root).site_of_certificate(certificate) is None
    assert roster(place).site_of_certificate(certificate) is None
    assert behind(place) == 0


def test_after_a_crash_the_same_command_again_or_any_other_mends(place: CoordinatorFolder) -> None:
    crashed(place, lambda: revoke_site(place.root, "a", now=clock()))
    assert revoke_site(place.root, "a", now=clock()) is False  # it was revoked already
    assert roster(place).version == 3
    crashed(place, lambda: enrol_site(place.root, request_of("b"), now=clock()))
    enrol_site(place.root, request_of("c"), now=clock())
    assert [site.name for site in roster(place).sites] == ["a", "b", "c"]
    assert roster(place).version == 5


def test_a_disk_that_refuses_the_roster_leaves_the_journal_ahead(
    place: CoordinatorFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace

    def failing(source: Any, target: Any) -> None:
        if Path(target).name == "roster.json":
            raise OSError(28, "No space left on device", str(target))
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(ConfigError, match=r"roster\.json: No space left.*run again"):
            revoke_site(place.root, "a", now=clock())
    assert behind(place) == 1
    assert revoke_site(place.root, "a", now=clock()) is False
    assert behind(place) == 0


def test_an_old_roster_put_back_is_replaced(place: CoordinatorFolder) -> None:
    old = place.roster.read_bytes()
    revoke_site(place.root, "a", now=clock())
    enrol_site(place.root, request_of("b"), now=clock())
    place.roster.write_bytes(old)
    assert behind(place) == 2
    assert mend_roster(place.root).version == 4
    place.roster.unlink()
    assert mend_roster(place.root).version == 4


def test_a_journal_that_lacks_what_the_roster_has_is_refused(place: CoordinatorFolder) -> None:
    lines = place.journal.read_text().splitlines(keepends=True)
    place.journal.write_text("".join(lines[:-1]))
    before = place.roster.read_bytes()
    for command in (mend_roster, versions_behind):
        with pytest.raises(TrustError, match=r"journal\.jsonl: is behind roster\.json, version 2"):
            command(place.root)
    with pytest.raises(TrustError, match="restore the journal"):
        enrol_site(place.root, request_of("b"), now=clock())
    place.journal.unlink()
    with pytest.raises(TrustError, match=r"journal|no roster"):
        mend_roster(place.root)
    assert place.roster.read_bytes() == before


def test_a_roster_of_the_same_version_and_another_content_is_refused(
    place: CoordinatorFolder,
) -> None:
    other = Roster(federation="icd", version=2, sites=(entry_of("b"),))
    write_json(place.roster, sign_roster(other, read_signing_key(place.signing_key)))
    for command in (mend_roster, versions_behind):
        with pytest.raises(TrustError, match=r"roster\.json: is not what journal\.jsonl says"):
            command(place.root)


def test_a_roster_that_another_key_signed_is_evidence_and_left_alone(
    place: CoordinatorFolder,
) -> None:
    write_json(place.roster, sign_roster(roster(place), signing_key("other")))
    before = place.roster.read_bytes()
    with pytest.raises(TrustError, match=r"roster\.json: envelope is signed by"):
        revoke_site(place.root, "a", now=clock())
    assert place.roster.read_bytes() == before


def test_an_altered_journal_is_refused(place: CoordinatorFolder) -> None:
    place.journal.write_text(place.journal.read_text().replace("enrolled", "Enrolled", 1))
    with pytest.raises(JournalError, match="entry 1 was altered"):
        revoke_site(place.root, "a", now=clock())


def forged(place: CoordinatorFolder, **changes: Any) -> None:
    """Rewrite the journal's last entry with the digest that fits, which a chain cannot notice."""
    *lines, last = place.journal.read_text().splitlines()
    entry = json.loads(last)
    entry["body"] |= changes
    del entry["digest"]
    entry["digest"] = digest_json(entry)
    place.journal.write_text("\n".join([*lines, json.dumps(entry)]) + "\n")


def test_a_journal_entry_that_somebody_else_wrote_is_not_signed(place: CoordinatorFolder) -> None:
    mine = entry_of("a", signing_key=entry_of("evil").signing_key).model_dump(mode="json")
    forged(place, entry=mine)
    place.roster.unlink()
    with pytest.raises(TrustError, match="does not verify"):
        mend_roster(place.root)
    assert not place.roster.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"roster_version": 3}, "entry 1 skips a version"),
        ({"roster_version": "2"}, "entry 1 skips a version"),
        ({"entry": None}, "entry 1 is malformed"),
        ({"entry": {}}, "entry 1 is malformed"),
        ({"entry": 7}, "entry 1 is malformed"),
        ({"roster_signature": None}, "journal's last change of the roster: "),
        ({"roster_signature": "é"}, "is not base64"),
        ({"roster_signature": "AAAA"}, "does not verify"),
    ],
)
def test_a_malformed_journal_entry_is_refused(
    place: CoordinatorFolder, changes: dict[str, Any], message: str
) -> None:
    forged(place, **changes)
    with pytest.raises(TrustError, match=message):
        mend_roster(place.root)


def test_a_second_beginning_is_refused(place: CoordinatorFolder) -> None:
    first = scan(place.journal).entries[0]
    journal = Journal(place.journal, now=clock())
    journal.append(first.kind, **first.body)
    journal.close()
    with pytest.raises(TrustError, match="entry 2 is malformed"):
        mend_roster(place.root)


def test_other_kinds_of_entries_are_passed_over(place: CoordinatorFolder) -> None:
    journal = Journal(place.journal, now=clock())
    journal.append("gate-started", port=8443)
    journal.close()
    enrol_site(place.root, request_of("b"), now=clock())
    assert roster(place).version == 3


def test_a_folder_that_another_command_holds_is_waited_for_and_then_refused(
    place: CoordinatorFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("intramural.server.register.WAIT_S", 0.05)
    with (
        exclusive(place.lock),
        pytest.raises(ConfigError, match="another command is at work there"),
    ):
        revoke_site(place.root, "a", now=clock())
    assert revoke_site(place.root, "a", now=clock()) is True


def test_commands_at_once_take_turns(place: CoordinatorFolder) -> None:
    names = [f"s{number}" for number in range(6)]
    with ThreadPoolExecutor(len(names)) as pool:
        for name in names:
            pool.submit(enrol_site, place.root, request_of(name), now=clock())
    assert [site.name for site in roster(place).sites] == ["a", *names]
    assert roster(place).version == 2 + len(names)
    assert behind(place) == 0


def test_what_is_no_coordinators_folder_is_refused_and_not_made(tmp_path: Path) -> None:
    for command in (mend_roster, versions_behind):
        with pytest.raises(TrustError, match=r"signing\.pub: cannot read"):
            command(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_register_knows_every_key_that_ever_was_enrolled(place: CoordinatorFolder) -> None:
    revoke_site(place.root, "a", now=clock())
    with open_register(place.root, now=clock(), passphrase=None) as register:
        used = register.used()
        assert used[entry_of("a").signing_key] == "a"
        assert sorted(used.values()) == ["a", "a"]  # its signing key and its TLS key
        assert public_bytes(register.key) == read_public(place.signing_public)
