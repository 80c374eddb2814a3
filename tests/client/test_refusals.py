"""Refusals: a file is told of by its name, and the site's own log has the whole path."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intramural.client.audit import AuditLog
from intramural.client.refusals import refusal_of, without_folders
from intramural.core.errors import (
    ConfigError,
    DataError,
    IntramuralError,
    JournalError,
    LedgerError,
    ModelError,
)
from intramural.privacy.book import read_book
from intramural.trust.keys import read_signing_key

TOLD = {
    "/srv/icu/state/journal.jsonl: entry 3 was altered; restore it from a copy": (
        "journal.jsonl: entry 3 was altered; restore it from a copy"
    ),
    "/journal.jsonl: cannot write: No space left on device; free space": (
        "journal.jsonl: cannot write: No space left on device; free space"
    ),
    "model 'm': no config.json in /srv/icu/my models/m; name a model folder": (
        "model 'm': no config.json in m; name a model folder"
    ),
    'model "/srv/St. Mary\'s/m": cannot load': 'model "m": cannot load',
    "/srv/St. Mary's/oncology/a.csv: is empty; name a file": "a.csv: is empty; name a file",
    "run `chmod 700 /srv/icu/state`, or ask": "run `chmod 700 state`, or ask",
    "the node's worker unix:/srv/icu/state/worker.sock": "the node's worker unix:worker.sock",
    "pending/12ab.json cannot be read; remove it": "12ab.json cannot be read; remove it",
    "~/icu/site.toml: wrong\n/srv/icu/site.toml: and this": "site.toml: wrong\nsite.toml: and this",
    # what is no path stays
    "privacy.delta must be below 1 / privacy.nominal_records": (
        "privacy.delta must be below 1 / privacy.nominal_records"
    ),
    "noise / clip_norm, and 1 / sites.min": "noise / clip_norm, and 1 / sites.min",
}


@pytest.mark.parametrize("message", TOLD)
def test_a_path_is_cut_to_its_file_s_name(message: str) -> None:
    assert without_folders(message) == TOLD[message]


FOLDER = st.text(
    st.characters(exclude_characters="/\n\r\0", exclude_categories=["Cs"]), min_size=1
).filter(lambda name: ": " not in name and "; " not in name and name == name.strip())


@given(folders=st.lists(FOLDER.map(lambda name: f"Q{name}Q"), min_size=1, max_size=4))
@pytest.mark.parametrize(
    "form", ["{}: entry 3 was altered", "no file at {}; name one", "{}", "a\n{}: b"]
)
def test_no_folder_is_told_whatever_its_name(form: str, folders: list[str]) -> None:
    told = without_folders(form.format("/" + "/".join([*folders, "notes.csv"])))
    assert told == form.format("notes.csv")


@pytest.mark.parametrize("kind", [JournalError, LedgerError, ConfigError, DataError, ModelError])
@pytest.mark.parametrize("private", [True, False])
def test_the_site_s_own_log_has_the_path_and_the_reply_has_not(
    caplog: pytest.LogCaptureFixture, kind: type[IntramuralError], private: bool
) -> None:
    error = kind("/srv/icu/notes.csv: is empty;\nname a file")
    with caplog.at_level(logging.DEBUG):
        told = refusal_of(error, site="a", private=private)
    assert "icu" not in repr(told)
    assert "/srv/icu/notes.csv: is empty; name a file" in caplog.text
    assert ("notes.csv" in told.detail) == (not private or kind is not DataError)


def harmed(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"body": {}}\n')
    return path


READS: dict[str, Callable[[Path], object]] = {
    "journal": lambda path: AuditLog(harmed(path)).append("x"),
    "ledger": lambda path: read_book(harmed(path)),
    "trust": lambda path: read_signing_key(harmed(path), passphrase=None),
}


@pytest.mark.parametrize("reason", READS)
def test_what_our_own_readers_raise_names_the_file_alone(tmp_path: Path, reason: str) -> None:
    with pytest.raises(IntramuralError) as caught:
        READS[reason](tmp_path / "ward 7" / "the.file")
    told = refusal_of(caught.value, site="a")
    assert (told.reason, "the.file" in told.detail) == (reason, True)
    assert "ward" not in told.detail
    assert str(tmp_path) not in told.detail
