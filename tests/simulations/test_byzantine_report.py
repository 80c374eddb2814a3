"""Arithmetic of benchmarks/byzantine.py: means, worst cases, gates; and its rounds' aggregation."""

from itertools import product

import numpy as np
import pytest

from benchmarks.byzantine_attacks import ATTACKS, Scene, aggregated, harm_of
from benchmarks.byzantine_report import (
    BACKDOORS,
    BREAKERS,
    CHOSEN,
    CLEAN,
    PLAIN,
    TUNED,
    Cell,
    gates,
    rows_of,
    scores,
    tables,
    worst,
)
from intramural.strategies.fedavg import FedAvg


def cell(rule: str, attack: str, accuracy: float, *, seed: int = 7, success: float = 0.0) -> Cell:
    return Cell(
        private=False, seed=seed, rule=rule, attack=attack, accuracy=accuracy, success=success
    )


CELLS = [
    cell(PLAIN, CLEAN, 0.70, seed=8),
    cell(PLAIN, CLEAN, 0.74),
    cell(PLAIN, "sign-flip x10", 0.10),
    cell(PLAIN, "sign-flip x10", 0.20, seed=8),
    cell(PLAIN, "ipm 1.1", 0.60),
    cell(CHOSEN, CLEAN, 0.71),
    cell(CHOSEN, "mimic", 0.60),
    cell(CHOSEN, "mimic", 0.78, seed=8),
    cell(CHOSEN, "backdoor", 0.695, success=0.25),
]


def test_names_of_the_report_are_those_of_the_attacks() -> None:
    assert {CLEAN, *BREAKERS, *TUNED, *BACKDOORS} <= set(ATTACKS)


def test_scores_are_in_percent_and_in_the_order_of_the_seeds() -> None:
    found = scores(CELLS, private=False)
    np.testing.assert_allclose(found[PLAIN, CLEAN], [74, 70])
    assert scores(CELLS, private=True) == {}


def test_the_worst_case_is_that_of_means_and_not_of_single_seeds() -> None:
    lowest, attack = worst(scores(CELLS, private=False), CHOSEN)
    assert (attack, round(lowest, 6)) == ("mimic", 69.0)  # (60 + 78) / 2, below 69.5 and 71


def test_the_gates_hold_the_chosen_rule_and_the_mean_against_the_clean_mean() -> None:
    cells = [*CELLS, cell(CHOSEN, "ipm tuned", 0.65)]
    untuned, every, plain = gates(scores(cells, private=False), "side")
    assert untuned.value == pytest.approx(72 - 69)  # clean: (70 + 74) / 2
    assert every.value == pytest.approx(72 - 65)
    assert plain.value == pytest.approx(72 - 15)  # sign flip: (10 + 20) / 2
    assert (untuned.ok, every.ok, plain.ok) == (True, False, True)
    assert "(mimic)" in untuned.name
    assert "all attacks (ipm tuned)" in every.name
    assert "sign-flip" in plain.name


@pytest.mark.parametrize(("accuracy", "ok"), [(0.691, True), (0.689, False)])
def test_more_than_three_points_are_too_many(accuracy: float, ok: bool) -> None:
    cells = [cell(PLAIN, CLEAN, 0.72), cell(CHOSEN, "mimic", accuracy)]
    untuned, every = gates(scores(cells, private=False), "side")
    assert (untuned.ok, every.ok) == (ok, ok)


@pytest.mark.parametrize(("accuracy", "ok"), [(0.569, True), (0.571, False)])
def test_an_attack_that_does_not_break_the_mean_is_told(accuracy: float, ok: bool) -> None:
    cells = [cell(PLAIN, CLEAN, 0.72), cell(PLAIN, "ipm tuned", accuracy)]
    [gate] = gates(scores(cells, private=False), "side")
    assert gate.ok is ok


def test_the_rows_hold_every_cell_the_backdoors_success_and_the_gates() -> None:
    rows = {row.name: row for row in rows_of(CELLS)}
    assert rows[f"no privacy: {CHOSEN}, backdoor, success"].value == pytest.approx(25.0)
    assert len(rows) == 6 + 3 + 3  # pairs of rule and attack; clean twice and backdoor; gates
    assert len(tables([*CELLS, *all_of("median")])) == 2


def all_of(rule: str) -> list[Cell]:
    return [
        cell(r, a, 0.5)
        for r, a in product((rule, PLAIN, CHOSEN), {c.attack for c in CELLS})
        if (r, a) not in {(c.rule, c.attack) for c in CELLS}
    ]


def vector(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def test_a_round_is_the_rules_own_and_harm_is_the_distance_from_the_honest_mean() -> None:
    honest = [vector(1, 0)] * 6 + [vector(3, 0)] * 2  # the mean is 1.5
    following, _ = aggregated(FedAvg(), {}, vector(10, 10), [*honest, vector(0, 4)], round=1)
    np.testing.assert_allclose(following, [10 + 12 / 9, 10 + 4 / 9], rtol=1e-6)
    harm = harm_of(FedAvg(), {}, vector(10, 10), honest, round=1)
    # two at (-8.5, 0): (12 - 17) / 10 = -0.5, which is 2 from 1.5
    assert harm(vector(-8.5, 0)) == pytest.approx(2.0, rel=1e-5)


def test_attackers_send_one_update_each_and_mimic_stays_with_its_victim() -> None:
    rng = np.random.default_rng(1)
    first, second = ([rng.normal(size=5).astype(np.float32) for _ in range(10)] for _ in range(2))
    memory: dict[str, int] = {}
    sent = [mimic(updates, memory) for updates in (first, second)]
    [victim] = [n for n in range(8) if np.array_equal(sent[0], first[n])]
    assert np.array_equal(sent[1], second[victim])
    for attack, craft in ATTACKS.items():
        found = craft(scene(first, {}))
        assert [one.shape for one in found] == [(5,), (5,)], attack


def scene(updates: list[np.ndarray], memory: dict[str, int]) -> Scene:
    return Scene(
        honest=updates[:8],
        own=updates[8:],
        last_change=updates[0],
        harm=lambda sent: float(np.abs(sent).sum()),
        rng=np.random.default_rng(0),
        memory=memory,
    )


def mimic(updates: list[np.ndarray], memory: dict[str, int]) -> np.ndarray:
    one, other = ATTACKS["mimic"](scene(updates, memory))
    assert np.array_equal(one, other)
    return one
