"""Whole runs that the coordinator's own records judge: run, simulation, order, and going on."""

import json
from pathlib import Path

import pytest
import tomli_w

from intramural.core.errors import ConfigError, Interrupted
from intramural.core.federation import FederationConfig
from intramural.core.journal import scan
from intramural.core.site import load_site
from intramural.server.folder import CoordinatorFolder
from intramural.server.founding import init_coordinator
from intramural.server.orders import place_order
from intramural.server.run import RunPlan, plan_from_config
from intramural.server.settings import Coordinator
from intramural.server.watcher import Watcher
from intramural.simulations.simulate import Simulation, simulate
from intramural.simulations.sites import Deal
from tests.rounds.runs import final, run
from tests.tiny import Json, federation, rows, site, sites, table

GATE = {"judge": "coordinator", "metric": "loss"}


def holdout(folder: Path, count: int = 30) -> Path:
    """Write the coordinator's own records; return their holdout.toml."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows()[:count]]
    (folder / "own.jsonl").write_text("".join(lines))
    data = {"path": "own.jsonl", "text": "title", "label": "chapter"}
    (folder / "holdout.toml").write_text(tomli_w.dumps({"data": data}))
    return folder / "holdout.toml"


def climbing(bert: Path) -> FederationConfig:
    """Return a federation whose steps are far too long, so that rounds make things worse."""
    return federation(
        bert,
        federation={"rounds": 4},
        sites={"min": 2},
        training={"learning_rate": 30.0},
        gate=GATE,
        evaluation={"every": 0},
    )


def losses(report: Json) -> list[float]:
    return [record["holdout"].get("loss", float("inf")) for record in report["rounds"]]


def test_rounds_that_make_the_coordinator_s_records_worse_are_undone(
    tmp_path: Path, bert: Path
) -> None:
    report = run(
        tmp_path / "run", climbing(bert), sites(tmp_path, 2), holdout=holdout(tmp_path / "own")
    )
    kept = float("inf")
    for record, loss in zip(report["rounds"], losses(report), strict=True):
        if record["round"] > 1 and loss > kept:
            assert record["rolled_back"]
        else:
            assert "rolled_back" not in record
            kept = loss
    assert any(record.get("rolled_back") for record in report["rounds"])


def test_a_run_goes_on_with_the_same_records_alone(tmp_path: Path, bert: Path) -> None:
    config, where = climbing(bert), sites(tmp_path / "sites", 2)
    whole = run(tmp_path / "whole", config, where, holdout=holdout(tmp_path / "own"))

    class Stop(Watcher):
        def committed(self, record: Json) -> None:
            if record["round"] == 2:
                raise Interrupted("stopped by the test")

    cut, own = tmp_path / "cut", tmp_path / "own" / "holdout.toml"
    with pytest.raises(Interrupted):
        run(cut, config, where, holdout=own, watcher=Stop())
    before = (cut / "journal.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"are not those that the run .* began with"):
        run(cut, config, where, holdout=holdout(tmp_path / "other", count=29), resume=True)
    assert (cut / "journal.jsonl").read_bytes() == before
    rest = run(cut, config, where, holdout=own, resume=True)
    assert rest["digest"] == whole["digest"]
    assert losses(rest) == losses(whole)
    assert final(cut).tobytes() == final(tmp_path / "whole").tobytes()
    started = scan(cut / "journal.jsonl").entries[0]
    assert started.body["judged_by"].startswith("sha256:")


@pytest.mark.parametrize("engine", ["inprocess", "pool"])
def test_a_simulation_is_judged_as_a_run_is(tmp_path: Path, bert: Path, engine: str) -> None:
    template = load_site(site(tmp_path, "template", rows()))
    deal = Deal(
        federation=climbing(bert),
        template=template,
        sites=2,
        partition="iid",
        folder=tmp_path / "out",
    )
    own = holdout(tmp_path / "own")
    plan = Simulation(deal=deal, engine=engine, compare=frozenset(), holdout=own)  # type: ignore[arg-type]
    report = simulate(plan, watcher=Watcher())
    assert any(record.get("rolled_back") for record in report["rounds"])
    with pytest.raises(ConfigError, match=r"holdout\.toml with --holdout"):
        simulate(Simulation(deal=deal, compare=frozenset()), watcher=Watcher())


def test_an_order_and_a_plan_carry_the_file_s_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, file, own = tmp_path / "coordinator", tmp_path / "federation.toml", tmp_path / "own"
    init_coordinator(home, Coordinator(name="tiny", host="127.0.0.1"))
    assert CoordinatorFolder(root=home).signing_key.is_file()
    file.write_text(tomli_w.dumps(table(Path("base"), gate=GATE)))
    whole = str(holdout(own).resolve())
    monkeypatch.chdir(own)
    named = Path("holdout.toml")
    order = place_order(home, file, name=None, models={}, holdout=named, passphrase=None)
    assert order.holdout == whole
    order.want(wanted=False)
    assert (order.holdout, order.standing) == (whole, "stopped")
    plan = RunPlan(federation=federation(Path("base"), gate=GATE), folder=tmp_path, holdout=named)
    assert plan_from_config(plan.to_config()).holdout == Path(whole)
    with pytest.raises(ConfigError, match=r"holdout\.toml with --holdout"):
        place_order(home, file, name=None, models={}, passphrase=None)
