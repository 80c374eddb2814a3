"""FedAvg: arithmetic, weights, server momentum, and Flower's own as a second opinion."""

from random import Random
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from hypothesis import given
from hypothesis import strategies as st

from intramural.core.errors import AggregationError
from intramural.strategies.fedavg import FedAvg
from intramural.strategies.rule import State
from tests.reference.fedavg import server_step
from tests.strategies.updates import run_round, update

ZERO = np.zeros(2, np.float32)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [2.5, 0.5]),  # (1*[4, 2] + 3*[2, 0]) / 4
        ({"weights": "equal"}, [3.0, 1.0]),  # ([4, 2] + [2, 0]) / 2
        ({"weight_cap": 1}, [3.0, 1.0]),
        ({"weight_cap": 2}, [8 / 3, 2 / 3]),  # (1*[4, 2] + 2*[2, 0]) / 3
        ({"weight_cap": 3}, [2.5, 0.5]),
        ({"weights": "equal", "weight_cap": 2}, [3.0, 1.0]),
        ({"learning_rate": 0.5}, [1.25, 0.25]),
    ],
)
def test_the_mean_by_hand(options: dict[str, Any], expected: list[float]) -> None:
    updates = [update([4, 2], site="a", weight=1), update([2, 0], site="b", weight=3)]
    result, state = run_round(FedAvg(**options), {}, ZERO, updates)
    np.testing.assert_allclose(result, expected, rtol=1e-6)
    assert state == {}


def test_the_mean_is_added_to_the_current_arrays_which_stay_as_they_are() -> None:
    current = np.array([10, 20], np.float32)
    result, _ = run_round(FedAvg(), {}, current, [update([1, -1])])
    assert result.tolist() == [11, 19]
    assert current.tolist() == [10, 20]


def test_momentum_by_hand() -> None:
    # Deltas of 1, beta 0.5, lr 2: v = 1, 1.5, 1.75; w = 2, 5, 8.5.
    rule = FedAvg(momentum=0.5, learning_rate=2.0)
    current, seen = np.zeros(1, np.float32), []
    state: State = {}
    for round_ in (1, 2, 3):
        current, state = run_round(rule, state, current, [update([1.0])], round_=round_)
        seen.append((float(current[0]), float(state["velocity"][0])))
    assert seen == [(2.0, 1.0), (5.0, 1.5), (8.5, 1.75)]


@given(st.integers(0, 2**32), st.sampled_from([(1.0, 0.0), (0.3, 0.0), (1.0, 0.9), (0.1, 0.5)]))
def test_rounds_equal_the_second_implementation(seed: int, step: tuple[float, float]) -> None:
    rng = np.random.default_rng(seed)
    lr, beta = step
    rule = FedAvg(learning_rate=lr, momentum=beta)
    current = rng.standard_normal(6).astype(np.float32)
    state: State = {}
    expected, velocity = current.astype(np.float64), np.zeros(6)
    for round_ in range(1, 5):
        deltas = [rng.standard_normal(6).astype(np.float32) for _ in range(3)]
        weights = [int(w) for w in rng.integers(1, 1000, 3)]
        updates = [
            update(d, site=s, weight=w) for d, s, w in zip(deltas, "abc", weights, strict=True)
        ]
        current, state = run_round(rule, state, current, updates, round_=round_)
        exact = [d.astype(np.float64) for d in deltas]
        floats = [float(w) for w in weights]
        expected, velocity = server_step(expected, velocity, exact, floats, lr=lr, beta=beta)
    np.testing.assert_allclose(current, expected, rtol=1e-5, atol=1e-5)


def test_a_copy_of_the_state_goes_on_to_the_same_bits() -> None:
    rng = np.random.default_rng(1)
    rounds = [[update(rng.standard_normal(4).astype(np.float32))] for _ in range(3)]

    def run(*, restart: bool) -> bytes:
        rule = FedAvg(momentum=0.9)
        current = np.zeros(4, np.float32)
        state: State = {}
        for updates in rounds:
            current, state = run_round(rule, state, current, updates)
            if restart:
                rule, current = FedAvg(momentum=0.9), current.copy()
                state = {name: array.copy() for name, array in state.items()}
        return current.tobytes()

    assert run(restart=True) == run(restart=False)


