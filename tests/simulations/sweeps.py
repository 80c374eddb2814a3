"""Small sweeps for tests: files, cells without processes, reports without training."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import tomli_w

from intramural.simulations.sweep import FEDERATION, LAST_WRITTEN, Result, run_cells
from intramural.simulations.sweep_cells import Cell, Source, cells_of
from intramural.simulations.sweep_config import SweepConfig, load_sweep
from tests.tiny import Json, table

RATES = '[sweep]\nkind = "grid"\n[parameters]\ntraining.learning_rate = [0.1, 0.2, 0.4]\n'


def files(folder: Path, sweep: str = RATES, **sections: Json) -> Source:
    """Write sweep.toml and a tiny federation.toml, and return where they are."""
    content = table(Path("no-such-model"), **sections)
    (folder / "federation.toml").write_text(tomli_w.dumps(content), encoding="utf-8")
    (folder / "sweep.toml").write_text(sweep, encoding="utf-8")
    return Source(
        sweep=folder / "sweep.toml",
        federation=folder / "federation.toml",
        sites=2,
        partition="iid",
        salt="records",
    )


def sweep_of(folder: Path, sweep: str = RATES, **sections: Json) -> tuple[SweepConfig, list[Cell]]:
    """Return a sweep's configuration and its cells."""
    source = files(folder, sweep, **sections)
    config = load_sweep(source.sweep)
    return config, list(cells_of(config, source))


def write_report(folder: Path, metrics: Json, **more: Json) -> None:
    """Write what a finished cell leaves of its report."""
    rounds = [{"round": 1, "metrics": {"macro_f1": 0.0}}, {"round": 2, "metrics": metrics}]
    report = {"rounds": rounds, "seconds": 3.0, "bytes_up": 10, "bytes_down": 20, **more}
    (folder / "report.json").write_text(json.dumps(report))
    (folder / LAST_WRITTEN).write_text("<html>")


class Fake:
    """A cell's process that ends when it is first looked at, as a script says."""

    def __init__(self, code: int | None, log: list[str], name: str) -> None:
        self._code, self._log, self._name = code, log, name

    def poll(self) -> int | None:
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        assert self._code is not None
        return self._code

    def send_signal(self, sig: int) -> None:
        self._log.append(f"{self._name} signal {sig}")
        self._code = 130

    def kill(self) -> None:
        self._log.append(f"{self._name} killed")


class Script:
    """Starts cells that end with the codes given for their number, in turn; then with 0."""

    def __init__(self, codes: Mapping[int, Sequence[int | None]] | None = None) -> None:
        self.codes = {number: list(given) for number, given in (codes or {}).items()}
        self.log: list[str] = []
        self.started: list[int] = []

    def __call__(self, cell: Cell, folder: Path) -> Fake:
        self.started.append(cell.number)
        assert tomllib.loads((folder / FEDERATION).read_text()) == cell.table
        left = self.codes.get(cell.number, [])
        code = left.pop(0) if left else 0
        if code == 0:
            write_report(folder, {"macro_f1": cell.number / 10})
        return Fake(code, self.log, f"cell {cell.number}")


def ran(
    cells: Sequence[Cell], folder: Path, script: Script, *, workers: int = 1
) -> tuple[list[Result], list[str]]:
    """Run cells by a script; return their results and what was told."""
    told: list[str] = []
    results = run_cells(
        cells,
        folder,
        workers=workers,
        start=script,
        tell=lambda cell, what: told.append(f"{cell.number} {what}"),
        sleep=lambda _: None,
    )
    return results, told
