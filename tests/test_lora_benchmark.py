"""benchmarks/lora_rules.py: which cells it has, what it keeps of a run, its means and its notes."""

import argparse
import io
import math

import pytest
from rich.console import Console
from rich.table import Table

from benchmarks.lora_rules import wanted
from benchmarks.lora_rules_cells import (
    RATE,
    RATES,
    RULES,
    Cell,
    cells,
    federation_of,
    figures_of,
    search_cells,
)
from benchmarks.lora_rules_table import Row, found_of, mean_sd, notes_of, rates_of, table_of
from intramural.strategies.catalogue import KINDS
from tests.tiny import Json

FIGURES: Json = {
    "accuracy": 0.5,
    "macro_f1": 0.4,
    "commonest": 0.2,
    "error_median": 1e-8,
    "error_max": 1e-7,
    "bytes_up": 2_000_000,
    "bytes_down": 3_000_000,
    "seconds": 60.0,
}


def cell(rule: str = "ffa-lora", *, seed: int = 7, rate: float | None = None) -> Cell:
    return Cell(part="core", rule=rule, partition="iid", epsilon=None, seed=seed, rate=rate)


def row(of: Cell, **changes: object) -> Row:
    return {"cell": of.key} | FIGURES | changes


def text_of(table: Table) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_every_rule_meets_every_setting_with_every_seed() -> None:
    every = list(cells({}))
    # 8 rules x 2 splits x 2 epsilons x 3 seeds; 2 rules x 3 seeds; 8 rules x {3, 30} sites
    assert len(every) == 96 + 6 + 16
    assert len(found_of(row(one) for one in every)) == 118
    assert set(RULES) == {"fedavg"} | {name for name in KINDS if name.endswith(("lora", "svd"))} | {
        "flora"
    }
    mixed = {one.rule for one in every if one.ranks}
    assert mixed == {name for name in RULES if KINDS[name].traits.mixed_ranks}


def test_every_cell_is_a_federation_of_the_same_scale() -> None:
    for one in cells({}):
        federation = federation_of(one)
        assert federation.exchange.alpha / federation.exchange.rank == 2.0
        assert (federation.privacy is None) == (one.epsilon is None)
        assert federation.training.learning_rate == (8e-3 if one.epsilon is None else 5.0)


def test_a_cell_at_the_usual_rate_is_the_cell_that_names_none() -> None:
    usual: Json = {
        "part": "core",
        "rule": "ffa-lora",
        "partition": "iid",
        "epsilon": None,
        "sites": 10,
        "ranks": [],
        "seed": 7,
    }
    assert cell().key == cell(rate=RATE).key == usual
    assert cell(rate=0.5).key == usual | {"rate": 0.5}


def test_a_tuned_rate_is_for_cells_without_privacy() -> None:
    tuned = [one for one in cells({"rolora": 0.5}) if one.rate is not None]
    assert {one.rule for one in tuned} == {"rolora"}
    assert all(one.epsilon is None for one in tuned)
    assert len(tuned) == 2 * 3 + 2  # splits by seeds, and two other numbers of sites
    assert federation_of(tuned[0]).training.learning_rate == 0.5


def searched(rule: str, *scores: float | None) -> list[Row]:
    own = [one for one in search_cells() if one.rule == rule]
    return [{"cell": c.key, "validation_accuracy": s} for c, s in zip(own, scores, strict=False)]


def test_the_search_tries_the_same_rates_for_every_rule() -> None:
    tried = {rule: [one.rate for one in search_cells() if one.rule == rule] for rule in RULES}
    assert all(rates == list(RATES) for rates in tried.values())


def test_the_best_validation_accuracy_chooses_the_rate() -> None:
    rows = searched("fedavg", 0.5, 0.7, 0.6) + searched("fedsvd", 0.5, 0.5, 0.4)
    assert rates_of(found_of(rows)) == {"fedavg": RATES[1], "fedsvd": RATES[0]}


@pytest.mark.parametrize("scores", [(0.5, 0.7), (0.5, None, 0.7)])
def test_no_rate_is_chosen_before_all_were_tried(scores: tuple[float | None, ...]) -> None:
    assert rates_of(found_of(searched("fedavg", *scores))) == {}


