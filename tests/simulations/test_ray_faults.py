"""On Flower's Ray backend a crash and a slow site change the result as in one process."""

import json
from pathlib import Path

import pytest

from intramural.server.watcher import Watcher
from intramural.simulations.inprocess import InProcessGrid
from intramural.simulations.ray_engine import run_on_ray
from tests.simulations.faulty_app import app as faulty_app
from tests.simulations.test_engines import carried, config_of
from tests.tiny import Json, rows, site

pytest.importorskip("ray")
CHANGED_APP = Path(__file__).with_name("ray_faults")


@pytest.mark.slow
@pytest.mark.parametrize("private", [False, True])
def test_one_crashing_and_one_slow_site_change_the_result_alike_on_ray(
    tmp_path: Path, bert: Path, private: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(bert, private=private)
    policy: Json = {"require_privacy": False} | ({"not_private_seed": 5} if private else {})
    reports = []
    for name in ("alone", "ray"):
        folder = tmp_path / name / "sites"
        for number in range(3):
            site(folder, f"site-{number + 1}", rows()[number::3], policy=policy)
        settings: Json = {"manifest": config.manifest(), "simulation-sites": str(folder)}
        if name == "alone":
            grid = InProcessGrid(faulty_app, 3, run_config=settings)
            reports.append(carried(tmp_path / name, config, grid))
            continue
        monkeypatch.setenv("PYTHONPATH", str(CHANGED_APP))
        out = tmp_path / name / "out"
        settings |= {"out": str(out), "patience-s": 0.0, "durable": False}
        run_on_ray(settings, nodes=3, threads=1, folder=out, watcher=Watcher())
        reports.append(json.loads((out / "report.json").read_text()))
    assert reports[0]["digest"] == reports[1]["digest"]
    for report in reports:
        assert [len(r["sites"]) for r in report["rounds"]] == [2, 3]
        assert [sum(r["refusals"].values()) for r in report["rounds"]] == [1, 0]
