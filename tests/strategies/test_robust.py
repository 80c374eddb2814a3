"""Robust rules: arithmetic by hand, the harm a minority can do, order, memory, refusals."""

from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intramural.core.errors import AggregationError
from intramural.core.layout import Vector
from intramural.core.messages import Update
from intramural.strategies.centred_clipping import CentredClipping
from intramural.strategies.robust import Before, Combiner, Robust
from intramural.strategies.robust_coordinate import Median, TrimmedMean
from intramural.strategies.robust_distance import (
    GeometricMedian,
    Krum,
    MultiKrum,
    bucket_mix,
    nearest_mix,
)
from intramural.strategies.rule import State
from tests.strategies.updates import run_round, update

COMBINERS: dict[str, Combiner] = {
    "median": Median(),
    "trimmed-mean": TrimmedMean(),
    "krum": Krum(),
    "multi-krum": MultiKrum(),
    "geometric-median": GeometricMedian(),
    "centred-clipping": CentredClipping(),
}
BEFORE: tuple[Before, ...] = ("none", "nnm", "bucketing")


def rule_of(name: str, *, hostile_max: int, **options: Any) -> Robust:
    return Robust(name, COMBINERS[name], hostile_max=hostile_max, **options)


def updates_of(rows: Any) -> list[Update]:
    return [update(row, site=f"{i:02d}", weight=i + 1) for i, row in enumerate(rows)]


def step(rule: Robust, rows: Any, state: State | None = None) -> Vector:
    return run_round(rule, state or {}, np.zeros(len(rows[0]), np.float32), updates_of(rows))[0]


# On a line, f = 1, n = 6: scores are sums of the 3 least squared distances to others.
LINE = [[0.0], [1.0], [2.0], [4.0], [7.0], [100.0]]
# 0: 1+4+16; 1: 1+1+9; 2: 1+4+4; 4: 4+9+9; 7: 9+25+36; 100: far. Least: 2, then 1, 0, 4, 7.


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("krum", 2.0),
        ("multi-krum", 14 / 5),  # all but 100
        ("median", 3.0),
        ("trimmed-mean", 3.5),  # (1 + 2 + 4 + 7) / 4
    ],
)
def test_the_step_by_hand(name: str, expected: float) -> None:
    assert step(rule_of(name, hostile_max=1), LINE)[0] == pytest.approx(expected, rel=1e-6)


def test_krum_counts_as_many_neighbours_as_the_paper() -> None:
    # n = 7, f = 2: 3 nearest others. 0: 1+4+9 = 14; 1: 1+1+4 = 6; 2: 1+1+4 = 6; 3: 14.
    # 10, 10.1, 10.2 have two others near and a far third: 49 and more. A tie: the first name wins.
    rows = [[10.0], [3.0], [2.0], [10.1], [1.0], [0.0], [10.2]]
    assert step(rule_of("krum", hostile_max=2), rows).tolist() == [2]
    # With one less, the close group of three has the least score: 10.1 has .01 + .01.
    one_less = Robust("krum", Krum(left_out=3), hostile_max=2)
    assert step(one_less, rows)[0] == np.float32(10.1)


def test_the_step_of_krum_is_one_sites_update_to_the_bit() -> None:
    rows = np.random.default_rng(1).standard_normal((9, 50)).astype(np.float32)
    got = step(rule_of("krum", hostile_max=2), rows)
    assert [row.tobytes() for row in rows].count(got.tobytes()) == 1


def test_the_geometric_median_of_a_triangle() -> None:
    # Three directions of equal length around (1, 1) pull equally: the sum of distances is least.
    turns = 2 * np.pi * np.arange(3) / 3
    rows = np.stack([1 + np.cos(turns), 1 + np.sin(turns)], axis=1)
    np.testing.assert_allclose(step(rule_of("geometric-median", hostile_max=1), rows), 1, rtol=1e-5)


def test_one_iteration_from_zero_weighs_by_the_inverse_length() -> None:
    rule = Robust("g", GeometricMedian(iterations=1), hostile_max=0)
    # (2/2 + 8/8) / (1/2 + 1/8) = 3.2
    assert step(rule, [[2.0], [8.0]])[0] == pytest.approx(3.2)
    # With smoothing 4 the first weighs 1/4: (2/4 + 8/8) / (1/4 + 1/8) = 4
    smooth = Robust("g", GeometricMedian(iterations=1, smoothing=4.0), hostile_max=0)
    assert step(smooth, [[2.0], [8.0]])[0] == pytest.approx(4.0)


