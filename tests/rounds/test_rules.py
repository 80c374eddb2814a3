"""Whole federations under each rule for adapters: it learns, and is as exact as it says."""

from pathlib import Path
from typing import Any

import pytest

from intramural.client.app import app
from intramural.core.federation import FederationConfig
from intramural.server.run import RunPlan, run_federation
from intramural.simulations.inprocess import InProcessGrid
from intramural.simulations.pool import PoolGrid
from tests.tiny import Json, federation, rows, site

EXACT = ["ffa-lora", "rolora", "fedsvd", "flora", "fedex-lora"]
ROUNDS = 3


def config_of(bert: Path, rule: str, **sections: Any) -> FederationConfig:
    return federation(
        bert,
        federation={"rounds": ROUNDS},
        exchange={"kind": "lora"},
        strategy={"rule": rule},
        training={"optimizer": "adamw", "learning_rate": 0.02},  # so that factors differ at once
        sites={"min": 3},
        **sections,
    )


def run(
    folder: Path, config: FederationConfig, *, workers: int = 0, policy: Json | None = None
) -> Json:
    for number in range(3):
        limits: Json = {"require_privacy": False} | (policy or {})
        site(folder / "sites", f"site-{number + 1}", rows()[number::3], policy=limits)
    settings = {"manifest": config.manifest(), "simulation-sites": str(folder / "sites")}
    plan = RunPlan(federation=config, folder=folder / "run", patience_s=0.0, durable=False)
    if not workers:
        return run_federation(plan, InProcessGrid(app, 3, run_config=settings))
    with PoolGrid(3, run_config=settings, workers=workers) as grid:
        return run_federation(plan, grid)


def errors(report: Json) -> list[float]:
    return [entry["aggregation_error"] for entry in report["rounds"]]


@pytest.mark.parametrize("rule", EXACT)
def test_an_exact_rule_is_exact_on_a_real_model(tmp_path: Path, bert: Path, rule: str) -> None:
    report = run(tmp_path, config_of(bert, rule))
    assert len(errors(report)) == ROUNDS
    assert max(errors(report)) <= 1e-6


def test_averaging_factors_apart_is_not_and_flexlora_loses_the_tail(
    tmp_path: Path, bert: Path
) -> None:
    for rule in ("fedavg", "flexlora"):
        report = run(tmp_path / rule, config_of(bert, rule))
        assert max(errors(report)) > 1e-3


@pytest.mark.parametrize("rule", ["rolora", "flora", "fedsa-lora"])
def test_processes_end_at_the_same_bits(tmp_path: Path, bert: Path, rule: str) -> None:
    config = config_of(bert, rule)
    alone = run(tmp_path / "alone", config)
    pool = run(tmp_path / "pool", config, workers=2)
    assert alone["digest"] == pool["digest"]
    metrics = [[r["metrics"] for r in report["rounds"]] for report in (alone, pool)]
    assert metrics[0] == metrics[1]


def test_half_the_bytes_go_up_where_one_factor_is_trained(tmp_path: Path, bert: Path) -> None:
    up = {}
    for rule in ("fedavg", "ffa-lora"):
        report = run(tmp_path / rule, config_of(bert, rule))
        up[rule] = sum(entry["bytes_up"] for entry in report["rounds"])
    assert up["ffa-lora"] < 0.9 * up["fedavg"]
