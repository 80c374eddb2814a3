"""A stock ServerApp with one of our strategies ends where arithmetic and where Flower say."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Result, Strategy
from numpy.typing import NDArray

from intramural import strategies
from intramural.core.errors import ConfigError
from intramural.simulations.inprocess import InProcessGrid

Arrays = dict[str, NDArray[np.float32]]
Train = Callable[[Arrays, int, int], Arrays]
"""From arrays, node and round to what the node sends back."""

A, B = "m.lora_A.weight", "m.lora_B.weight"
RANK, NODES = 2, 5


def start() -> Arrays:
    rng = np.random.default_rng(1)
    shapes = {A: (RANK, 4), B: (3, RANK), "head": (3,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def step(name: str, node: int, round_: int) -> NDArray[np.float32]:
    """Return what a node changes of an array in a round; nodes differ."""
    rng = np.random.default_rng([node, round_, len(name)])
    return rng.normal(scale=0.3, size=start()[name].shape).astype(np.float32)


def trains(*names: str) -> Train:
    return lambda arrays, node, round_: {
        name: array + step(name, node, round_) if name in names else array
        for name, array in arrays.items()
    }


ALL = trains(A, B, "head")


def record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def run(strategy: Strategy, train: Train, *, rounds: int = 3) -> Result:
    """Run the quickstart's two apps, as Flower's template has them."""
    client, server, results = ClientApp(), ServerApp(), []

    @client.train()
    def fit(message: Message, context: Context) -> Message:
        arrays = {n: a.numpy() for n, a in message.content.array_records["arrays"].items()}
        round_ = message.content.config_records["config"]["server-round"]
        assert isinstance(round_, int)
        sent = train(arrays, context.node_id, round_)
        metrics = MetricRecord({"train_loss": 0.5, "num-examples": 10 * context.node_id})
        content = RecordDict({"arrays": record(sent), "metrics": metrics})
        return Message(content, reply_to=message)

    @client.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"eval_loss": 0.5, "num-examples": 10})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        initial = record(start())
        results.append(strategy.start(grid=grid, initial_arrays=initial, num_rounds=rounds))

    grid = InProcessGrid(client, NODES, run_config={})
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
    server(grid, context)
    (result,) = results
    return result


def arrays_of(result: Result) -> dict[str, NDArray[np.float64]]:
    return {name: array.numpy().astype(np.float64) for name, array in result.arrays.items()}


def mean(name: str, round_: int) -> NDArray[np.float64]:
    """Return the weighted mean of the nodes' changes: node k has 10 k records of 150."""
    steps = [node * step(name, node, round_).astype(np.float64) for node in range(1, NODES + 1)]
    total: NDArray[np.float64] = sum(steps, np.zeros_like(steps[0]))
    return total / 15


@pytest.mark.parametrize(
    ("name", "ours", "stock"),
    [
        ("FedAvg", {}, {}),
        ("FedAvgM", {"momentum": 0.8}, {"server_momentum": 0.8}),
        ("FedAdam", {"learning_rate": 0.2, "beta_1": 0.8}, {"eta": 0.2, "beta_1": 0.8}),
        ("FedYogi", {"learning_rate": 0.05, "tau": 0.01}, {"eta": 0.05, "tau": 0.01}),
        ("FedAdagrad", {}, {}),
    ],
)
def test_a_server_optimizer_ends_where_flowers_own_does(
    name: str, ours: dict[str, Any], stock: dict[str, Any]
) -> None:
    found = arrays_of(run(getattr(strategies, name)(**ours), ALL))
    wanted = arrays_of(run(getattr(flower, name)(**stock), ALL))
    for key, array in wanted.items():
        np.testing.assert_allclose(found[key], array, rtol=2e-4, atol=1e-5)


def test_ffa_averages_b_and_leaves_a() -> None:
    found, before = arrays_of(run(strategies.FFALora(), trains(B, "head"))), start()
    np.testing.assert_array_equal(found[A], before[A])
    for key in (B, "head"):
        wanted = before[key] + sum(mean(key, round_) for round_ in (1, 2, 3))
        np.testing.assert_allclose(found[key], wanted, rtol=1e-5, atol=1e-6)


def test_rolora_takes_b_then_a_then_b_as_the_clients_can_tell_from_the_round() -> None:
    def turn(arrays: Arrays, node: int, round_: int) -> Arrays:
        return trains(B if round_ % 2 else A, "head")(arrays, node, round_)

    found, before = arrays_of(run(strategies.RoLoRA(), turn)), start()
    wanted = before[B] + mean(B, 1) + mean(B, 3)
    np.testing.assert_allclose(found[B], wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[A], before[A] + mean(A, 2), rtol=1e-5, atol=1e-6)