def test_centred_clipping_remembers_its_centre() -> None:
    rule = Robust("c", CentredClipping(radius=1.0, iterations=1), hostile_max=0)
    current = np.array([10.0], np.float32)
    # from 0: (0.5 + 1) / 2; from there: 0.75 + (1 + 0) / 2
    first, state = run_round(rule, {}, current, updates_of([[0.5], [4.0]]))
    assert (first.tolist(), state["centre"].tolist()) == ([10.75], [0.75])
    second, state = run_round(rule, state, first, updates_of([[1.75], [0.75]]))
    assert (second.tolist(), state["centre"].tolist()) == ([12.0], [1.25])


def test_without_a_radius_the_lower_median_distance_is_taken() -> None:
    rule = Robust("c", CentredClipping(iterations=1), hostile_max=1)
    # distances 1 2 3 1000, radius 2: (1 + 2 + 2 + 2) / 4
    assert step(rule, [[1.0], [1000.0], [2.0], [3.0]]).tolist() == [1.75]


def test_updates_that_agree_with_the_centre_stay_there() -> None:
    # All distances are 0, and so is the radius: no division by it.
    rule = rule_of("centred-clipping", hostile_max=1)
    state = {"centre": np.array([3.0, -4.0], np.float32)}
    assert step(rule, [[3, -4]] * 3, state).tolist() == [3, -4]


def test_nearest_neighbours_by_hand() -> None:
    # f = 1, n = 4: means of 3. On the line 0, 1, 3, 10: {0 1 3}, {1 0 3}, {3 1 0}, {10 3 1}.
    line = np.array([0.0, 1.0, 3.0, 10.0])
    mixed = nearest_mix(np.outer(line, line), 1) @ line
    np.testing.assert_allclose(mixed, [4 / 3, 4 / 3, 4 / 3, 14 / 3])


def test_a_row_is_its_own_nearest_before_a_copy_of_it() -> None:
    line = np.array([5.0, 5.0, 5.0])
    assert nearest_mix(np.outer(line, line), 2).tolist() == np.eye(3).tolist()


def test_buckets_by_hand() -> None:
    mix = bucket_mix(np.array([3, 0, 4, 1, 2]), 2)
    assert mix.tolist() == [[0.5, 0, 0, 0.5, 0], [0, 0.5, 0, 0, 0.5], [0, 0, 1, 0, 0]]


def test_bucketing_draws_another_order_each_round_and_from_each_seed() -> None:
    rows = updates_of(np.random.default_rng(3).standard_normal((9, 4)))
    zero = np.zeros(4, np.float32)

    def result(seed: int, round_: int) -> bytes:
        rule = rule_of("median", hostile_max=1, before="bucketing", seed=seed)
        return run_round(rule, {}, zero, rows, round_=round_)[0].tobytes()

    assert len({result(seed, round_) for seed in (1, 2) for round_ in (1, 2)}) == 4
    assert result(1, 1) == result(1, 1)


def test_weights_that_sites_tell_change_nothing() -> None:
    rows = np.random.default_rng(4).standard_normal((7, 3)).astype(np.float32)
    zero = np.zeros(3, np.float32)
    for name in COMBINERS:
        rule = rule_of(name, hostile_max=1)
        heavy = [update(row, site=f"{i:02d}", weight=10**i) for i, row in enumerate(rows)]
        fold = rule.begin({}, zero, round=1)
        for one in heavy:
            rule.add(fold, one)
        assert fold.weight == 7
        assert rule.finish(fold)[0].tobytes() == step(rule, rows).tobytes()


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("name", list(COMBINERS))
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32), reach=st.sampled_from([10.0, 1e4, 1e15, 1e30]))
def test_a_minority_cannot_pull_far(name: str, before: Before, seed: int, reach: float) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(9, 4)).astype(np.float32)
    rows[:1] = rng.choice([-1, 1], size=4) * np.float32(reach)
    got = step(rule_of(name, hostile_max=1, before=before, seed=seed), rows)
    # Each bound of the papers is a small multiple of the honest updates' spread around their mean;
    # a mean of nine would be off by reach / 9 in each of four coordinates.
    honest = rows[1:].mean(axis=0)
    spread = np.linalg.norm(rows[1:] - honest, axis=1).max()
    assert np.linalg.norm(got - honest) < 3 * spread


