"""Whole federations under Flower's own strategies: they run, go on, and FedAvg is FedAvg."""

from pathlib import Path
from typing import Any

import pytest

from intramural.client.app import app
from intramural.server.run import RunPlan, run_federation
from intramural.simulations.inprocess import InProcessGrid
from tests.tiny import Json, federation, sites

SITES = 5


def run(folder: Path, bert: Path, *, rounds: int = 2, **strategy: Any) -> Json:
    config = federation(
        bert, federation={"rounds": rounds}, strategy=strategy, sites={"min": SITES}
    )
    at = sites(folder / "sites", SITES)
    settings = {"manifest": config.manifest(), "simulation-sites": str(at)}
    plan = RunPlan(federation=config, folder=folder / "run", patience_s=0.0, durable=False)
    return run_federation(plan, InProcessGrid(app, SITES, run_config=settings))


@pytest.mark.parametrize(
    ("rule", "options"),
    [("Krum", {"num_malicious_nodes": 1}), ("FedTrimmedAvg", {"beta": 0.2}), ("FedAdam", {})],
)
def test_it_runs_every_round_with_every_site(
    tmp_path: Path, bert: Path, rule: str, options: Json
) -> None:
    report = run(tmp_path, bert, rule=f"flwr:{rule}", options=options)
    assert [len(entry["sites"]) for entry in report["rounds"]] == [SITES, SITES]
    assert all(entry["refusals"] == {} for entry in report["rounds"])
    assert 0 <= report["final"]["federated"]["accuracy"] <= 1
    assert len({entry["metrics"]["loss"] for entry in report["rounds"]}) == 2  # it moves


def test_flowers_fedavg_ends_where_ours_does_and_krum_elsewhere(tmp_path: Path, bert: Path) -> None:
    ours, stock, krum = (
        run(tmp_path / name.replace(":", "-"), bert, rule=name, options=options)
        for name, options in (
            ("fedavg", {}),
            ("flwr:FedAvg", {}),
            ("flwr:Krum", {"num_malicious_nodes": 1}),
        )
    )
    losses = [[entry["metrics"]["loss"] for entry in r["rounds"]] for r in (ours, stock, krum)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] != pytest.approx(losses[0], rel=1e-5)
