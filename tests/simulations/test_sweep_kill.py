"""A sweep of six cells is killed with SIGKILL and goes on; nothing that was done is done again."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import tomli_w

from intramural.core.journal import scan
from intramural.simulations.sweep import LAST_WRITTEN
from tests.tiny import CSV, Json, table

PATIENCE_S = 300.0
ROUNDS = 8
SWEEP = """
[sweep]
kind = "grid"
[parameters]
training.learning_rate = [0.05, 0.1, 0.2]
federation.seed = [1, 2]
"""
RUN = """
import sys
from pathlib import Path
from rich.console import Console
from intramural.simulations.sweep_cli import SweepOrder, run_sweep
here, out, resume = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "resume"
columns = ("--text", "title", "--label", "chapter")
order = SweepOrder(
    federation=here / "federation.toml", data=Path(sys.argv[4]), sweep=here / "sweep.toml",
    out=here / out, sites=2, workers=2, resume=resume, options=columns,
)
run_sweep(order, console=Console(stderr=True))
"""


def start(folder: Path, out: str, *, resume: bool) -> "subprocess.Popen[bytes]":
    words = [sys.executable, "-c", RUN, str(folder), out, "resume" if resume else "new", str(CSV)]
    return subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=sys.stderr)


def rounds_of(cell: Path) -> list[int]:
    entries = scan(cell / "journal.jsonl").entries
    return [entry.body["round"] for entry in entries if entry.kind == "committed"]


def cells_in(folder: Path, out: str) -> list[Path]:
    return sorted((folder / out / "cells").glob("*"))


def alive(pids: list[int]) -> list[int]:
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found


@pytest.mark.slow
def test_a_sweep_killed_in_the_middle_goes_on_to_the_same_results(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    content: Json = table(
        bert,
        sites={"min": 2},
        federation={"rounds": ROUNDS},
        training={"local_steps": 4, "batch_size": 32},
    )
    (tmp_path / "federation.toml").write_text(tomli_w.dumps(content))
    (tmp_path / "sweep.toml").write_text(SWEEP)

    process = start(tmp_path, "broken", resume=False)
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end and process.poll() is None:
        cells = cells_in(tmp_path, "broken")
        done = [cell for cell in cells if (cell / LAST_WRITTEN).exists()]
        going = [cell for cell in cells if 1 <= len(rounds_of(cell)) <= ROUNDS - 2]
        if done and going:
            break
        time.sleep(0.01)
    assert process.poll() is None, "the sweep ended before it could be killed"
    children = [child.pid for child in psutil.Process(process.pid).children()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 10
    while alive(children) and time.monotonic() < end:
        time.sleep(0.05)
    assert alive(children) == []  # no cell outlives its sweep
    committed = {cell.name: len(rounds_of(cell)) for cell in cells_in(tmp_path, "broken")}
    stamps = {cell.name: os.stat(cell / "journal.jsonl").st_mtime_ns for cell in done}

    assert start(tmp_path, "broken", resume=True).wait(PATIENCE_S) == 0
    cells = cells_in(tmp_path, "broken")
    assert len(cells) == 6
    assert all((cell / LAST_WRITTEN).exists() for cell in cells)
    for cell in cells:
        assert Counter(rounds_of(cell)) == Counter(range(1, ROUNDS + 1))  # each round once
    assert {c.name: os.stat(c / "journal.jsonl").st_mtime_ns for c in done} == stamps
    assert any(0 < committed[name] < ROUNDS for name in committed)  # some cell was in its middle

    assert start(tmp_path, "whole", resume=False).wait(PATIENCE_S) == 0
    broken, whole = (
        json.loads((tmp_path / out / "sweep.json").read_text()) for out in ("broken", "whole")
    )
    for report in (broken, whole):
        for row in report["cells"]:
            del row["seconds"], row["bytes_up"]  # an update tells its own seconds, in digits
    assert broken == whole
    assert len(broken["groups"]) == 3
    digests = [
        {
            c.name: json.loads((c / "report.json").read_text())["digest"]
            for c in cells_in(tmp_path, o)
        }
        for o in ("broken", "whole")
    ]
    assert digests[0] == digests[1]
