"""Engines differ in what carries the messages; what comes of them is the same, bit for bit."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.serverapp import Grid

from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.site import load_site
from intramural.server.run import RunPlan, run_federation
from intramural.server.setting import Setting
from intramural.server.watcher import Watcher
from intramural.simulations.engines import Work, choose, run_engine
from intramural.simulations.inprocess import InProcessGrid
from intramural.simulations.pool import PoolGrid
from intramural.simulations.simulate import COMPARISONS, Simulation, simulate
from intramural.simulations.sites import Deal
from tests.client.test_private_agent import PRIVACY
from tests.simulations.faulty_app import app as faulty_app
from tests.tiny import Json, federation, rows, site, sites

FAULTY = "tests.simulations.faulty_app:app"
QUORUM: Json = {"min": 3, "quorum": 0.6, "deadline_s": 60.0}


def same(setting: Setting) -> Setting:
    return setting


def carried(
    folder: Path, config: FederationConfig, grid: Grid, adapt: Callable[[Setting], Setting] = same
) -> Json:
    plan = RunPlan(federation=config, folder=folder, patience_s=0.0, durable=False)
    return run_federation(plan, grid, adapt=adapt)


def config_of(bert: Path, *, private: bool) -> FederationConfig:
    sections: dict[str, Any] = {"sites": QUORUM, "evaluation": {"every": 0}}
    if private:
        sections |= {"privacy": PRIVACY, "strategy": {"weights": "equal"}}
    return federation(bert, **sections)


@pytest.mark.parametrize("private", [False, True])
def test_one_crashing_and_one_slow_site_change_the_result_alike_on_every_engine(
    tmp_path: Path, bert: Path, private: bool
) -> None:
    config = config_of(bert, private=private)
    policy: Json = {"require_privacy": False} | ({"not_private_seed": 5} if private else {})
    digests, refusals = [], []
    for name in ("alone", "pool"):
        folder = tmp_path / name / "sites"
        for number in range(3):
            site(folder, f"site-{number + 1}", rows()[number::3], policy=policy)
        settings = {"manifest": config.manifest(), "simulation-sites": str(folder)}
        if name == "alone":
            report = carried(
                tmp_path / name, config, InProcessGrid(faulty_app, 3, run_config=settings)
            )
        else:
            with PoolGrid(3, run_config=settings, app=FAULTY, workers=2) as grid:
                report = carried(tmp_path / name, config, grid)
        digests.append(report["digest"])
        refusals.append([r["refusals"] for r in report["rounds"]])
        assert [len(r["sites"]) for r in report["rounds"]] == [2, 3]
    assert digests[0] == digests[1]
    assert refusals[0] == refusals[1] == [{"flower-2": 1}, {}]


def test_a_crowd_nobody_greets_ends_where_greeted_sites_end(tmp_path: Path, bert: Path) -> None:
    config = federation(
        bert,
        federation={"seed": 8},
        sites={"min": 2, "share": 0.5},
        evaluation={"every": 0},
    )
    folder = sites(tmp_path / "sites", 4)
    settings = {"manifest": config.manifest(), "simulation-sites": str(folder)}
    asked: list[str] = []

    def grid() -> InProcessGrid:
        from intramural.client.app import app

        return InProcessGrid(
            app, 4, run_config=settings, before=lambda m: asked.append(m.metadata.message_type)
        )

    greeted = carried(tmp_path / "greeted", config, grid())
    assert asked.count("query") == 4
    asked.clear()
    crowd = carried(tmp_path / "crowd", config, grid(), lambda s: replace(s, crowd=4))
    assert asked == ["train"] * 4
    assert crowd["digest"] == greeted["digest"]
    cohorts = [[r["sites"] for r in report["rounds"]] for report in (crowd, greeted)]
    assert cohorts[0] == cohorts[1]
    assert len(set(map(tuple, cohorts[0]))) == 2  # both rounds' draws differ: the test can fail


def dealt(folder: Path, config: FederationConfig, *, count: int, partition: str = "iid") -> Deal:
    template = load_site(site(folder, "template", rows()))
    return Deal(
        federation=config,
        template=template,
        sites=count,
        partition=partition,
        folder=folder / "out",
    )


def test_many_sites_are_simulated_without_a_folder_each(tmp_path: Path, bert: Path) -> None:
    share = 3 / 1_000_000
    config = federation(bert, sites={"min": 3, "share": share}, evaluation={"every": 0})
    deal = dealt(tmp_path, config, count=1_000_000, partition="draw:20")
    report = simulate(Simulation(deal=deal, compare=COMPARISONS), watcher=Watcher())
    assert [len(record["sites"]) for record in report["rounds"]] == [3, 3]
    assert report["rounds"][0]["sites"] != report["rounds"][1]["sites"]
    assert report["sites"] == []
    assert set(report["final"]["local"]) == set()
    assert report["final"]["federated"]["examples"] == report["final"]["pooled"]["examples"]
    assert any("1,000,000 sites" in note for note in report["notes"])
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) < 40


def test_a_private_crowd_keeps_a_ledger_for_each_site_that_was_charged(
    tmp_path: Path, bert: Path
) -> None:
    config = federation(
        bert,
        sites={"min": 2, "share": 0.2},
        evaluation={"every": 0},
        privacy=PRIVACY,
        strategy={"weights": "equal"},
    )
    deal = dealt(tmp_path, config, count=10, partition="draw:20")
    report = simulate(Simulation(deal=deal, compare=frozenset()), watcher=Watcher())
    took_part = {name for record in report["rounds"] for name in record["sites"]}
    assert set(report["privacy"]) == took_part
    ledgers = (tmp_path / "out" / "sites" / "ledgers").glob("*.jsonl")
    assert {file.stem for file in ledgers} == took_part


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"count": 300}, "evaluation.every = 0"), ({"count": 300, "engine": "ray"}, "evaluation")],
)
def test_what_a_crowd_cannot_do_is_refused_before_anything_is_written(
    tmp_path: Path, bert: Path, changes: Json, match: str
) -> None:
    deal = dealt(tmp_path, federation(bert, sites={"min": 2}), count=changes["count"])
    with pytest.raises(ConfigError, match=match):
        simulate(Simulation(deal=deal), watcher=Watcher())
    assert not (tmp_path / "out").exists()


def test_auto_says_what_it_chose_and_charges_no_ledger(tmp_path: Path, bert: Path) -> None:
    config = federation(bert, sites={"min": 2}, privacy=PRIVACY, strategy={"weights": "equal"})
    deal = dealt(tmp_path, config, count=2)
    simulate(Simulation(deal=deal, compare=frozenset()), watcher=Watcher())
    ledgers = {p: p.read_bytes() for p in (tmp_path / "out").rglob("ledger*.jsonl")}
    assert len(ledgers) == 2
    # A tiny model's round of milliseconds cannot make up for the start of a worker.
    engine, why = choose(Work(deal=deal, engine="auto", workers=2))
    assert engine == "inprocess"
    assert "would not make up for" in why
    assert {p: p.read_bytes() for p in ledgers} == ledgers


@pytest.mark.parametrize(
    ("workers", "threads", "processors", "gpus"),
    [(1, 1, 4, ""), (None, 1, 1, ""), (None, 3, 5, ""), (None, 1, 4, "GPU-7")],
    ids=["asked for one", "bound to one processor", "two would not fit", "one GPU"],
)
def test_auto_takes_no_pool_of_one_worker(
    tmp_path: Path,
    bert: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int | None,
    threads: int,
    processors: int,
    gpus: str,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)), raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    deal = dealt(tmp_path, federation(bert, sites={"min": 2}), count=2)
    compute = deal.template.compute.model_copy(update={"threads": threads, "device": "auto"})
    deal = replace(deal, template=deal.template.model_copy(update={"compute": compute}))
    chosen = choose(Work(deal=deal, engine="auto", workers=workers))
    assert chosen == ("inprocess", "there is room for one worker, or one site a round")


def test_auto_tells_the_watcher(tmp_path: Path, bert: Path) -> None:
    lines: list[str] = []

    class Listening(Watcher):
        def noticed(self, line: str) -> None:
            lines.append(line)

    deal = dealt(tmp_path, federation(bert, sites={"min": 2}), count=2)
    simulate(Simulation(deal=deal, compare=frozenset()), watcher=Watcher())
    run_engine(Work(deal=deal, engine="auto"), watcher=Listening())
    assert lines[0].startswith("--engine inprocess: ")
