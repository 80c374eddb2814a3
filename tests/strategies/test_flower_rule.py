"""Flower's strategies in our loop: the same numbers as without us, and a restart changes no bit."""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from intramural.core.errors import AggregationError, ConfigError
from intramural.core.layout import Layout, Vector
from intramural.core.messages import Update
from intramural.simulations.inprocess import InProcessGrid
from intramural.strategies.flower import USABLE, FlowerRule
from intramural.strategies.rule import State
from tests.strategies.updates import run_round, update

LAYOUT = Layout((("layer.weight", (2, 3)), ("0", (2,)), ("scale", ())))
"""A matrix, a name that is a number, and a parameter without axes."""
OPTIONS: dict[str, dict[str, Any]] = {
    "FedAvg": {},
    "FedAvgM": {"server_learning_rate": 0.5, "server_momentum": 0.9},
    "FedAdagrad": {"eta": 0.1},
    "FedAdam": {"eta": 0.1, "beta_1": 0.9, "beta_2": 0.99},
    "FedYogi": {"eta": 0.1},
    "FedMedian": {},
    "FedTrimmedAvg": {"beta": 0.2},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
    "Bulyan": {"num_malicious_nodes": 1},
}
NAMES = [pytest.param(n, marks=pytest.mark.slow if n == "Bulyan" else ()) for n in OPTIONS]
"""Each strategy; Bulyan takes a quarter of a minute a test."""
SITES = "abcdefgh"


def grid_numbers(rng: np.random.Generator, size: int) -> Vector:
    """Return multiples of 1/64: adding and subtracting them in float32 is exact."""
    return (rng.integers(-64, 64, size) / 64).astype(np.float32)


def rounds(count: int = 3) -> list[list[Update]]:
    rng = np.random.default_rng(5)
    return [
        [
            update(grid_numbers(rng, LAYOUT.size), site=site, weight=int(rng.integers(1, 9)))
            for site in SITES
        ]
        for _ in range(count)
    ]


def start() -> Vector:
    return grid_numbers(np.random.default_rng(6), LAYOUT.size)


def record(vector: Vector) -> ArrayRecord:
    return ArrayRecord({n: Array(a) for n, a in LAYOUT.unflatten(vector).items()})


def directly(strategy: Strategy, updates: list[list[Update]]) -> Vector:
    """Run the strategy as Flower's loop does: configure, then aggregate, on its own records."""
    grid = InProcessGrid(ClientApp(), len(SITES), run_config={})
    arrays = record(start())
    for number, ones in enumerate(updates, start=1):
        list(strategy.configure_train(number, arrays, ConfigRecord(), grid))
        current = LAYOUT.flatten(numpy(arrays))
        replies = [
            Message(
                RecordDict(
                    {
                        "arrays": record(current + one.delta),
                        "metrics": MetricRecord({"num-examples": one.weight}),
                    }
                ),
                node,
                "train",
            )
            for node, one in enumerate(ones, start=1)
        ]
        result, _ = strategy.aggregate_train(number, replies)
        assert result is not None
        arrays = result
    return LAYOUT.flatten(numpy(arrays))


def numpy(arrays: ArrayRecord) -> dict[str, NDArray[np.float32]]:
    return {name: np.asarray(array.numpy(), np.float32) for name, array in arrays.items()}


def through_us(name: str, updates: list[list[Update]], *, restart: bool = False) -> Vector:
    rule = FlowerRule.named(name, LAYOUT, OPTIONS[name])
    current, state = start(), cast(State, {})
    for number, ones in enumerate(updates, start=1):
        current, state = run_round(rule, state, current, ones, round_=number)
        if restart:  # as a checkpoint: nothing but bytes of arrays goes on
            rule = FlowerRule.named(name, LAYOUT, OPTIONS[name])
            current = np.frombuffer(current.tobytes(), np.float32)
            state = {
                key: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape)
                for key, a in state.items()
            }
    return current


