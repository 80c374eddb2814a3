"""`client service`, `log` and `verify`: what is written, and what a proof finds."""

import configparser
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from intramural.__main__ import app
from intramural.client.proof import prove
from intramural.core.errors import JournalError, LedgerError
from intramural.core.journal import Journal
from intramural.core.site import load_site
from tests.tiny import rows, site


def call(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return site(tmp_path, "st-elsewhere", rows()[:20])


def test_the_unit_lets_the_agent_write_its_state_and_read_its_records(
    own: Path, tmp_path: Path
) -> None:
    call("client", "service", own, "--out", tmp_path / "service", "--user", "fl")
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string((tmp_path / "service" / "intramural-st-elsewhere.service").read_text())
    service = unit["Service"]
    assert service["User"] == "fl"
    assert service["ReadOnlyPaths"] == str(load_site(own).data.path)
    assert str(own.resolve().parent / "state") in service["ReadWritePaths"].split()
    assert service["ExecStart"].endswith(f"client up {own.resolve()}")
    assert (service["Restart"], service["LimitCORE"]) == ("always", "0")
    # the coordinator refuses a node for up to a minute after a crash: no limit on restarts
    assert service["StartLimitIntervalSec"] == "0"


def test_the_container_is_rootless_and_mounts_records_to_be_read(own: Path, tmp_path: Path) -> None:
    call("client", "service", own, "--out", tmp_path / "service")
    text = (tmp_path / "service" / "Containerfile").read_text()
    assert "USER agent" in text
    assert f"-v {load_site(own).data.path}:{load_site(own).data.path}:ro" in text
    assert "--no-index" in text


def journal_of(own: Path, *entries: tuple[str, dict[str, object]]) -> Path:
    path = own.parent / "state" / "journal.jsonl"
    journal = Journal(path)
    for kind, body in entries:
        journal.append(kind, **body)
    journal.close()
    return path


TRAINED = {"manifest": "sha256:m", "run_id": "sha256:r", "round": 1}


def test_the_log_is_printed_by_kind(own: Path) -> None:
    journal_of(own, ("sent", {"round": 1}), ("refused", {"reason": "stale"}))
    told = json.loads(call("client", "log", own, "--kind", "refused", "--json"))
    assert [entry["body"] for entry in told["entries"]] == [{"reason": "stale"}]
    assert "reason=stale" in call("client", "log", own)


def test_a_sound_journal_is_proved_and_a_cut_one_is_not(own: Path) -> None:
    path = journal_of(own, ("sent", {"round": 1}), ("sent", {"round": 2}))
    found = prove(load_site(own), path)
    assert (found["entries"], found["ledger"]) == (2, None)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0])
    assert prove(load_site(own), path)["entries"] == 1  # looks whole ...
    with pytest.raises(JournalError, match="was put back or cut"):
        prove(load_site(own), path, head=found["head"])  # ... and does not hold the old head


def test_a_private_round_without_its_charge_is_found(own: Path) -> None:
    path = journal_of(own, ("trained", TRAINED | {"private": True}))
    with pytest.raises(LedgerError, match="gone, though 1 rounds were charged"):
        prove(load_site(own), path)


def test_a_round_without_privacy_needs_no_charge(own: Path) -> None:
    path = journal_of(own, ("trained", TRAINED | {"private": False}))
    assert prove(load_site(own), path)["ledger"] is None
