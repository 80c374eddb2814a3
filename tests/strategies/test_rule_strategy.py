"""Our rules in a stock Flower app give FedAvg's answer, and leave out what is bad."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from intramural.simulations.inprocess import InProcessGrid
from intramural.strategies.fedavg import FedAvg
from intramural.strategies.flower import RuleStrategy

Arrays = dict[str, NDArray[Any]]
Reply = Callable[[int, Arrays], RecordDict]

START: Arrays = {
    "w": np.array([[0.0, 1.0], [2.0, 3.0]], np.float32),
    "b": np.array([5.0], np.float64),
    "steps": np.array(7, np.int64),
}


def content(arrays: Arrays, **metrics: Any) -> RecordDict:
    return RecordDict(
        {
            "arrays": ArrayRecord({n: Array(np.asarray(a)) for n, a in arrays.items()}),
            "metrics": MetricRecord({"num-examples": 1, **metrics}),
        }
    )


def adds_one(node: int, arrays: Arrays) -> RecordDict:
    """Add 1; the last node (4) counts three times as much and adds 2."""
    more, weight = (2, 3) if node == 4 else (1, 1)
    changed = {n: a + more for n, a in arrays.items() if n != "steps"}
    return content(arrays | changed, **{"num-examples": weight, "loss": float(node)})


def run(strategy: Strategy, reply: Reply = adds_one, *, nodes: int = 4, rounds: int = 1) -> Arrays:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = {n: a.numpy() for n, a in message.content.array_records["arrays"].items()}
        return Message(reply(context.node_id, arrays), reply_to=message)

    grid = InProcessGrid(app, nodes, run_config={})
    initial = ArrayRecord({name: Array(array) for name, array in START.items()})
    result = strategy.start(grid, initial, num_rounds=rounds)
    return {name: array.numpy() for name, array in result.arrays.items()}


def ours(**options: Any) -> RuleStrategy:
    return RuleStrategy(FedAvg(**options), fraction_evaluate=0.0)


def test_a_round_by_hand() -> None:
    # (1 + 1 + 1 + 3*2) / 6 = 1.5
    result = run(ours())
    np.testing.assert_array_equal(result["w"], START["w"] + 1.5)
    assert run(ours(weights="equal"))["b"].tolist() == [6.25]  # 5 + (1 + 1 + 1 + 2) / 4


def test_it_gives_the_answer_of_flowers_fedavg() -> None:
    stock = run(FlowerFedAvg(fraction_evaluate=0.0), rounds=3)
    result = run(ours(), rounds=3)
    for name in ("w", "b"):
        np.testing.assert_allclose(result[name], stock[name], rtol=1e-6)


def test_names_shapes_and_types_stay_and_counters_are_not_averaged() -> None:
    result = run(ours(), rounds=2)
    assert list(result) == list(START)
    for name, array in START.items():
        assert (result[name].dtype, result[name].shape) == (array.dtype, array.shape)
    assert result["steps"] == 7


def test_momentum_lives_over_the_rounds() -> None:
    # mean 1.5 each round, beta 0.5: velocity 1.5, 2.25, 2.625; sum 6.375.
    result = run(ours(momentum=0.5), rounds=3)
    np.testing.assert_allclose(result["w"], START["w"] + 6.375, rtol=1e-6)


def nan(arrays: Arrays) -> RecordDict:
    return content(arrays | {"w": np.full((2, 2), np.nan, np.float32)})


def error(arrays: Arrays) -> RecordDict:
    raise RuntimeError("the site broke")


def other_shape(arrays: Arrays) -> RecordDict:
    return content(arrays | {"w": np.zeros(4, np.float32)})


def missing(arrays: Arrays) -> RecordDict:
    return content({"b": arrays["b"]})


def overflowing(arrays: Arrays) -> RecordDict:
    return content(arrays | {"b": np.array([1e300])})


def no_arrays(arrays: Arrays) -> RecordDict:
    return RecordDict({"metrics": MetricRecord({"num-examples": 1})})


def no_weight(arrays: Arrays) -> RecordDict:
    return RecordDict({"arrays": ArrayRecord(), "metrics": MetricRecord({"n": 1})})


def weight_of(weight: Any) -> Callable[[Arrays], RecordDict]:
    return lambda arrays: content(arrays, **{"num-examples": weight})


def pickled(arrays: Arrays) -> RecordDict:
    records = content(arrays)
    records.array_records["arrays"]["w"] = Array("object", (4,), "numpy.ndarray", b"\x80\x04.")
    return records


@pytest.mark.parametrize(
    "bad",
    [nan, error, other_shape, missing, overflowing, no_arrays, no_weight, pickled]
    + [weight_of(weight) for weight in (0, -1, float("nan"), float("inf"), [1, 2])],
)
def test_a_bad_reply_is_left_out(bad: Callable[[Arrays], RecordDict]) -> None:
    def reply(node: int, arrays: Arrays) -> RecordDict:
        return bad(arrays) if node == 2 else adds_one(node, arrays)

    # Without node 2: (1 + 1 + 3*2) / 5 = 1.6
    result = run(ours(), reply)
    np.testing.assert_allclose(result["w"], START["w"] + np.float32(1.6), rtol=1e-6)


def test_metrics_are_averaged_over_the_replies_that_were_used() -> None:
    def reply(node: int, arrays: Arrays) -> RecordDict:
        return nan(arrays) if node == 2 else adds_one(node, arrays)

    strategy, seen = ours(), []
    average = strategy.train_metrics_aggr_fn

    def spy(records: list[RecordDict], key: str) -> MetricRecord:
        seen.append(average(records, key))
        return seen[-1]

    strategy.train_metrics_aggr_fn = spy
    run(strategy, reply)
    assert seen[0]["loss"] == pytest.approx(16 / 5)  # (1*1 + 1*3 + 3*4) / 5


def test_after_a_round_of_bad_replies_alone_the_next_goes_on_from_the_same_arrays() -> None:
    asked = iter(range(8))

    def reply(node: int, arrays: Arrays) -> RecordDict:
        return nan(arrays) if next(asked) < 4 else adds_one(node, arrays)

    result = run(ours(), reply, rounds=2)
    np.testing.assert_array_equal(result["w"], START["w"] + 1.5)
