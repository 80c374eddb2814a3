"""A simulation that is killed or stopped goes on, and ends at the same bits."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w

from intramural.core.journal import scan
from intramural.server.checkpoint import load_checkpoint
from tests.tiny import CSV, Json, table

PATIENCE_S = 120.0
ROUNDS = 4


SCENE = """name = "unequal"
about = "One of two sites computes three times as slowly as the other."
train_s = 60.0
evaluate_s = 5.0
[[groups]]
name = "fast"
share = 0.5
jitter = 0.1
[[groups]]
name = "slow"
share = 0.5
slowness = 3.0
jitter = 0.1
"""


def command(folder: Path, *, out: str, resume: bool = False) -> list[str]:
    words = [sys.executable, "-m", "intramural", "simulate", str(folder / "federation.toml")]
    words += ["--data", str(CSV), "--text", "title", "--label", "chapter", "--sites", "2"]
    words += ["--compare", "none", "--threads", "1", "--out", str(folder / out)]
    if (scene := folder / "scenario.toml").exists():
        words += ["--scenario", str(scene)]
    return words + (["--resume"] if resume else [])


def stop_in(folder: Path, round_: int, signal_: int, words: list[str]) -> tuple[int, str]:
    """Start a simulation, signal it while the round is trained; return exit code and stderr."""
    journal = folder / "broken" / "journal.jsonl"
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=folder
    )
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end and process.poll() is None:
        kinds = [(e.kind, e.body.get("round")) for e in scan(journal).entries]
        if ("opened", round_) in kinds:
            assert ("committed", round_) not in kinds, "the machine is too fast for this test"
            process.send_signal(signal_)
            break
        time.sleep(0.002)
    _, errors = process.communicate(timeout=PATIENCE_S)
    return process.returncode, errors


def test_a_run_killed_and_then_stopped_ends_where_an_undisturbed_one_does(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    content = table(
        bert,
        sites={"min": 2},
        federation={"rounds": ROUNDS},
        training={"local_steps": 15, "batch_size": 32},
        strategy={"momentum": 0.5},
    )
    (tmp_path / "federation.toml").write_text(tomli_w.dumps(content))
    whole = in_process(tmp_path, "whole")

    code, _ = stop_in(tmp_path, 2, signal.SIGKILL, command(tmp_path, out="broken"))
    assert code == -signal.SIGKILL
    assert not (tmp_path / "broken" / "report.json").exists()

    resumed = command(tmp_path, out="broken", resume=True)
    code, errors = stop_in(tmp_path, 3, signal.SIGINT, resumed)
    assert code == 130
    assert "Traceback" not in errors
    assert "the last committed round is kept, add --resume" in errors

    broken = in_process(tmp_path, "broken", resume=True)
    assert broken["digest"] == whole["digest"]
    assert broken["final"]["federated"] == whole["final"]["federated"]
    kinds = [e.kind for e in scan(tmp_path / "broken" / "journal.jsonl").entries]
    assert kinds.count("committed") == ROUNDS
    assert kinds.count("resumed") == 2


def test_an_asynchronous_run_that_is_killed_goes_on_with_who_was_at_work(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    content = table(
        bert,
        sites={"min": 2},
        federation={"rounds": 2 * ROUNDS},
        training={"local_steps": 15, "batch_size": 32},
        asynchrony={"buffer": 1},
    )
    (tmp_path / "federation.toml").write_text(tomli_w.dumps(content))
    (tmp_path / "scenario.toml").write_text(SCENE)
    whole = in_process(tmp_path, "whole")
    took_part = [record["sites"] for record in whole["rounds"]]
    assert [len(sites) for sites in took_part] == [1] * 2 * ROUNDS
    assert len({site for sites in took_part for site in sites}) == 2  # the slow one counts, too

    code, _ = stop_in(tmp_path, 3, signal.SIGKILL, command(tmp_path, out="broken"))
    assert code == -signal.SIGKILL
    checkpoint, _ = load_checkpoint(tmp_path / "broken" / "checkpoints")
    assert checkpoint is not None
    assert len(checkpoint.flights) == len(checkpoint.starts) == 1
    broken = in_process(tmp_path, "broken", resume=True)
    assert broken["digest"] == whole["digest"]
    for one, other in zip(broken["rounds"], whole["rounds"], strict=True):
        assert one["scenario"] == other["scenario"]
        for key in ("sites", "metrics", "train_loss", "simulated_seconds"):
            assert one[key] == other[key]


def in_process(folder: Path, out: str, *, resume: bool = False) -> Json:
    """Run the same command in this process, and return its report."""
    from intramural.__main__ import main

    words = command(folder, out=out, resume=resume)[2:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as end:
            main()
    assert end.value.code == 0
    report: Json = json.loads((folder / out / "report.json").read_text())
    return report
