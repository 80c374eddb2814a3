"""A sweep's results: the order of cells, seeds together, what tuning cost, table and page."""

import io
import json
import math
from pathlib import Path

import pytest
import tomli_w
from rich.console import Console

from intramural.privacy.ledger import Ledger
from intramural.privacy.told import told
from intramural.simulations.sweep import folder_of
from intramural.simulations.sweep_cli import print_sweep
from intramural.simulations.sweep_page import sweep_html
from intramural.simulations.sweep_privacy import tuning_cost
from intramural.simulations.sweep_report import EXACT_WORDS, sweep_report, validation_of
from tests.privacy.ledgers import charge
from tests.reference.pld import pld_epsilon
from tests.simulations.sweeps import RATES, Script, ran, sweep_of, write_report
from tests.tiny import Json

SEEDS = (
    '[sweep]\nkind = "grid"\n[parameters]\nexchange.rank = [2, 4]\nfederation.seed = [1, 2, 3]\n'
)
PRIVACY: Json = {
    "unit": "record",
    "noise_multiplier": 1.0,
    "delta": 1e-5,
    "clip_norm": 1.0,
    "nominal_records": 60,
}


def reported(folder: Path, text: str, scores: list[float | None], **sections: Json) -> Json:
    """Return the report of a sweep whose cells reached these scores; None: the cell fails."""
    config, cells = sweep_of(folder, text, **sections)
    failing = {n: [2] for n, score in enumerate(scores, start=1) if score is None}
    results, _ = ran(cells, folder / "out", Script(failing))
    for result, score in zip(results, scores, strict=True):
        if score is not None:
            write_report(result.folder, {"macro_f1": score, "loss": 1 - score})
    return sweep_report(config, results, folder=folder / "out")


def test_cells_are_in_order_of_the_validation_metric_and_failed_ones_last(tmp_path: Path) -> None:
    report = reported(tmp_path, RATES, [0.5, None, 0.7])
    assert [row["metric"] for row in report["cells"]] == [0.7, 0.5, None]
    assert report["best"]["parameters"] == {"training.learning_rate": 0.4}
    assert report["cells"][-1]["state"] == "failed"
    assert report["split"] == "validation"
    assert "No test record was looked at" in report["notes"][0]
    assert report["privacy"] is None
    assert report["groups"] == []


def test_a_loss_is_best_where_it_is_lowest(tmp_path: Path) -> None:
    text = RATES.replace('"grid"\n', '"grid"\nmetric = "loss"\n')
    report = reported(tmp_path, text, [0.5, 0.9, 0.7])
    assert [row["metric"] for row in report["cells"]] == pytest.approx([0.1, 0.3, 0.5])


def test_seeds_are_taken_together_and_the_best_mean_wins(tmp_path: Path) -> None:
    # rank 2: 0.9, 0.3, 0.3; rank 4: 0.6, 0.5, 0.7, in the grid's order
    report = reported(tmp_path, SEEDS, [0.9, 0.3, 0.3, 0.6, 0.5, 0.7])
    first, second = report["groups"]
    assert first["parameters"] == {"exchange.rank": 4}
    assert first["mean"] == pytest.approx(0.6)  # (0.6 + 0.5 + 0.7) / 3
    assert first["sd"] == pytest.approx(0.1)  # sqrt((0 + 0.01 + 0.01) / 2)
    assert second["mean"] == pytest.approx(0.5)  # (0.9 + 0.3 + 0.3) / 3
    assert second["sd"] == pytest.approx(math.sqrt(0.12))  # sqrt((0.16 + 0.04 + 0.04) / 2)
    assert report["best"]["metric"] == 0.7  # of rank 4, not the single 0.9


def test_one_seed_has_no_standard_deviation(tmp_path: Path) -> None:
    report = reported(tmp_path, SEEDS, [0.9, None, None, 0.6, None, None])
    assert [group["sd"] for group in report["groups"]] == [None, None]
    assert [group["measured"] for group in report["groups"]] == [1, 1]


def test_the_metric_is_that_of_the_last_round_on_validation_records() -> None:
    rounds = [{"metrics": {"macro_f1": 0.9}}, {"metrics": {"macro_f1": 0.4}}]
    final = {"federated": {"macro_f1": 0.99}}  # on test records
    assert validation_of({"rounds": rounds, "final": final}, "macro_f1") == 0.4
    assert validation_of({"rounds": [*rounds, {"metrics": {}}], "final": final}, "macro_f1") is None
    assert validation_of({"rounds": [], "final": final}, "macro_f1") is None


def ledger(cell: Path, site: str, *charges: Json) -> None:
    """Write a site of a cell, and its ledger."""
    folder = cell / "sites" / site
    folder.mkdir(parents=True)
    content = {"site": {"name": site}, "data": {"path": "records.jsonl", "text": "text"}}
    (folder / "site.toml").write_text(tomli_w.dumps(content))
    if charges:
        book = Ledger(folder / "ledger-records.jsonl", site=site, data="records")
        for number, changes in enumerate(charges, start=1):
            made = charge(
                **{"sample_rate": 0.1, "noise_multiplier": 3.0, "round": number} | changes
            )
            book.charge(made, epsilon_lifetime=None, delta=1e-5)


