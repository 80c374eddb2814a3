"""Runs under a scenario, whole: real agents, a tiny model, the report, and a resume."""

import json
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from typer.testing import CliRunner

from intramural.__main__ import app as commands
from intramural.client.app import app
from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.site import load_site
from intramural.server.report_html import render_html
from intramural.server.run import RunPlan, run_federation
from intramural.server.watcher import Watcher
from intramural.simulations.inprocess import InProcessGrid
from intramural.simulations.scenario import Scenario, load_scenario, shipped_scenarios
from intramural.simulations.scenario_report import scenario_section
from intramural.simulations.scenario_run import run_scenario
from intramural.simulations.simulate import Simulation, simulate
from intramural.simulations.sites import Deal
from tests.simulations.plays import scenario
from tests.tiny import Json, federation, rows, site, sites, table

SITES = 4


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of four sites, whose agents all runs of this module share."""
    return sites(tmp_path_factory.mktemp("scenario") / "sites", SITES)


def tiny(bert: Path) -> FederationConfig:
    return federation(bert, sites={"min": 2, "quorum": 0.5})


def run(
    folder: Path, config: FederationConfig, places: Path, scene: Scenario | None, **more: Any
) -> Json:
    """Run a federation, under a scenario if one is named, and return the report it left."""
    settings = {"manifest": config.manifest(), "simulation-sites": str(places)}
    grid = InProcessGrid(app, SITES, run_config=settings, **more)
    plan = RunPlan(federation=config, folder=folder, resume=True, patience_s=0.0)
    if scene is None:
        return run_federation(plan, grid)
    run_scenario(plan, grid, scene, watcher=Watcher())
    report: Json = json.loads((folder / "report.json").read_text())
    return report


@pytest.fixture(scope="module")
def plain(bert: Path, places: Path, tmp_path_factory: pytest.TempPathFactory) -> Json:
    """Return the report of the federation without a scenario."""
    return run(tmp_path_factory.mktemp("plain"), tiny(bert), places, None)


@pytest.mark.parametrize("name", shipped_scenarios())
def test_every_scenario_runs_to_its_end(
    tmp_path: Path, bert: Path, places: Path, plain: Json, name: str
) -> None:
    report = run(tmp_path, tiny(bert), places, load_scenario(name))
    assert len(report["rounds"]) == 2
    assert report["final"]["federated"]["examples"] > 0
    assert report["simulated_seconds"] >= sum(r["simulated_seconds"] for r in report["rounds"]) > 0
    assert sum(report["scenario"]["groups"].values()) == SITES
    assert f"(scenario {name})" in report["scenario"]["sentence"]
    if name == "calm":
        assert report["digest"] == plain["digest"]
        assert report["final"] == plain["final"]
        # each round: train 60 s, evaluate 5 s, four crossings; before: a greeting; after: a test
        assert report["simulated_seconds"] == pytest.approx(2 * 65 + 5, abs=0.1)
    if name == "crashing-sites":
        assert report["scenario"]["crashes"] > 0
        assert report["digest"] == plain["digest"]  # who crashed was asked again
    if name == "hostile-minority":
        assert report["scenario"]["hostile"] == 2
        assert report["digest"] != plain["digest"]
    if name == "colluding-sites":
        assert report["scenario"]["hostile"] == 2 * 2  # two sites, two rounds
        assert report["digest"] != plain["digest"]


class Killed(BaseException):
    """The process dies."""


def test_a_resumed_runs_clock_goes_on(tmp_path: Path, bert: Path, places: Path) -> None:
    def die_in_round_2(message: Message) -> None:
        if '"round":2' in str(message.content["intramural"]["header"]):
            raise Killed

    config, scene = tiny(bert), scenario({"latency_s": 1.0}, train_s=60.0, evaluate_s=5.0)
    whole = run(tmp_path / "whole", config, places, scene)
    with pytest.raises(Killed):
        run(tmp_path / "killed", config, places, scene, before=die_in_round_2)
    resumed = run(tmp_path / "killed", config, places, scene)
    assert resumed["digest"] == whole["digest"]
    ends = [[r["scenario"]["at_s"] for r in report["rounds"]] for report in (whole, resumed)]
    round_s, greeting_s = 62 + 7, 2  # two crossings each
    assert ends[0] == [greeting_s + round_s, greeting_s + 2 * round_s]
    assert ends[1] == [ends[0][0], ends[0][1] + greeting_s]  # who resumes greets anew
    assert resumed["simulated_seconds"] == ends[1][1] + 7


def test_a_simulation_tells_of_its_scenario(tmp_path: Path, bert: Path) -> None:
    template = load_site(site(tmp_path, "template", rows()))
    config = federation(bert, sites={"min": 2})
    deal = Deal(
        federation=config,
        template=template,
        sites=3,
        partition="iid",
        folder=tmp_path / "out",
    )
    scene = scenario({"latency_s": 1.0}, train_s=1000.0, evaluate_s=100.0)
    plan = Simulation(deal=deal, compare=frozenset(), scenario=scene)
    report = simulate(plan, watcher=Watcher())
    sentence = report["scenario"]["sentence"]
    # greeting 2 s; twice 1002 and 102 s; the test 102 s; that is 2312 s
    assert "would take 38 min 32 s, 1 min 44 s of it outside the rounds" in sentence
    assert sentence in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(ConfigError, match="holds another simulation"):
        simulate(Simulation(deal=deal, compare=frozenset(), resume=True), watcher=Watcher())
    with pytest.raises(ConfigError, match="--engine ray"):
        simulate(Simulation(deal=deal, scenario=scene, engine="ray"), watcher=Watcher())


def test_the_command_plays_a_scenario_by_name(tmp_path: Path, bert: Path) -> None:
    import tomli_w

    data = site(tmp_path, "template", rows())
    file = tmp_path / "federation.toml"
    file.write_text(tomli_w.dumps(table(bert, federation={"rounds": 1})))
    words = ["simulate", str(file), "--data", str(data), "--sites", "2", "--compare", "none"]
    words += ["--out", str(tmp_path / "out"), "--scenario"]
    done = CliRunner().invoke(commands, [*words, "hospitals-on-vpn"])
    assert done.exit_code == 0, done.output
    told = " ".join(done.output.split())
    assert "On these links this federation would take" in told
    mark = json.loads((tmp_path / "out" / "simulation.json").read_text())
    assert mark["partition"] == "dirichlet:0.3"  # the scenario's
    wrong = CliRunner().invoke(commands, [*words, "nowhere"])
    assert isinstance(wrong.exception, ConfigError)


def test_the_sentence_tells_all_that_happened() -> None:
    quiet = {"at_s": 0.0, "unavailable": 0, "drop_outs": 0, "crashes": 0, "left": 0, "expired": 0}
    quiet["hostile"] = 0
    rounds = [
        {"simulated_seconds": 3600.0, "refusals": {"stale": 2}, "scenario": quiet | {"crashes": 2}},
        {
            "simulated_seconds": 7200.0,
            "refusals": {},
            "scenario": quiet | {"drop_outs": 1, "hostile": 1, "unavailable": 3, "left": 1},
        },
    ]
    section = scenario_section(scenario(), rounds, simulated_s=10_800.0, groups={"group-0": 3})
    assert section["scenario"]["sentence"] == (
        "On these links this federation would take 3 h 00 min (scenario play); "
        "1 training request without any answer, 2 crashes over training, "
        "1 request to a site that was cut off over it, 2 replies after the round had closed, "
        "1 hostile update delivered, 3 absences at the beginning of a round."
    )
    calm = scenario_section(
        scenario(),
        [{"simulated_seconds": 60.0, "refusals": {}, "scenario": quiet}],
        simulated_s=7260.0,
        groups={"group-0": 3},
    )
    assert calm["scenario"]["sentence"] == (
        "On these links this federation would take 2 h 01 min, 2 h 00 min of it outside the "
        "rounds (scenario play); nothing went wrong."
    )
    assert calm["scenario"]["sentence"] in render_html(calm)
    assert "scenario" not in render_html({})


@pytest.mark.parametrize(
    ("sites", "sections", "told"),
    [
        (2, {}, "takes two sites, and of 2 it has 1"),
        (5, {"asynchrony": {"buffer": 1}}, r"with \[asynchrony\] these do not come together"),
    ],
)
def test_attacks_that_cannot_be_are_refused_before_anything_is_written(
    tmp_path: Path, sites: int, sections: Json, told: str
) -> None:
    template = load_site(site(tmp_path, "template", rows()))
    deal = Deal(
        federation=federation(Path("nowhere"), sites={"min": 2}, **sections),
        template=template,
        sites=sites,
        partition="iid",
        folder=tmp_path / "out",
    )
    plan = Simulation(deal=deal, scenario=load_scenario("colluding-sites"))
    with pytest.raises(ConfigError, match=told):
        simulate(plan, watcher=Watcher())
    assert not (tmp_path / "out").exists()
