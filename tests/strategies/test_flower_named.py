"""Our rules by name in a stock Flower app: the quickstart, with its strategy line replaced."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from intramural import strategies
from intramural.core.errors import ConfigError
from intramural.simulations.inprocess import InProcessGrid
from intramural.strategies.flower_named import NAMED, SITE_PART

Arrays = dict[str, NDArray[np.float32]]
A, B = "m.lora_A.weight", "m.lora_B.weight"  # as PEFT's get_peft_model_state_dict has them
RANK, SITES = 2, 5


def start() -> Arrays:
    rng = np.random.default_rng(0)
    return {
        A: rng.normal(size=(RANK, 4)).astype(np.float32),
        B: rng.normal(size=(3, RANK)).astype(np.float32),
        "head": np.zeros(3, np.float32),
    }


def record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def quickstart(
    strategy: Strategy, *, frozen: tuple[str, ...] = (), loose: int = 0, rounds: int = 3
) -> Arrays:
    """Run Flower's quickstart: a client that trains and evaluates, and `strategy.start`."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = {n: a.numpy() for n, a in message.content.array_records["arrays"].items()}
        node = context.node_id
        for name in arrays:
            if name not in frozen or node == loose:
                arrays[name] = arrays[name] + np.float32(0.1 * node)
        metrics = MetricRecord({"train_loss": 1.0 / node, "num-examples": 10})
        content = RecordDict({"arrays": record(arrays), "metrics": metrics})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"eval_loss": 0.5, "num-examples": 10})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    grid = InProcessGrid(app, SITES, run_config={})
    result = strategy.start(
        grid=grid,
        initial_arrays=record(start()),
        train_config=ConfigRecord({"lr": 0.01}),
        num_rounds=rounds,
    )
    assert set(result.evaluate_metrics_clientapp) == set(range(1, rounds + 1))
    return {name: array.numpy() for name, array in result.arrays.items()}


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("FedAvg", 0.3),  # the mean of 0.1 .. 0.5
        ("Median", 0.3),
        ("TrimmedMean", 0.3),
        ("FedAvgM", (0.3 + 0.57 + 0.813) / 3),  # velocity 0.3, 0.9 * 0.3 + 0.3, ...
    ],
)
def test_the_quickstart_runs_with_its_strategy_line_replaced(name: str, step: float) -> None:
    found = quickstart(getattr(strategies, name)())
    for key, array in start().items():
        np.testing.assert_allclose(found[key], array + 3 * step, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(NAMED))
def test_every_named_rule_runs(name: str) -> None:
    frozen = (A,) if name in {"FFALora", "FedSVD", "RoLoRA"} else ()
    found = quickstart(getattr(strategies, name)(), frozen=frozen, rounds=1)
    assert np.isfinite(found["head"]).all()
    assert found["head"].any()


def test_fedsvd_redistributes_what_the_clients_learnt_of_b() -> None:
    plain = quickstart(strategies.FFALora(), frozen=(A,), rounds=1)
    found = quickstart(strategies.FedSVD(), frozen=(A,), rounds=1)
    np.testing.assert_allclose(found[B] @ found[A], plain[B] @ plain[A], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[A] @ found[A].T, np.eye(RANK), atol=1e-6)


def test_a_client_that_does_not_freeze_is_left_out_and_told_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = quickstart(strategies.FFALora(), frozen=(A,), loose=5, rounds=1)
    np.testing.assert_array_equal(found[A], start()[A])
    np.testing.assert_allclose(found[B], start()[B] + 0.25, rtol=1e-5)  # the mean of 0.1 .. 0.4
    assert "freeze lora_A at the client" in caplog.text


def test_options_go_where_they_belong_and_others_are_refused() -> None:
    made: Any = strategies.CentredClipping(
        radius=2.0, hostile_max=1, fraction_train=0.5, min_train_nodes=4
    )
    assert made.fraction_train == 0.5
    settings = made.federation.strategy
    assert (settings.options, settings.hostile_max) == ({"radius": 2.0}, 1)
    with pytest.raises(ConfigError, match="hostile_max = 3 needs 7 replies"):
        strategies.Median(hostile_max=3, min_train_nodes=4)
    with pytest.raises(TypeError, match=r"FedAdam takes no .'eta'.; it takes .*'learning_rate'"):
        strategies.FedAdam(eta=0.1)
    with pytest.raises(ConfigError, match=r"options\.radius must be a number above 0"):
        strategies.CentredClipping(radius=0)


def test_rules_that_need_a_part_at_the_sites_name_one_that_does_not() -> None:
    for name, near in SITE_PART.items():
        assert near in NAMED
        with pytest.raises(ConfigError, match=f"use {near}"):
            getattr(strategies, name)
    with pytest.raises(AttributeError, match="has no 'FedNope'"):
        _ = strategies.FedNope


def test_the_package_imports_neither_flower_nor_pytorch() -> None:
    code = "import sys, intramural.strategies; print('flwr' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
