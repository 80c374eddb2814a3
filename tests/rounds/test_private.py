"""Federations under [privacy], end to end: what they claim, what they say, what repeats."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from intramural.core.errors import RoundRefused
from intramural.core.federation import FederationConfig
from intramural.core.journal import scan
from intramural.core.site import load_site
from intramural.privacy.ledger import Ledger
from intramural.server.watcher import Watcher
from intramural.simulations.simulate import Simulation, simulate
from intramural.simulations.sites import Deal
from tests.reference.pld import pld_epsilon
from tests.rounds.runs import final
from tests.rounds.test_crash import stop_in
from tests.tiny import Json, Row, federation, generation, rows, site, table

DELTA = 1e-5
PRIVACY: Json = {
    "unit": "record",
    "noise_multiplier": 1.0,
    "delta": DELTA,
    "clip_norm": 1.0,
    "nominal_records": 60,
}
SECTIONS: dict[str, Json] = {"sites": {"min": 2}, "strategy": {"weights": "equal"}}
SITES = ("site-1", "site-2")
SEEDED: Json = {"not_private_seed": 5}


def private(base: Path, *, privacy: Json | None = None, **sections: Json) -> FederationConfig:
    """Return a federation whose rounds are two steps of 8 of 60 nominal records."""
    told = PRIVACY | (privacy or {})
    content = SECTIONS | {"privacy": {k: v for k, v in told.items() if v is not None}}
    return federation(base, **(content | sections))


def template(folder: Path, *, records: list[Row] | None = None, **sections: Any) -> Path:
    """Write the site that others are dealt like; its policy asks for privacy."""
    policy = {"require_privacy": True} | sections.pop("policy", {})
    if not (folder / "template").exists():
        site(folder, "template", records or rows(), policy=policy, **sections)
    return folder / "template" / "site.toml"


def simulated(
    folder: Path,
    config: FederationConfig,
    *,
    out: str = "out",
    ledgers: Path | None = None,
    resume: bool = False,
    **sections: Any,
) -> Json:
    deal = Deal(
        federation=config,
        template=load_site(template(folder, **sections)),
        sites=2,
        partition="iid",
        folder=folder / out,
        ledgers=ledgers,
    )
    plan = Simulation(deal=deal, compare=frozenset(), resume=resume)
    return simulate(plan, watcher=Watcher())


def ledger_of(folder: Path, name: str) -> Ledger:
    config = load_site(folder / "out" / "sites" / name / "site.toml")
    return Ledger(config.ledger_file, site=name, data=config.data_name)


def test_the_statement_is_what_dp_accounting_says_of_the_plan(tmp_path: Path, bert: Path) -> None:
    report = simulated(tmp_path, private(bert))
    # two rounds of two steps, each record drawn with 8/60
    expected = pld_epsilon((8 / 60, 1.0, 4), delta=DELTA)
    statements = json.loads((tmp_path / "out" / "privacy.json").read_text())
    assert statements == report["privacy"]
    assert tuple(statements) == SITES
    for name, told in statements.items():
        assert told["epsilon"] == pytest.approx(expected, rel=1e-4)
        assert told["epsilon_of_this_run"] == told["epsilon"]
        terms = (told["delta"], told["unit"], told["relation"], told["sampler"])
        assert terms == (DELTA, "record", "add-remove", "poisson")
        assert (told["private"], told["steps"], told["sample_rate"]) == (True, 4, 8 / 60)
        assert told["ledger_head"] == ledger_of(tmp_path, name).head
    text = (tmp_path / "out" / "privacy.md").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"- epsilon: {statements['site-1']['epsilon']}" in text
    assert "one record, add-remove, poisson sampling" in page
    assert "NOT PRIVATE" not in text + page


def test_what_the_coordinator_hears_holds_no_loss_metric_or_count(
    tmp_path: Path, bert: Path
) -> None:
    report = simulated(tmp_path, private(bert))
    for number, record in enumerate(report["rounds"], start=1):
        # opened, then a charge and its settlement a round
        length = 1 + 2 * number
        ledgers = record.pop("ledgers")
        assert {site: told["entries"] for site, told in ledgers.items()} == dict.fromkeys(
            SITES, length
        )
        assert not any(told["seeded"] for told in ledgers.values())
        assert (record.pop("metrics"), record.pop("train_loss")) == ({}, None)
        assert set(record) == {
            "round", "sites", "bytes_up", "bytes_down", "seconds", "refusals",
            "aggregation_error",  # of noised updates: post-processing
        }  # fmt: skip
    # a site's reply has one size, whatever its records
    assert len({record["bytes_up"] for record in report["rounds"]}) == 1
    assert any("measured by the simulator" in note for note in report["notes"])
    assert report["final"]["federated"]["examples"] > 0


def test_a_tests_seed_repeats_the_run_and_takes_the_claim_away(tmp_path: Path, bert: Path) -> None:
    reports = [simulated(tmp_path / name, private(bert), policy=SEEDED) for name in ("one", "two")]
    assert reports[0]["digest"] == reports[1]["digest"]
    for told in reports[0]["privacy"].values():
        assert (told["private"], told["epsilon"]) == (False, None)
    for name in ("privacy.md", "report.html"):
        assert "NOT PRIVATE" in (tmp_path / "one" / "out" / name).read_text()
    secret = simulated(tmp_path / "three", private(bert))
    assert secret["digest"] != reports[0]["digest"]


def test_a_killed_run_ends_at_the_same_bits_and_charges_what_it_tried(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sections = SECTIONS | {"federation": {"rounds": 3}, "training": {"local_steps": 30}}
    config = private(bert, **sections)
    whole = simulated(tmp_path / "whole", config, policy=SEEDED)
    broken = tmp_path / "broken"  # the folder that `stop_in` looks into
    (tmp_path / "federation.toml").write_text(
        tomli_w.dumps(table(bert, **sections, privacy=PRIVACY))
    )
    words = [sys.executable, "-m", "intramural", "simulate", str(tmp_path / "federation.toml")]
    words += ["--data", str(template(tmp_path, policy=SEEDED)), "--sites", "2"]
    words += ["--compare", "none", "--threads", "1", "--out", str(broken)]
    code, _ = stop_in(tmp_path, 2, signal.SIGKILL, words)
    assert code == -signal.SIGKILL
    resumed = simulated(tmp_path, config, out="broken", resume=True)
    assert resumed["digest"] == whole["digest"]
    kinds = [entry.kind for entry in scan(broken / "journal.jsonl").entries]
    assert kinds.count("resumed") == 1
    for name in SITES:
        charges = Ledger(
            broken / "sites" / name / "ledger-records.jsonl", site=name, data="records"
        ).charges
        assert {charge.round for charge in charges} == {1, 2, 3}
        assert resumed["privacy"][name]["steps"] == 30 * len(charges) >= 90


def test_runs_that_share_ledgers_add_up_until_the_lifetime_is_spent(
    tmp_path: Path, bert: Path
) -> None:
    one_run, two_runs = (pld_epsilon((8 / 60, 1.0, steps), delta=DELTA) for steps in (4, 8))
    policy = {"epsilon_lifetime": 1.02 * two_runs, "delta_lifetime": DELTA}
    ledgers = tmp_path / "ledgers"
    told = []
    for number in (1, 2):
        config = private(bert, federation={"name": f"run-{number}"})
        report = simulated(tmp_path, config, out=f"{number}", ledgers=ledgers, policy=policy)
        told.append(report["privacy"]["site-1"])
    first, second = (statement["epsilon"] for statement in told)
    assert first == pytest.approx(one_run, rel=1e-4)
    assert second == pytest.approx(two_runs, rel=1e-4)
    assert first < second < 2 * first
    assert told[1]["epsilon_of_this_run"] == pytest.approx(one_run, rel=1e-4)
    assert told[1]["runs"] == 2

    spent = {file.name: file.read_bytes() for file in ledgers.glob("*.jsonl")}
    third = private(bert, federation={"name": "run-3"})
    with pytest.raises(RoundRefused, match="the data set's privacy budget is exhausted"):
        simulated(tmp_path, third, out="3", ledgers=ledgers, policy=policy)
    assert {file.name: file.read_bytes() for file in ledgers.glob("*.jsonl")} == spent
    assert not (tmp_path / "3" / "report.json").exists()


@pytest.mark.parametrize(
    ("unit", "kind", "engine"),
    [
        ("record", "lora", "bookkeeping"),
        ("person", "head", "opacus"),
    ],
)
def test_the_size_of_parts_changes_no_result(
    tmp_path: Path, bert: Path, unit: str, kind: str, engine: str
) -> None:
    ends = []
    privacy: Json = {"nominal_records": 20, "unit": unit, "engine": engine}
    if unit == "person":
        privacy |= {"nominal_persons": 20, "records_per_person": 3}
    records = [row | {"person": f"p{n // 3}"} for n, row in enumerate(rows())]
    for size in (1, 8, 32):
        sections: Json = {
            "compute": {"device": "cpu", "threads": 1, "micro_batch": size},
            "policy": SEEDED | {"exchange": ["lora", "full", "head"]},
            "data": {"person": "person"},
        }
        folder = tmp_path / str(size)
        # about 24 of 60 records a step
        config = private(
            bert, privacy=privacy, exchange={"kind": kind}, training={"local_steps": 2}
        )
        simulated(folder, config, records=records, **sections)
        ends.append(final(folder / "out"))
    assert np.abs(ends[0]).max() > 1e-3
    for other in ends[1:]:
        np.testing.assert_allclose(other, ends[0], rtol=0, atol=1e-6)


def test_noised_metrics_appear_each_round_and_are_within_the_budget(
    tmp_path: Path, bert: Path
) -> None:
    privacy: Json = {"noise_multiplier": None, "epsilon": 8.0, "metrics_noise": 3.0}
    report = simulated(tmp_path, private(bert, privacy=privacy))
    for record in report["rounds"]:
        assert set(record["metrics"]) == {"accuracy", "examples"}
        assert 0 <= record["metrics"]["accuracy"] <= 1
    ledger = ledger_of(tmp_path, "site-1")
    purposes = [charge.purpose for charge in ledger.charges]
    # each round trains and is evaluated; the end is tested
    assert purposes == ["train", "metrics", "train", "metrics", "metrics"]
    noise = ledger.charges[0].noise_multiplier
    expected = pld_epsilon((8 / 60, noise, 4), (1.0, 3.0, 3), delta=DELTA)
    told = report["privacy"]["site-1"]["epsilon"]
    assert told == pytest.approx(expected, rel=1e-4)
    assert 7.9 < told <= 8.0
    assert pld_epsilon((8 / 60, noise, 4), delta=DELTA) < told


def test_a_generation_by_persons_is_measured_and_charged(tmp_path: Path, llama: Path) -> None:
    privacy = PRIVACY | {"unit": "person", "nominal_persons": 60, "records_per_person": 2}
    privacy["noise_multiplier"] = 5.0  # much noise is little to compose
    sections = SECTIONS | {"federation": {"rounds": 1}, "training": {"local_steps": 1}}
    config = generation(llama, privacy=privacy | {"metrics_noise": 20.0}, **sections)
    records = [row | {"person": f"p{n // 3}"} for n, row in enumerate(rows()[:90])]
    columns: Json = {"person": "person", "text": "code", "response": "title"}
    report = simulated(tmp_path, config, records=records, data=columns)
    (record,) = report["rounds"]
    assert set(record["metrics"]) == {"example_accuracy", "examples"}
    charges = ledger_of(tmp_path, "site-1").charges
    assert [charge.purpose for charge in charges] == ["train", "metrics", "metrics"]
    expected = pld_epsilon((8 / 60, 5.0, 1), (1.0, 20.0, 2), delta=DELTA)
    told = report["privacy"]["site-1"]
    assert (told["unit"], told["epsilon"]) == ("person", pytest.approx(expected, rel=1e-4))
    # what the simulator measures itself is exact, of all records
    assert 0 <= report["final"]["federated"]["example_accuracy"] <= 1