def test_tuning_costs_all_cells_together_each_at_its_dearest_site(tmp_path: Path) -> None:
    a, b = tmp_path / "001-a", tmp_path / "002-b"
    ledger(a, "site-1", {}, {"attempt": 2})  # a round tried again: 40 steps
    ledger(a, "site-2", {})
    ledger(b, "site-1", {"noise_multiplier": 5.0, "steps": 30, "delta": 1e-6})
    ledger(b, "site-2")  # never asked
    cost = tuning_cost({"a": a, "b": b}, best="b")
    assert cost is not None
    assert cost["delta"] == 1e-6  # the stricter of the two
    own = pld_epsilon((0.1, 5.0, 30), delta=1e-6)
    together = pld_epsilon((0.1, 3.0, 40), (0.1, 5.0, 30), delta=1e-6)
    assert cost["cells"]["a"] == pytest.approx(pld_epsilon((0.1, 3.0, 40), delta=1e-6), rel=1e-3)
    assert cost["cells"]["b"] == pytest.approx(own, rel=1e-3)
    assert cost["epsilon"] == pytest.approx(together, rel=1e-3)
    assert together > 1.5 * own
    assert "2 cells were trained on the same records" in cost["words"]
    assert f"epsilon {told(cost['epsilon'])} together" in cost["words"]
    assert "that is not what was spent" in cost["words"]
    assert "Tune on public records" in cost["words"]


def test_a_seeded_charge_claims_nothing(tmp_path: Path) -> None:
    a, b = tmp_path / "001-a", tmp_path / "002-b"
    ledger(a, "site-1", {})
    ledger(b, "site-1", {"is_private": False})
    cost = tuning_cost({"a": a, "b": b}, best="a")
    assert cost is not None
    assert (cost["epsilon"], cost["cells"]) == (None, {"a": None, "b": None})
    assert cost["words"].startswith("NOT PRIVATE")


def test_nothing_charged_costs_nothing(tmp_path: Path) -> None:
    ledger(tmp_path / "001-a", "site-1")
    assert tuning_cost({"a": tmp_path / "001-a"}, best=None) is None


def test_failed_cells_and_cells_of_an_older_sweep_are_paid_for_too(tmp_path: Path) -> None:
    sections: dict[str, Json] = {"privacy": PRIVACY, "strategy": {"weights": "equal"}}
    config, cells = sweep_of(tmp_path, RATES, **sections)
    out = tmp_path / "out"
    results, _ = ran(cells, out, Script({2: [3]}))
    for cell in cells:
        ledger(folder_of(cell, out), "site-1", {})
    ledger(out / "cells" / "009-older", "site-1", {})
    report = sweep_report(
        config, results, folder=out, measure=lambda *_: pytest.fail("the sites told it")
    )
    expected = pld_epsilon((0.1, 3.0, 4 * 20), delta=1e-5)
    assert report["privacy"]["epsilon"] == pytest.approx(expected, rel=1e-3)
    assert EXACT_WORDS not in report["notes"]


def test_a_metric_that_sites_do_not_send_is_measured_and_said_to_be_outside_the_claim(
    tmp_path: Path,
) -> None:
    sections: dict[str, Json] = {"privacy": PRIVACY, "strategy": {"weights": "equal"}}
    config, cells = sweep_of(tmp_path, RATES, **sections)
    results, _ = ran(cells, tmp_path / "out", Script())
    for result in results:
        write_report(result.folder, {})
    report = sweep_report(
        config, results, folder=tmp_path / "out", measure=lambda *_: {"macro_f1": 0.25}
    )
    assert {row["measured_by"] for row in report["cells"]} == {"simulator"}
    assert EXACT_WORDS in report["notes"]


def test_the_page_is_self_contained_and_draws_each_parameter_that_varies(tmp_path: Path) -> None:
    text = RATES + 'exchange.rank = [2]\n[simulation]\npartition = ["iid", "size:1"]\n'
    report = reported(tmp_path, text, [0.5, 0.4, None, 0.6, 0.7, 0.3])
    report["name"] = "<script>"
    json.dumps(report)
    page = sweep_html(report)
    assert page.count("<svg") == 1  # two panels: rank does not vary
    assert "training.learning_rate" in page
    assert "size:1" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "<script>" not in page
    console = Console(width=140, record=True, file=io.StringIO())
    print_sweep(report, console)
    assert "The highest macro_f1 on validation records is 0.700" in console.export_text()


def test_a_sweep_without_a_result_still_says_so(tmp_path: Path) -> None:
    report = reported(tmp_path, RATES, [None, None, None])
    assert report["best"] is None
    assert "No cell of 3 has a result" in sweep_html(report)
