"""A probe and its plan on a tiny federation; and a private cell measured by the simulator."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.site import load_site
from intramural.server.watcher import Watcher
from intramural.simulations.simulate import Simulation, simulate
from intramural.simulations.sites import Deal
from intramural.simulations.sweep_cli import show_plan
from intramural.simulations.sweep_report import measure_validation
from tests.tiny import federation, rows, site


def simulation(folder: Path, config: FederationConfig) -> Simulation:
    deal = Deal(
        federation=config,
        template=load_site(site(folder, "template", rows())),
        sites=2,
        partition="iid",
        folder=folder / "out",
    )
    return Simulation(deal=deal, compare=frozenset())


def test_a_probe_is_run_once_and_the_plan_tells_its_bytes(tmp_path: Path, bert: Path) -> None:
    whole = simulation(tmp_path, federation(bert, sites={"min": 2}, federation={"rounds": 50}))
    console = Console(file=io.StringIO(), width=100)
    plan = show_plan(whole, hardware=None, console=console)
    (folder,) = (tmp_path / "out" / "probe").iterdir()
    report = json.loads((folder / "report.json").read_text())
    first, second = report["rounds"]
    # every round a training and an evaluation, and one test: what two sites got and sent
    evaluation = second["bytes_down"] - first["bytes_down"]
    assert len(report["rounds"]) == 2
    assert plan.hub_up_bytes == pytest.approx(50 * second["bytes_down"] + evaluation)
    assert plan.sites[0].memory_bytes > 50e6
    assert "50 rounds take" in " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    kept = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert kept["hours"] == plan.hours

    hardware = tmp_path / "hardware.toml"
    hardware.write_text("[default]\nmemory_gb = 0.01\n")
    written = (folder / "report.json").stat().st_mtime_ns
    with pytest.raises(ConfigError, match="needs about"):
        show_plan(whole, hardware=hardware, console=console)
    assert (folder / "report.json").stat().st_mtime_ns == written


def test_the_simulator_measures_what_a_private_cell_is_not_told(tmp_path: Path, bert: Path) -> None:
    open_run = simulation(tmp_path, federation(bert, sites={"min": 2}))
    report = simulate(open_run, watcher=Watcher())
    told = report["rounds"][-1]["metrics"]
    found = measure_validation(open_run.federation, tmp_path / "out")
    # the same model on the same records: the sites' own sums, added up
    assert found["macro_f1"] == pytest.approx(told["macro_f1"])
    assert found["examples"] == told["examples"]
