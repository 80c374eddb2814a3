"""Bad input at the command line: one line, the right exit code, nothing half-written."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w

from intramural.__main__ import main
from tests.models.builders import folder_of
from tests.tiny import CSV, Json, rows, table

CANARY = "CANARY-7f3a9c"
RESULTS = ("report.json", "report.html", "model", ".model")


@dataclass
class Call:
    """One `intramural simulate`, put together by the tests and run in this process."""

    folder: Path
    content: Json
    data: Path = CSV
    site: Json | None = None
    sites: int = 2

    def run(self, capsys: pytest.CaptureFixture[str], *extra: str) -> tuple[int, str]:
        """Return exit code and standard error."""
        (self.folder / "federation.toml").write_text(tomli_w.dumps(self.content))
        data = self.data
        columns = ["--text", "title", "--label", "chapter"]
        if self.site is not None:
            columns = []
            data = self.folder / "site.toml"
            data.write_text(tomli_w.dumps(self.site))
        words = ["intramural", "simulate", str(self.folder / "federation.toml")]
        words += ["--data", str(data), *columns]
        words += ["--sites", str(self.sites), "--compare", "none", "--threads", "1"]
        words += ["--out", str(self.folder / "out"), *extra]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words)
            patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
            with pytest.raises(SystemExit) as end:
                main()
        return int(end.value.code or 0), capsys.readouterr().err


@pytest.fixture
def call(tmp_path: Path, bert: Path) -> Call:
    return Call(folder=tmp_path, content=table(bert, sites={"min": 2}))


def refused(call: Call, capsys: pytest.CaptureFixture[str], *extra: str) -> tuple[int, str]:
    """Run, check what every refusal has in common, and return exit code and the line."""
    code, errors = call.run(capsys, *extra)
    assert code != 0
    assert "Traceback" not in errors
    assert CANARY not in errors
    assert errors.startswith("intramural: ")
    assert errors.count("\n") == 1, errors
    out = call.folder / "out"
    left = {path.name for path in out.iterdir()} if out.is_dir() else set()
    assert not {name for name in left if name.startswith(RESULTS)}
    return code, errors


def test_a_good_call_ends_with_0(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    code, errors = call.run(capsys)
    assert (code, errors) == (0, "")
    assert (call.folder / "out" / "report.json").is_file()
    assert (call.folder / "out" / "report.html").is_file()
    assert (call.folder / "out" / "model" / "adapter_model.safetensors").is_file()


def test_json_is_one_object_on_standard_output(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    (call.folder / "federation.toml").write_text(tomli_w.dumps(call.content))
    call.run(capsys)
    words = ["intramural", "verify", str(call.folder / "out" / "journal.jsonl"), "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as end:
            main()
    assert end.value.code in (0, None)
    assert json.loads(capsys.readouterr().out)["entries"] == 6


def test_every_problem_of_a_configuration_is_a_line(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    del call.content["federation"]["rounds"]
    call.content["training"]["learning_rat"] = 0.1
    call.content["training"]["batch_size"] = 0
    code, errors = call.run(capsys)
    assert code == 2
    lines = errors.rstrip("\n").split("\n")
    assert len(lines) == 3
    assert any("federation.rounds: missing; add it: number of rounds" in line for line in lines)
    assert any("did you mean 'learning_rate'?" in line for line in lines)
    assert any("training.batch_size: " in line and "got 0" in line for line in lines)
    assert not (call.folder / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["federation"].pop("rounds"), "federation.rounds: missing"),
        (lambda c: c["training"].update(unheard_of=1), "training.unheard_of: unknown key"),
        (lambda c: c["task"].update(labels=["one"]), "at least two labels"),
        (lambda c: c["training"].update(learning_rate=float("nan")), "training.learning_rate"),
        (lambda c: c["strategy"].update(rule="fedavgg"), "did you mean 'fedavg'"),
        (
            lambda c: c["exchange"].update(target_modules=["q_proj"]),
            "its linear layers are ['classifier', 'dense', 'key', 'query', 'value']",
        ),
        (lambda c: c["model"].update(base="no-such-model"), "model 'no-such-model': not a folder"),
        (
            lambda c: c["model"].update(digest="sha256:" + "0" * 64),
            "the federation wants sha256:000",
        ),
    ],
)
def test_a_wrong_federation_ends_with_2(
    call: Call,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Json], Any],
    words: str,
) -> None:
    call.content.setdefault("strategy", {})
    change(call.content)
    code, errors = refused(call, capsys)
    assert code == 2
    assert words in errors


def test_too_few_sites_end_with_2_before_anything_is_written(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    call.sites = 1
    code, errors = refused(call, capsys)
    assert code == 2
    assert "--sites 1 is below sites.min = 2" in errors
    assert not (call.folder / "out").exists()


PRIVACY: Json = {
    "unit": "record", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0, "nominal_records": 100
}  # fmt: skip


@pytest.mark.parametrize(
    ("privacy", "sections", "words"),
    [
        ({}, {}, "strategy.weights = 'examples' would send each site's number of records"),
        (
            {"nominal_records": 7},
            {"strategy": {"weights": "equal"}},
            "training.batch_size = 8 is above privacy.nominal_records = 7",
        ),
        (
            {"engine": "opacus"},
            {"strategy": {"weights": "equal"}, "training": {"gradient_checkpointing": True}},
            "training.gradient_checkpointing hides layers from privacy.engine = 'opacus'",
        ),
        (
            {"epsilon": 1e-9},
            {"strategy": {"weights": "equal"}},
            "privacy.epsilon",
        ),
    ],
    ids=["weights", "rate-above-1", "checkpointing", "no-noise-is-enough"],
)
def test_an_impossible_privacy_plan_ends_with_2_before_anything_is_written(
    call: Call,
    capsys: pytest.CaptureFixture[str],
    privacy: Json,
    sections: Json,
    words: str,
) -> None:
    call.content["privacy"] = PRIVACY | privacy
    for section, keys in sections.items():
        call.content[section] = call.content.get(section, {}) | keys
    code, errors = refused(call, capsys)
    assert code == 2
    assert words in errors
    assert not (call.folder / "out").exists()


def test_a_model_folder_without_weights_ends_with_2(
    call: Call, capsys: pytest.CaptureFixture[str], bert: Path
) -> None:
    bare = folder_of(bert, call.folder / "bare", leave_out=".safetensors")
    call.content["model"]["base"] = str(bare)
    code, errors = refused(call, capsys)
    assert code == 2
    assert "no .safetensors weights in" in errors


def as_csv(table_: list[dict[str, str]]) -> bytes:
    lines = [f'"{row["title"]}",{row["chapter"]}' for row in table_]
    return ("title,chapter\n" + "\n".join(lines) + "\n").encode()


def as_parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows()), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.csv", b"", "is empty"),
        ("empty.jsonl", b"", "empty"),
        ("header.csv", b"title,chapter\n", "has no rows"),
        ("cut.parquet", as_parquet()[:-100], "Parquet"),
        ("cut.parquet", as_parquet()[:4], "Parquet"),
        ("bytes.csv", b"title,chapter\n\xff\xfe" + CANARY.encode() + b",mental\n", "not UTF-8"),
        (
            "bytes.jsonl",
            b'{"title": "\xff' + CANARY.encode() + b'", "chapter": "a"}\n',
            "not UTF-8",
        ),
        ("other.csv", b"note,chapter\nx,mental\n", "column 'title' is missing"),
        ("labels.csv", as_csv([{"title": CANARY, "chapter": CANARY}]), "unknown label"),
        ("one.csv", as_csv(rows()[:1]), "site"),
        ("notes.xlsx", b"PK", "is of no known format"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_a_file_that_cannot_be_read_ends_with_2(
    call: Call, capsys: pytest.CaptureFixture[str], name: str, content: bytes, words: str
) -> None:
    call.data = call.folder / name
    call.data.write_bytes(content)
    code, errors = refused(call, capsys)
    assert code == 2
    assert words in errors


def test_a_file_that_is_not_there_ends_with_2(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    call.data = call.folder / "nowhere.csv"
    code, errors = refused(call, capsys)
    assert code == 2
    assert "nowhere.csv" in errors


@pytest.mark.parametrize("strict", [True, False])
def test_a_row_with_an_unknown_label_stops_strict_sites_and_is_counted_by_others(
    call: Call, capsys: pytest.CaptureFixture[str], strict: bool
) -> None:
    data = call.folder / "records.csv"
    data.write_bytes(as_csv([*rows(), {"title": CANARY, "chapter": CANARY}]))
    call.site = {
        "site": {"name": "template"},
        "data": {"path": str(data), "text": "title", "label": "chapter", "strict": strict},
        "policy": {"require_privacy": False},
    }
    if strict:
        code, errors = refused(call, capsys)
        assert code == 2
        assert "line 202, column 'chapter': unknown label" in errors
        return
    code, errors = call.run(capsys)
    assert (code, errors) == (0, "")
    report = json.loads((call.folder / "out" / "report.json").read_text())
    assert report["notes"] == ["1 rows were skipped: column 'chapter': unknown label"]
    for path in (call.folder / "out").rglob("*"):
        assert path.is_dir() or CANARY.encode() not in path.read_bytes()


def test_training_that_diverges_ends_with_1(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    call.content["training"] |= {"learning_rate": 1e30, "local_steps": 4}
    code, errors = refused(call, capsys)
    assert code == 1
    assert "0 good answers, 2 needed; reasons: {'training': 6}" in errors
    journal = (call.folder / "out" / "journal.jsonl").read_text()
    assert "lower training.learning_rate" in journal


def test_a_data_file_that_is_mended_can_be_used_in_the_same_folder(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    call.data = call.folder / "notes.csv"
    call.data.write_bytes(b"")
    assert refused(call, capsys)[0] == 2
    call.data.write_bytes(CSV.read_bytes())
    assert call.run(capsys) == (0, "")


def test_a_folder_in_use_ends_with_2(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    assert call.run(capsys)[0] == 0
    code, errors = call.run(capsys)
    assert code == 2
    assert "holds a run already; add --resume" in errors
    call.content["federation"]["seed"] = 8
    code, errors = call.run(capsys, "--resume")
    assert code == 2
    assert "holds another simulation; use another --out" in errors


def test_sites_so_small_that_some_have_no_validation_records_are_simulated(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    call.sites = 10
    call.content["federation"]["seed"] = 6  # deals one site no validation records
    code, errors = call.run(capsys)
    assert (code, errors) == (0, "")
    report = json.loads((call.folder / "out" / "report.json").read_text())
    assert any(site["validation"] == 0 for site in report["sites"])


def test_sites_too_small_to_test_on_end_with_2_before_the_rounds(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    call.sites = 60
    code, errors = refused(call, capsys)
    assert code == 2
    assert "no record for t" in errors
    assert "or deal to fewer sites" in errors
    assert not (call.folder / "out" / "journal.jsonl").exists()