def report(errors: list[float | None]) -> Json:
    rounds = [
        {"bytes_up": 10, "bytes_down": 20, "aggregation_error": e, "metrics": {"accuracy": 0.3}}
        for e in errors
    ]
    return {
        "rounds": rounds,
        "final": {"federated": {"accuracy": 0.5, "macro_f1": 0.4, "loss": 1.0}},
        "privacy": {"site-1": {"epsilon": 7.5}, "site-2": {"epsilon": 7.9}},
        "sites": [{"labels": {"ear": 1, "eye": 2}}, {"labels": {"ear": 4, "skin": 1}}],
    }


def test_figures_are_of_all_rounds_and_sites() -> None:
    assert figures_of(report([None, 0.1, 0.4, 0.2]), test=True) == {
        "accuracy": 0.5,
        "macro_f1": 0.4,
        "validation_accuracy": 0.3,
        "commonest": 5 / 8,  # ear: 1 + 4, of 3 + 5 records
        "error_median": 0.2,
        "error_max": 0.4,
        "bytes_up": 40,
        "bytes_down": 80,
        "epsilon": 7.9,
    }


def test_a_search_keeps_nothing_of_the_test_split() -> None:
    figures = figures_of(report([None]), test=False)
    assert not {"accuracy", "macro_f1"} & set(figures)
    assert figures["validation_accuracy"] == 0.3


def test_a_deviation_needs_two_values() -> None:
    assert mean_sd([0.1, 0.2, 0.3]) == "0.200 (0.100)"  # sqrt((0.01 + 0 + 0.01) / 2)
    assert mean_sd([0.25]) == "0.250"


def test_the_table_has_a_line_for_the_seeds_of_a_rule() -> None:
    rows = [row(cell(seed=7), accuracy=0.4), row(cell(seed=8), accuracy=0.6)]
    line = next(
        line for line in text_of(table_of(cells({}), found_of(rows))).splitlines() if "ffa" in line
    )
    words = [word.strip() for word in line.strip("│").split("│")]
    accuracy = f"0.500 ({math.sqrt(0.02):.3f})"  # of 0.4 and 0.6: sqrt((0.01 + 0.01) / (2 - 1))
    assert words[:6] == ["10", "iid", "none", "ffa-lora", "0.008", accuracy]
    assert words[6:] == ["0.400 (0.000)", "2", "1e-08", "2", "3", "60", ""]


def test_a_refusal_is_a_line_and_a_sentence() -> None:
    found = found_of([{"cell": cell("fedsa-lora").key, "refused": "why not"}])
    assert "refused" in text_of(table_of(cells({}), found))
    notes = notes_of(cells({}), found)
    assert [note for note in notes if note.endswith("why not")]


@pytest.mark.parametrize(
    ("rule", "changes", "odd"),
    [
        ("ffa-lora", {}, 0),
        ("ffa-lora", {"error_max": 2e-6}, 1),
        ("fedavg", {"error_max": 0.4}, 0),
        ("fedavg", {"accuracy": 0.21}, 1),
        ("ffa-lora", {"accuracy": 0.2, "error_max": 2e-6}, 2),
    ],
)
def test_what_is_odd_is_said(rule: str, changes: Json, odd: int) -> None:
    notes = notes_of(cells({}), found_of([row(cell(rule), **changes)]))
    assert sum(note.startswith("ODD") for note in notes) == odd


def test_results_of_other_rates_are_counted_and_searches_are_not() -> None:
    rows = [row(cell()), row(cell(rate=0.5)), *searched("fedavg", 0.1)]
    assert notes_of(cells({}), found_of(rows))[-1].startswith("1 results are of other")
    assert not notes_of(cells({"ffa-lora": 0.5}), found_of(rows[1:2]))


def options(**given: object) -> argparse.Namespace:
    nothing = {"search": False, "quick": False, "seeds": None, "only": None}
    return argparse.Namespace(**(nothing | given))


def test_options_name_the_cells_to_run() -> None:
    assert len(wanted(options(), {})) == 118
    quick = wanted(options(quick=True), {})
    assert len(quick) == 8 * 2 + 2  # rules by epsilons on the skewed split, and those of ranks
    assert {one.seed for one in quick} == {7}
    assert len(wanted(options(only=["core"], seeds=[8, 9]), {})) == 64  # 96 of three seeds
    assert wanted(options(search=True), {}) == list(search_cells())