@pytest.mark.parametrize("name", NAMES)
def test_three_rounds_equal_the_stock_strategy(name: str) -> None:
    kind: Callable[..., Strategy] = getattr(flower, name)
    strategy = kind(min_train_nodes=1, min_available_nodes=1, **OPTIONS[name])
    # The mean of several multiples of 1/64 is none, so later rounds differ in the last bits.
    np.testing.assert_allclose(
        through_us(name, rounds()), directly(strategy, rounds()), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_restart_after_any_round_changes_no_bit(name: str) -> None:
    whole = through_us(name, rounds())
    assert through_us(name, rounds(), restart=True).tobytes() == whole.tobytes()


@pytest.mark.parametrize("name", ["FedAvgM", "FedAdam", "FedYogi", "FedAdagrad"])
def test_forgetting_the_state_would_change_the_result(name: str) -> None:
    rule = FlowerRule.named(name, LAYOUT, OPTIONS[name])
    first, second = rounds(2)
    current, state = run_round(rule, {}, start(), first)
    kept, _ = run_round(rule, state, current, second, round_=2)
    lost, _ = run_round(FlowerRule.named(name, LAYOUT, OPTIONS[name]), {}, current, second)
    assert not np.allclose(kept, lost)
    # The object that has seen round 1 remembers nothing that the state does not say.
    again, _ = run_round(rule, {}, current, second)
    assert again.tobytes() == lost.tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_updates_changes_no_bit(name: str) -> None:
    shuffled = [list(reversed(ones)) for ones in rounds()]
    assert through_us(name, shuffled).tobytes() == through_us(name, rounds()).tobytes()


def test_every_usable_strategy_is_tested_here() -> None:
    assert set(OPTIONS) == USABLE


def test_krum_takes_the_update_among_its_neighbours() -> None:
    # Five sites near 1 and one far away: any of the five is Krum's choice, never the sixth.
    small = Layout((("w", (1,)),))
    rule = FlowerRule.named("Krum", small, {"num_malicious_nodes": 1})
    deltas = [1.0, 1.01, 0.99, 1.02, 0.98, 500.0]
    updates = [update([d], site=s) for d, s in zip(deltas, SITES, strict=False)]
    result, _ = run_round(rule, {}, np.zeros(1, np.float32), updates)
    assert abs(float(result[0]) - 1.0) < 0.05
    assert rule.traits.byzantine


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_refused_and_the_fold_is_as_before(bad: float) -> None:
    rule = FlowerRule.named("FedAvg", LAYOUT, {})
    fold = rule.begin({}, start(), round=1)
    rule.add(fold, update(np.ones(LAYOUT.size, np.float32), site="good"))
    with pytest.raises(AggregationError, match="not finite"):
        rule.add(fold, update(np.full(LAYOUT.size, bad, np.float32), site="bad"))
    assert (fold.sites, fold.weight) == (["good"], 1)
    np.testing.assert_array_equal(rule.finish(fold)[0], start() + 1)


def test_no_update_is_refused() -> None:
    rule = FlowerRule.named("FedAvg", LAYOUT, {})
    with pytest.raises(AggregationError, match="gave no arrays for 0 updates"):
        rule.finish(rule.begin({}, start(), round=1))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("FedProx", {}, r"'flwr:FedProx' cannot be used; can: .*'FedYogi'"),
        ("Strategy", {}, "cannot be used"),
        ("FedYogi", {"etta": 0.1}, r"strategy.options: FedYogi takes only .*'eta'"),
        ("FedAvg", {"min_train_nodes": 2}, "strategy.options"),
    ],
)
def test_refused_names_and_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FlowerRule.named(name, LAYOUT, options)


def test_parameters_named_by_numbers_alone_survive_a_restart() -> None:
    layout = Layout((("0", (2,)), ("1", (3,))))
    ones = [update(grid_numbers(np.random.default_rng(1), 5), site=site) for site in "ab"]
    rule = FlowerRule.named("FedYogi", layout, {})
    current, state = run_round(rule, {}, np.zeros(5, np.float32), ones)
    expected, _ = run_round(rule, state, current, ones, round_=2)
    got, _ = run_round(FlowerRule.named("FedYogi", layout, {}), state, current, ones, round_=2)
    assert got.tobytes() == expected.tobytes()
