"""A run in its folder: what it leaves, and when it may go on."""

import json
import tomllib
import weakref
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any

import pytest

from intramural.core.bundle import write_bundle
from intramural.core.canonical import digest_vector
from intramural.core.errors import CheckpointError, ConfigError, Interrupted, ModelError
from intramural.core.files import exclusive
from intramural.core.journal import scan
from intramural.core.layout import Vector
from intramural.server import run as run_module
from intramural.server.commits import commits_of
from intramural.server.export import Beginning, beginning
from intramural.server.run import plan_from_config
from intramural.server.watcher import Watcher
from tests.rounds.runs import final, run
from tests.server.fakes import Seen
from tests.tiny import Json, federation, sites


class Stop(Watcher):
    """Stops the run after a round."""

    def __init__(self, round_: int) -> None:
        self.round = round_

    def committed(self, record: Json) -> None:
        if record["round"] == self.round:
            raise Interrupted("stopped by the test")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return sites(tmp_path / "sites", 2)


def test_a_run_leaves_model_report_journal_and_checkpoints(
    tmp_path: Path, bert: Path, folder: Path
) -> None:
    config = federation(bert, sites={"min": 2})
    out = tmp_path / "run"
    report = run(out, config, folder)
    assert json.loads((out / "report.json").read_text()) == report
    names = {path.name for path in out.iterdir()}
    assert names == {"model", "report.json", "journal.jsonl", "checkpoints", "run.lock"}
    assert (out / "model" / "adapter_model.safetensors").is_file()
    kinds = [entry.kind for entry in scan(out / "journal.jsonl").entries]
    assert kinds == ["started", "opened", "committed", "opened", "committed", "finished"]
    assert report["digest"] == digest_vector(final(out))


