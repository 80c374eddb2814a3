"""Simulations whole: with comparisons, of a language model, and without any evaluation."""

import json
from pathlib import Path

import pytest

from intramural.core.federation import FederationConfig
from intramural.core.site import load_site
from intramural.server.watcher import Watcher
from intramural.simulations.simulate import COMPARISONS, Simulation, simulate
from intramural.simulations.sites import Deal
from tests.tiny import Json, federation, generation, rows, site


def simulated(folder: Path, config: FederationConfig, *, compare: frozenset[str]) -> Json:
    template = site(folder, "template", rows(), kind=config.task.kind)
    deal = Deal(
        federation=config,
        template=load_site(template),
        sites=2,
        partition="iid",
        folder=folder / "out",
    )
    report = simulate(Simulation(deal=deal, compare=compare), watcher=Watcher())
    assert json.loads((folder / "out" / "report.json").read_text()) == report
    assert "<html" in (folder / "out" / "report.html").read_text()
    return report


def test_a_classification_is_compared_with_local_pooled_and_baseline(
    tmp_path: Path, bert: Path
) -> None:
    report = simulated(tmp_path, federation(bert, sites={"min": 2}), compare=COMPARISONS)
    final = report["final"]
    assert set(final["local"]) == {"site-1", "site-2"}
    numbers = {final[kind]["examples"] for kind in ("federated", "pooled", "baseline")}
    assert numbers == {sum(entry["test"] for entry in report["sites"])}
    for own in final["own_test"].values():
        assert set(own) == {"federated", "local", "pooled", "baseline"}
    assert final["baseline"]["accuracy"] > 0.5  # chapters of ICD-10 are easy for a word count
    assert sum(sum(entry["labels"].values()) for entry in report["sites"]) == 200


def test_a_generation_shows_what_the_model_writes(tmp_path: Path, llama: Path) -> None:
    report = simulated(tmp_path, generation(llama, sites={"min": 2}), compare=frozenset({"local"}))
    assert report["final"]["federated"]["perplexity"] > 1
    assert report["final"]["baseline"] is None
    [sample] = report["samples"]
    assert set(sample) == {"prompt", "reference", "before", "after"}


@pytest.mark.parametrize("compare", [frozenset(), COMPARISONS])
def test_a_federation_without_evaluation_still_leaves_a_report(
    tmp_path: Path, bert: Path, compare: frozenset[str]
) -> None:
    config = federation(bert, sites={"min": 2}, evaluation={"every": 0})
    report = simulated(tmp_path, config, compare=compare)
    assert report["final"]["federated"] is None
    assert [record["metrics"] for record in report["rounds"]] == [{}, {}]