def test_the_state_handed_in_is_not_changed() -> None:
    state: State = {"velocity": np.array([1.0, 1.0], np.float32)}
    run_round(FedAvg(momentum=0.9), state, ZERO, [update([5, 5])])
    assert state["velocity"].tolist() == [1, 1]


@given(st.integers(0, 2**32), st.randoms())
def test_the_order_of_updates_changes_no_bit(seed: int, random: Random) -> None:
    rng = np.random.default_rng(seed)
    updates = [
        update(rng.standard_normal(3).astype(np.float32), site=str(k), weight=k + 1)
        for k in range(6)
    ]
    expected = run_round(FedAvg(momentum=0.9), {}, np.ones(3, np.float32), updates)
    random.shuffle(updates)
    got = run_round(FedAvg(momentum=0.9), {}, np.ones(3, np.float32), updates)
    assert got[0].tobytes() == expected[0].tobytes()
    assert got[1]["velocity"].tobytes() == expected[1]["velocity"].tobytes()


@pytest.mark.parametrize("weights", ["examples", "equal"])
def test_it_equals_flowers_fedavg(weights: str) -> None:
    rng = np.random.default_rng(2)
    current = rng.standard_normal(1000).astype(np.float32)
    deltas = [(0.01 * rng.standard_normal(1000)).astype(np.float32) for _ in range(7)]
    records = [int(n) for n in rng.integers(1, 5000, 7)]
    counts = records if weights == "examples" else [1] * 7
    replies = [
        Message(
            RecordDict(
                {
                    "arrays": ArrayRecord({"w": Array(current + delta)}),
                    "metrics": MetricRecord({"num-examples": count}),
                }
            ),
            dst_node_id=1,
            message_type="train",
        )
        for delta, count in zip(deltas, counts, strict=True)
    ]
    arrays, _ = FlowerFedAvg().aggregate_train(1, replies)
    assert arrays is not None
    updates = [
        update(d, site=str(k), weight=n)
        for k, (d, n) in enumerate(zip(deltas, records, strict=True))
    ]
    rule = FedAvg(weights="equal") if weights == "equal" else FedAvg()
    ours, _ = run_round(rule, {}, current, updates)
    np.testing.assert_allclose(ours, arrays["w"].numpy(), rtol=0, atol=1e-6)


def test_no_update_is_refused_with_a_remedy() -> None:
    rule = FedAvg()
    with pytest.raises(AggregationError, match=r"no update to aggregate; lower sites\.min"):
        rule.finish(rule.begin({}, ZERO, round=1))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (update([np.nan, 0]), "not finite"),
        (update([np.inf, 0]), "not finite"),
        (update([1e30, 0]), "too large"),
        (update([1, 1], weight=2**60), "too large"),
        (update([1, 1], weight=0), "at least 1"),
        (update([1, 1], weight=-3), "at least 1"),
    ],
)
def test_a_bad_update_is_refused_and_the_fold_is_as_before(bad: Any, message: str) -> None:
    rule = FedAvg()
    fold = rule.begin({}, ZERO, round=1)
    rule.add(fold, update([4, 8], site="good", weight=2))
    with pytest.raises(AggregationError, match=message):
        rule.add(fold, bad)
    assert (fold.weight, fold.sites) == (2, ["good"])
    assert rule.finish(fold)[0].tolist() == [4, 8]


def test_rounds_share_memory_but_no_numbers() -> None:
    # The rule keeps a round's sum for its memory: an open round, an abandoned one and the arrays
    # of the round before must not see each other.
    rule = FedAvg()
    first, _ = run_round(rule, {}, ZERO, [update([1, 2])])
    abandoned = rule.begin({}, first, round=2)
    rule.add(abandoned, update([100, 100]))
    second, _ = run_round(rule, {}, first, [update([10, 20])])
    open_ = rule.begin({}, second, round=3)
    rule.add(open_, update([1, 1]))
    other, _ = run_round(rule, {}, np.zeros(3, np.float32), [update([7, 8, 9])])
    third, _ = rule.finish(open_)
    assert [v.tolist() for v in (first, second, third)] == [[1, 2], [11, 22], [12, 23]]
    assert other.tolist() == [7, 8, 9]
