"""The coordinator's small commands, and the watcher that logs."""

import json
import logging
from pathlib import Path

import pytest
import tomli_w
from typer.testing import CliRunner

from intramural.__main__ import app
from intramural.core.errors import ConfigError, JournalError
from intramural.core.journal import Journal
from intramural.server.watcher import LogWatcher
from tests.server.reports import report
from tests.tiny import federation, rows, site, table


def call(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_check_tells_a_federation_from_a_site(tmp_path: Path) -> None:
    file = tmp_path / "anything.toml"
    file.write_text(tomli_w.dumps(table(Path("base"))))
    found = json.loads(call("check", file, "--json"))
    assert (found["kind"], found["name"]) == ("federation", "tiny")
    assert found["manifest"] == federation(Path("base")).digest
    own = site(tmp_path, "st-elsewhere", rows()[:2])
    assert "site 'st-elsewhere' is well formed" in call("check", own).replace("\n", "")
    file.write_text(tomli_w.dumps({"data": {"path": "own.csv", "text": "title"}}))
    assert "holdout 'own.csv' is well formed" in call("check", file).replace("\n", "")


def test_bundle_holds_configuration_alone(tmp_path: Path) -> None:
    file = tmp_path / "federation.toml"
    file.write_text(tomli_w.dumps(table(Path("base"))))
    out = tmp_path / "bundle"
    call("bundle", file, "--out", out, "--run-folder", tmp_path / "run")
    first = (out / "app" / "pyproject.toml").read_bytes()
    assert [path.name for path in (out / "app").iterdir()] == ["pyproject.toml"]
    assert str(tmp_path) not in first.decode()
    assert str(tmp_path) in (out / "run.toml").read_text()
    call("bundle", file, "--out", out, "--run-folder", tmp_path / "run")
    assert (out / "app" / "pyproject.toml").read_bytes() == first


def test_report_is_written_anew(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(report()))
    call("report", tmp_path)
    assert "<html" in (tmp_path / "report.html").read_text()
    with pytest.raises(ConfigError, match="name a finished run's folder"):
        call("report", tmp_path / "nowhere")


def test_verify_names_the_first_bad_entry(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    for number in range(3):
        journal.append("opened", round=number)
    journal.close()
    assert call("verify", path).startswith("3 entries, whole; head sha256:")
    path.write_text(path.read_text().replace('"round":1', '"round":9'))
    with pytest.raises(JournalError, match="entry 1 was altered"):
        call("verify", path)
    with pytest.raises(ConfigError, match="no such journal"):
        call("verify", tmp_path / "nowhere")


def test_a_run_s_events_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    watcher = LogWatcher(logging.getLogger("test"))
    with caplog.at_level(logging.INFO):
        watcher.waiting("round 1 waits: 0 of 2 sites are ready")
        watcher.opened(1, ["a", "b"])
        watcher.answered("a", "train", good=True, reason="")
        watcher.evaluating(1, "validation", ["a"])
        watcher.committed({"round": 1, "metrics": {"accuracy": 0.5}, "seconds": 1.0})
        watcher.noticed("a: stale")
        watcher.progressed("b alone", 1, 2)
    assert caplog.messages == [
        "round 1 waits: 0 of 2 sites are ready",
        "round 1: training at a, b",
        "round 1: committed after 1.0 s {'accuracy': 0.5}",
        "a: stale",
    ]
