"""Simulations of what sites keep and train for themselves: ranks, personal models, comparisons."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from intramural.core.config import check_config
from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.journal import scan
from intramural.core.layout import Vector
from intramural.core.site import SiteConfig
from intramural.models.exchange import Exchange
from intramural.server.checkpoint import load_checkpoint
from intramural.server.run import run_id
from intramural.server.watcher import Watcher
from intramural.simulations.cli import _ranks
from intramural.simulations.comparison import plain_form
from intramural.simulations.comparison import test_results as measured
from intramural.simulations.simulate import Simulation, simulate
from intramural.simulations.sites import Deal, deal
from tests.tiny import CSV, Json, federation

PRIVACY: Json = {
    "unit": "record",
    "noise_multiplier": 2.0,
    "delta": 1e-5,
    "clip_norm": 1.0,
    "nominal_records": 60,
}


def deal_of(config: FederationConfig, folder: Path, **how: Any) -> Deal:
    policy: Json = {"require_privacy": False, "exchange": ["lora"]}
    table: Json = {
        "site": {"name": "template"},
        "data": {"path": str(CSV), "text": "title", "label": "chapter"},
        "policy": policy,
        "compute": {"device": "cpu", "threads": 1},
    }
    template = check_config(table, SiteConfig, source="test")
    options: dict[str, Any] = {"sites": 3, "partition": "iid"} | how
    return Deal(federation=config, template=template, folder=folder, **options)


def test_ranks_are_dealt_in_turn_and_all_records_have_the_whole_one(tmp_path: Path) -> None:
    config = federation(Path("x"), exchange={"rank": 8, "rank_min": 2})
    dealt = deal(deal_of(config, tmp_path, sites=5, ranks=(2, 8)))
    found = [tomllib.loads(file.read_text())["compute"].get("rank") for file in dealt.files]
    assert found == [2, 8, 2, 8, 2]
    assert "rank" not in tomllib.loads(dealt.pooled.read_text())["compute"]


@pytest.mark.parametrize(
    ("exchange", "how", "said"),
    [
        ({"rank": 8, "rank_min": 2}, {"ranks": (1, 4)}, "--ranks: 1 is not from"),
        ({"rank": 8, "rank_min": 2}, {"ranks": (9,)}, "--ranks: 9"),
        ({"rank": 8}, {"ranks": (4,)}, "exchange.rank_min"),
        ({"kind": "head"}, {"ranks": (8,)}, "of an adapter"),
        ({"rank": 8}, {"ranks": (8,), "sites": 300}, "at most 200 sites"),
    ],
)
def test_ranks_that_no_site_could_train_are_refused(
    tmp_path: Path, exchange: Json, how: Json, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        deal_of(federation(Path("x"), exchange=exchange), tmp_path, **how)


def test_the_option_takes_whole_numbers() -> None:
    assert (_ranks(None), _ranks("4, 8,16")) == ((), (4, 8, 16))
    for text in ("4,x", "", "-1", "2.5"):
        with pytest.raises(ConfigError, match="no list of whole numbers"):
            _ranks(text)


def test_comparisons_train_one_whole_model_by_plain_steps() -> None:
    config = federation(
        Path("x"),
        exchange={"rank": 8, "rank_min": 2, "personal": ["classifier"]},
        strategy={"rule": "flora"},
        training={"proximal": 0.5},
    )
    assert plain_form(config).to_json() == federation(Path("x"), exchange={"rank": 8}).to_json()


def test_a_run_of_mixed_ranks_and_one_of_own_models_are_compared_and_told(
    tmp_path: Path, bert: Path
) -> None:
    mixed = federation(
        bert, exchange={"rank": 4, "rank_min": 1}, strategy={"rule": "flora"}, sites={"min": 3}
    )
    report = simulate(
        Simulation(deal=deal_of(mixed, tmp_path / "mixed", ranks=(1, 2, 4))), watcher=Watcher()
    )
    assert [entry["sites"] for entry in report["rounds"]] == [["site-1", "site-2", "site-3"]] * 2
    assert report["final"]["pooled"]
    assert len(report["final"]["local"]) == 3
    assert "personal" not in report["final"]
    own = federation(bert, personal={"kind": "ditto", "steps": 2}, sites={"min": 3})
    run = Simulation(
        deal=deal_of(own, tmp_path / "own"), compare=frozenset({"local"}), engine="inprocess"
    )
    report = simulate(run, watcher=Watcher())
    assert sorted(report["final"]["personal"]) == ["site-1", "site-2", "site-3"]
    page = (tmp_path / "own" / "report.html").read_text()
    assert "own model reaches macro-F1" in page
    kept = list((tmp_path / "own" / "sites").glob("*/memory/*/*/*.safetensors"))
    assert len(kept) == 3 * 2  # two rounds of each site, and nothing of the comparisons


def test_personal_parts_under_privacy_are_tested_as_the_sites_kept_them(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the simulator measures by a form without [privacy], whose manifest is another
    config = federation(
        bert,
        exchange={"personal": ["classifier"]},
        privacy=PRIVACY,
        strategy={"weights": "equal"},
        sites={"min": 3},
    )
    found = []
    real = Exchange.write

    def noted(self: Exchange, vector: Vector, own: Vector | None = None) -> None:
        found.append(own)
        real(self, vector, own)

    run = Simulation(deal=deal_of(config, tmp_path / "out"), compare=frozenset())
    simulate(run, watcher=Watcher())
    checkpoint, _ = load_checkpoint(tmp_path / "out" / "checkpoints")
    assert checkpoint is not None
    files = sorted((tmp_path / "out" / "sites").glob("*/site.toml"))
    name = run_id(scan(tmp_path / "out" / "journal.jsonl").entries)
    monkeypatch.setattr(Exchange, "write", noted)
    measured(config, files, checkpoint.vector, run=name)
    kept = [load_file(next(f.parent.glob("memory/*/*/2.safetensors")))["own"] for f in files]
    assert [None if own is None else own.tobytes() for own in found] == [k.tobytes() for k in kept]


def test_own_models_under_privacy_are_refused_before_anything_is_written(
    tmp_path: Path, bert: Path
) -> None:
    config = federation(
        bert,
        personal={"kind": "ditto", "steps": 2},
        privacy=PRIVACY,
        strategy={"weights": "equal"},
    )
    with pytest.raises(ConfigError, match=r"remove \[personal\]"):
        simulate(Simulation(deal=deal_of(config, tmp_path / "out")), watcher=Watcher())
    assert not (tmp_path / "out").exists()
