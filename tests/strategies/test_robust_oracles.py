"""Robust rules next to others' code: byzfl's recorded results, Flower's strategies, plain NumPy."""

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from intramural.core.layout import Layout, Vector
from intramural.core.seeds import generator
from intramural.strategies import robust_rows
from intramural.strategies.centred_clipping import CentredClipping
from intramural.strategies.flower import FlowerRule
from intramural.strategies.robust import Before, Combiner, Robust
from intramural.strategies.robust_coordinate import Median, TrimmedMean
from intramural.strategies.robust_distance import GeometricMedian, Krum, MultiKrum
from intramural.strategies.rule import Rule, State
from tests.reference import record_byzfl as recorded
from tests.reference import robust as reference
from tests.strategies.updates import run_round, update


def step(
    rule: Rule, rows: NDArray[Any], state: State | None = None, *, round_: int = 1
) -> tuple[Vector, State]:
    zero = np.zeros(rows.shape[1], np.float32)
    updates = [update(row, site=f"{i:03d}") for i, row in enumerate(rows)]
    return run_round(rule, state or {}, zero, updates, round_=round_)


@cache
def vectors() -> dict[str, NDArray[np.float32]]:
    with np.load(recorded.FILE) as file:
        return dict(file)


def as_byzfl(rule: str, one: recorded.Case) -> Combiner:
    makers: dict[str, Combiner] = {
        "median": Median(),
        "trimmed-mean": TrimmedMean(),
        "krum": Krum(left_out=1),
        "multi-krum": MultiKrum(left_out=1),
        "geometric-median": GeometricMedian(smoothing=one.smoothing, iterations=one.weiszfeld),
        "centred-clipping": CentredClipping(radius=one.radius, iterations=one.clippings),
    }
    return makers[rule]


@pytest.mark.parametrize("before", recorded.BEFORE)
@pytest.mark.parametrize("name", recorded.RULES)
def test_every_rule_equals_byzfl(name: str, before: Before) -> None:
    got: list[Vector] = []
    again: list[Vector] = []
    for number in range(recorded.CASES if before == "none" else recorded.CASES_MIXED):
        one = recorded.case(number)
        rule = Robust(
            name,
            as_byzfl(name, one),
            hostile_max=one.hostile_behind(before),
            before=before,
            bucket=one.bucket,
            seed=recorded.SEED,
        )
        result, state = step(rule, one.rounds[0], round_=recorded.ROUND)
        got.append(result)
        if name == "centred-clipping" and before == "none":
            again.append(step(rule, one.rounds[1], state)[0])
    expected = vectors()[f"{name}/{before}"]
    # 1e-12 is for sums of both signs that are 0 but for rounding
    np.testing.assert_allclose(np.concatenate(got), expected, rtol=1e-6, atol=1e-12)
    if again:  # our centre is kept in float32, byzfl's in float64; values are below 10
        expected = vectors()[recorded.HISTORY]
        np.testing.assert_allclose(np.concatenate(again), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (Median(), "FedMedian", {}),
        (TrimmedMean(), "FedTrimmedAvg", {"beta": 2 / 9}),
        (Krum(), "Krum", {"num_malicious_nodes": 2}),
        (MultiKrum(), "MultiKrum", {"num_malicious_nodes": 2, "num_nodes_to_select": 7}),
    ],
)
def test_rules_equal_flowers(ours: Combiner, theirs: str, options: dict[str, float]) -> None:
    flower = FlowerRule.named(theirs, Layout((("a", (3, 5)), ("b", (4,)))), options)
    rule = Robust("ours", ours, hostile_max=2)
    for seed in range(20):
        rows = np.random.default_rng(seed).standard_normal((9, 19)).astype(np.float32)
        rows[:2] *= -4
        np.testing.assert_allclose(step(rule, rows)[0], step(flower, rows)[0], atol=1e-6)


def plain(name: str, rows: NDArray[np.float64], hostile: int, centre: Any) -> Any:
    """Return the second implementation's step."""
    match name:
        case "median":
            return reference.median(rows)
        case "trimmed-mean":
            return reference.trimmed_mean(rows, hostile)
        case "krum":
            return reference.krum(rows, hostile)
        case "multi-krum":
            return reference.multi_krum(rows, hostile)
        case "geometric-median":
            return reference.geometric_median(rows)
    return reference.centred_clipping(rows, centre)


OURS: dict[str, Combiner] = {
    "median": Median(),
    "trimmed-mean": TrimmedMean(),
    "krum": Krum(),
    "multi-krum": MultiKrum(),
    "geometric-median": GeometricMedian(),
    "centred-clipping": CentredClipping(),
}


@pytest.mark.parametrize("before", ["none", "nnm", "bucketing"])
@pytest.mark.parametrize("name", list(OURS))
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32), on_disk=st.booleans())
def test_rounds_in_chunks_and_threads_equal_the_second_implementation(
    name: str, before: Before, seed: int, on_disk: bool
) -> None:
    rng = np.random.default_rng(seed)
    sites, hostile, size = int(rng.integers(13, 20)), 2, int(rng.integers(90, 200))
    rule = Robust(
        name,
        OURS[name],
        hostile_max=hostile,
        before=before,
        seed=seed,
        memory_bytes_max=0 if on_disk else 1 << 20,
    )
    state: State = {}
    centre = np.zeros(size)
    whole = robust_rows.CHUNK_ELEMENTS
    robust_rows.CHUNK_ELEMENTS = 100  # five or so columns at once
    try:
        for round_ in (1, 2):
            rows = rng.normal(rng.normal(size=size), 1.0, size=(sites, size)).astype(np.float32)
            rows[:hostile] *= -5
            got, state = step(rule, rows, state, round_=round_)
            exact = rows.astype(np.float64)
            if before == "nnm":
                exact = reference.nnm(exact, hostile)
            elif before == "bucketing":
                order = generator(seed, "bucketing", round_).permutation(sites)
                exact = reference.buckets(exact, order, 2)
            expected = plain(name, exact, hostile, centre)
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
            centre = np.asarray(expected, np.float32).astype(np.float64)
    finally:
        robust_rows.CHUNK_ELEMENTS = whole