def test_nothing_holds_the_first_vector_after_the_first_round(
    tmp_path: Path, bert: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    firsts: list[weakref.ref[Vector]] = []

    def noted(*args: Any) -> Beginning:
        first = beginning(*args)
        firsts.append(weakref.ref(first.vector))
        return first

    class Looks(Watcher):
        held: list[bool]

        def opened(self, round_: int, sites: Sequence[str]) -> None:
            self.held.append(firsts[0]() is not None)

    monkeypatch.setattr(run_module, "beginning", noted)
    watcher = Looks()
    watcher.held = []
    run(tmp_path / "run", federation(bert, sites={"min": 2}), folder, watcher=watcher)
    assert watcher.held == [True, False]


def test_the_report_has_the_keys_that_machines_read(
    tmp_path: Path, bert: Path, folder: Path
) -> None:
    report = run(tmp_path / "run", federation(bert, sites={"min": 2}), folder)
    assert report["digest"].startswith("sha256:")
    assert [r["round"] for r in report["rounds"]] == [1, 2]
    for record in report["rounds"]:
        needed = {"round", "sites", "metrics", "bytes_up", "bytes_down", "seconds", "refusals"}
        assert needed <= set(record)
        assert record["bytes_up"] > 4 * 644 * 2  # two sites' vectors, and their headers
        assert {"accuracy", "macro_f1", "loss", "examples"} <= set(record["metrics"])
    assert set(report["final"]) == {"federated", "pooled", "baseline", "local", "own_test"}
    result = report["final"]["federated"]
    assert {"accuracy", "macro_f1", "interval"} <= set(result)
    low, high = result["interval"]["accuracy"]
    assert low <= result["accuracy"] <= high
    assert set(report["final"]["own_test"]) == {"site-1", "site-2"}
    assert report["privacy"] is None
    assert report["bytes_up"] == sum(r["bytes_up"] for r in report["rounds"])


def test_a_folder_with_a_run_is_refused_unless_it_is_resumed(
    tmp_path: Path, bert: Path, folder: Path
) -> None:
    config = federation(bert, sites={"min": 2})
    first = run(tmp_path / "run", config, folder)
    with pytest.raises(ConfigError, match="holds a run already; add --resume"):
        run(tmp_path / "run", config, folder)
    other = federation(bert, sites={"min": 2}, federation={"seed": 1})
    with pytest.raises(ConfigError, match=r"holds a run of another federation\.toml"):
        run(tmp_path / "run", other, folder, resume=True)
    again = run(tmp_path / "run", config, folder, resume=True)
    assert again["digest"] == first["digest"]
    assert again["final"] == first["final"]


def test_a_run_stopped_before_its_first_commit_is_not_resumed_as_another(
    tmp_path: Path, bert: Path, folder: Path
) -> None:
    class StopEarly(Watcher):
        def opened(self, round_: int, sites: list[str]) -> None:
            raise Interrupted("stopped by the test")

    config = federation(bert, sites={"min": 2})
    with pytest.raises(Interrupted):
        run(tmp_path / "run", config, folder, watcher=StopEarly())
    assert not (tmp_path / "run" / "checkpoints").exists()  # the journal alone knows the manifest
    other = federation(bert, sites={"min": 2}, federation={"seed": 1})
    with pytest.raises(ConfigError, match=r"holds a run of another federation\.toml"):
        run(tmp_path / "run", other, folder, resume=True)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_stopped_run_is_resumed_to_the_same_bits(
    tmp_path: Path, bert: Path, folder: Path, stop: int
) -> None:
    config = federation(
        bert, sites={"min": 2}, federation={"rounds": 3}, strategy={"momentum": 0.5}
    )
    whole = run(tmp_path / "whole", config, folder)
    with pytest.raises(Interrupted):
        run(tmp_path / "run", config, folder, watcher=Stop(stop))
    assert not (tmp_path / "run" / "report.json").exists()
    rest = run(tmp_path / "run", config, folder, resume=True)
    assert rest["digest"] == whole["digest"]
    assert rest["final"] == whole["final"]
    kinds = [e.kind for e in scan(tmp_path / "run" / "journal.jsonl").entries]
    assert kinds.count("committed") == 3
    assert kinds.count("resumed") == 1


def test_a_harmed_checkpoint_costs_its_round_and_is_told(
    tmp_path: Path, bert: Path, folder: Path
) -> None:
    config = federation(bert, sites={"min": 2}, federation={"rounds": 3})
    whole = run(tmp_path / "run", config, folder)
    newest = tmp_path / "run" / "checkpoints" / "round-000003.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    seen = Seen()
    again = run(tmp_path / "run", config, folder, resume=True, watcher=seen)
    assert again["digest"] == whole["digest"]
    assert seen.lines == ["round-000003.json: SafetensorError: not whole, passed over"]
    assert [record["round"] for record in seen.records] == [3]
    commits = commits_of(scan(tmp_path / "run" / "journal.jsonl").entries)
    assert (len(commits.standing), commits.repeated, commits.problem) == (3, (3,), None)


def test_a_checkpoint_of_another_model_is_refused(
    tmp_path: Path, bert: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from intramural.server import run as under_test

    config = federation(bert, sites={"min": 2})
    run(tmp_path / "run", config, folder)
    other = federation(bert, exchange={"rank": 3})
    from intramural.server.export import beginning

    grown = beginning(other, {})
    monkeypatch.setattr(under_test, "beginning", lambda *_: grown)  # the base was replaced
    with pytest.raises(CheckpointError, match="layout is not the model's"):
        run(tmp_path / "run", config, folder, resume=True)


def test_a_run_s_configuration_is_read_back(tmp_path: Path) -> None:
    config = federation(Path("somewhere"))
    own = {"manifest": config.manifest(), "out": "run", "patience-s": 2.5, "resume": False}
    app, run = write_bundle(tmp_path, own)
    assert [path.name for path in app.iterdir()] == ["pyproject.toml"]  # and no code
    table = tomllib.loads((app / "pyproject.toml").read_text())
    defaults = table["tool"]["flwr"]["app"]["config"]
    plan = plan_from_config(defaults | tomllib.loads(run.read_text()))
    assert plan.federation == config
    assert (plan.folder, plan.resume, plan.patience_s) == (Path("run"), False, 2.5)
    endless = plan_from_config(defaults | {"manifest": config.manifest(), "out": "run"})
    assert endless.patience_s == inf


def test_the_bundle_is_the_same_for_every_run(tmp_path: Path) -> None:
    first, _ = write_bundle(tmp_path / "a", {"manifest": "{}", "out": "x"})
    second, _ = write_bundle(tmp_path / "b", {"manifest": "[]", "simulation-sites": "y"})
    content = (first / "pyproject.toml").read_bytes()
    assert content == (second / "pyproject.toml").read_bytes()


@pytest.mark.parametrize("settings", [{}, {"manifest": "{"}, {"manifest": "{}"}])
def test_a_bundle_without_a_manifest_is_refused(settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        plan_from_config(settings | ({"out": "run"} if settings else {}))


def test_a_folder_in_use_is_refused_and_a_failed_start_leaves_it_usable(
    tmp_path: Path, bert: Path, folder: Path
) -> None:
    config = federation(bert, sites={"min": 2})
    refused = pytest.raises(ConfigError, match="another process runs a federation there")
    with exclusive(tmp_path / "run" / "run.lock"), refused:
        run(tmp_path / "run", config, folder)
    missing = federation(tmp_path / "no-model", sites={"min": 2})
    with pytest.raises(ModelError):
        run(tmp_path / "run", missing, folder)
    assert not (tmp_path / "run" / "journal.jsonl").exists()
    run(tmp_path / "run", config, folder)


def test_an_error_of_the_system_in_a_run_is_told_as_what_it_is(
    tmp_path: Path, bert: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("intramural.server.run.beginning", busy)
    with pytest.raises(BlockingIOError):
        run(tmp_path / "run", federation(bert, sites={"min": 2}), folder)