def test_fedsvd_keeps_the_product_that_the_means_have_round_after_round() -> None:
    found = arrays_of(run(strategies.FedSVD(), trains(B, "head")))
    b, a = start()[B].astype(np.float64), start()[A].astype(np.float64)
    for round_ in (1, 2, 3):  # A <- V^T, B <- U S of what the mean is, by a full decomposition
        left, sizes, right = np.linalg.svd((b + mean(B, round_)) @ a)
        signs = np.sign([row[np.abs(row).argmax()] for row in right[:RANK]])
        b, a = left[:, :RANK] * sizes[:RANK] * signs, right[:RANK] * signs[:, None]
    np.testing.assert_allclose(found[A], a, atol=1e-5)
    np.testing.assert_allclose(found[B], b, atol=1e-5)


def test_flexlora_is_the_best_approximation_of_the_mean_product() -> None:
    found, before = arrays_of(run(strategies.FlexLoRA(), ALL, rounds=1)), start()
    product = np.zeros((3, 4))
    for k in range(1, NODES + 1):
        product += k / 15 * (before[B] + step(B, k, 1)) @ (before[A] + step(A, k, 1))
    left, sizes, right = np.linalg.svd(product)
    wanted = (left[:, :RANK] * sizes[:RANK]) @ right[:RANK]
    np.testing.assert_allclose(found[B] @ found[A], wanted, atol=1e-5)


def test_the_aggregation_error_is_among_the_training_metrics() -> None:
    product = np.zeros((3, 4))
    before = start()
    for k in range(1, NODES + 1):
        product += k / 15 * (before[B] + step(B, k, 1)) @ (before[A] + step(A, k, 1))
    apart = (before[B] + mean(B, 1)) @ (before[A] + mean(A, 1))
    wanted = np.linalg.norm(apart - product) / np.linalg.norm(product)
    told = run(strategies.FedAvg(), ALL, rounds=1).train_metrics_clientapp[1]
    assert told["aggregation-error"] == pytest.approx(wanted, rel=1e-3)
    assert told["train_loss"] == pytest.approx(0.5)
    exact = run(strategies.FFALora(), trains(B), rounds=1).train_metrics_clientapp[1]
    error = exact["aggregation-error"]
    assert isinstance(error, float)
    assert 0 <= error < 1e-6


def test_a_client_may_leave_out_what_it_does_not_train() -> None:
    def short(arrays: Arrays, node: int, round_: int) -> Arrays:
        return {n: a for n, a in trains(B)(arrays, node, round_).items() if n != A}

    whole = arrays_of(run(strategies.FedSVD(), trains(B), rounds=1))
    found = arrays_of(run(strategies.FedSVD(), short, rounds=1))
    for name, array in whole.items():
        np.testing.assert_array_equal(found[name], array)


def test_a_round_with_too_few_replies_changes_nothing_and_the_next_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(arrays: Arrays, node: int, round_: int) -> Arrays:
        if node == 5 and round_ == 1:
            raise RuntimeError("the node broke")
        return {name: array + 1 for name, array in arrays.items()}

    found = arrays_of(run(strategies.Krum(hostile_max=1), fails, rounds=2))
    np.testing.assert_allclose(found["head"], start()["head"] + 1.0, rtol=1e-6)
    assert "round 1 changes nothing: krum needs 5 updates" in caplog.text


@pytest.mark.parametrize("name", ["FedSVD", "FFALora", "RoLoRA", "FlexLoRA"])
def test_a_rule_for_adapters_is_not_plain_averaging_where_there_are_none(name: str) -> None:
    grid = InProcessGrid(ClientApp(), 2, run_config={})
    arrays = ArrayRecord([np.zeros(3, np.float32)])  # as the NumPy quickstart has it: no names
    with pytest.raises(ConfigError, match=f"{name} acts on LoRA's factors.*or use FedAvg"):
        getattr(strategies, name)().start(grid, arrays)


@pytest.mark.parametrize(
    ("name", "options", "nodes"),
    [
        ("Median", {}, 2),
        ("Median", {"hostile_max": 2}, 5),  # 2 * 2 + 1
        ("Krum", {"hostile_max": 2}, 7),  # 2 * 2 + 3
        ("Median", {"hostile_max": 2, "before": "bucketing"}, 9),  # (5 - 1) * 2 + 1
        ("Median", {"hostile_max": 1, "min_train_nodes": 8}, 8),
    ],
)
def test_a_robust_rule_asks_for_the_nodes_it_needs(
    name: str, options: dict[str, Any], nodes: int
) -> None:
    assert getattr(strategies, name)(**options).min_train_nodes == nodes