@pytest.mark.parametrize("name", ["median", "trimmed-mean"])
@given(seed=st.integers(0, 2**32))
def test_each_coordinate_stays_among_the_honest(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(5, 6)).astype(np.float32)
    rows[:2] = rng.normal(size=(2, 6)) * 10.0 ** rng.integers(-2, 20)
    got, honest = step(rule_of(name, hostile_max=2), rows), rows[2:]
    assert np.all((honest.min(axis=0) <= got) & (got <= honest.max(axis=0)))


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("name", list(COMBINERS))
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32), random=st.randoms())
def test_the_order_of_updates_changes_no_bit(
    name: str, before: Before, seed: int, random: Random
) -> None:
    updates = updates_of(np.random.default_rng(seed).standard_normal((9, 3)))
    rule = rule_of(name, hostile_max=1, before=before)
    state: State = {"centre": np.ones(3, np.float32)} if name == "centred-clipping" else {}
    expected = run_round(rule, state, np.ones(3, np.float32), updates)
    random.shuffle(updates)
    got = run_round(rule, state, np.ones(3, np.float32), updates)
    assert got[0].tobytes() == expected[0].tobytes()
    assert {n: a.tobytes() for n, a in got[1].items()} == {
        n: a.tobytes() for n, a in expected[1].items()
    }
    assert bool(got[1]) == (name == "centred-clipping")


def test_the_current_arrays_and_the_state_stay_as_they_are() -> None:
    current, centre = np.array([5.0], np.float32), np.array([1.0], np.float32)
    result, state = run_round(
        rule_of("centred-clipping", hostile_max=0), {"centre": centre}, current, updates_of([[3]])
    )
    assert (current.tolist(), centre.tolist()) == ([5], [1])
    assert result.tolist() == [8]  # the radius is the one distance: all of it
    assert not result.flags.writeable
    state["centre"][0] = 77
    assert result.tolist() == [8]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (update([np.nan, 0], site="x"), "not finite"),
        (update([0, -np.inf], site="x"), "not finite"),
        (update([-2e30, 0], site="x"), r"magnitude 2e\+30, too large to compare"),
        (update([1, 1], site="00"), "in this round already"),
    ],
)
def test_a_bad_update_is_refused_and_the_fold_is_as_before(bad: Update, message: str) -> None:
    rule = rule_of("median", hostile_max=0)
    fold = rule.begin({}, np.zeros(2, np.float32), round=1)
    rule.add(fold, updates_of([[4, 8]])[0])
    with pytest.raises(AggregationError, match=message):
        rule.add(fold, bad)
    assert (fold.weight, fold.sites) == (1, ["00"])
    assert rule.finish(fold)[0].tolist() == [4, 8]


@pytest.mark.parametrize(
    ("name", "before", "hostile", "least"),
    [
        ("median", "none", 0, 1),
        ("median", "none", 2, 5),
        ("trimmed-mean", "none", 2, 5),
        ("geometric-median", "nnm", 2, 5),
        ("centred-clipping", "none", 1, 3),
        ("krum", "none", 0, 3),
        ("krum", "none", 2, 7),
        ("multi-krum", "nnm", 1, 5),
        ("median", "bucketing", 1, 5),  # 3 buckets: 2 2 1
        ("krum", "bucketing", 1, 9),  # 5 buckets
    ],
)
def test_too_few_updates_are_refused(name: str, before: Before, hostile: int, least: int) -> None:
    rule = rule_of(name, hostile_max=hostile, before=before)
    rows = np.random.default_rng(0).standard_normal((least, 2))
    step(rule, rows)
    message = f"{name} needs {least} updates to bear {hostile} hostile ones, and there are"
    fold = rule.begin({}, np.zeros(2, np.float32), round=1)
    for one in updates_of(rows[1:]):
        rule.add(fold, one)
    with pytest.raises(AggregationError, match=f"{message} {least - 1}; lower strategy.hostile_m"):
        rule.finish(fold)
