"""Server optimizers: the steps of Flower's own, and a memory that survives a restart."""

from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower

from intramural.core.config import check_config
from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout, Vector
from intramural.strategies.fedavg import FedAvg
from intramural.strategies.norm_bound import NormBound
from intramural.strategies.registry import make_rule
from intramural.strategies.rule import Rule, State
from intramural.strategies.server_optimizer import ServerOptimizer
from intramural.strategies.site_dp import Noise, SiteDPFedAvg
from tests.strategies.updates import run_round, update

SIZE, ROUNDS = 300, 6
HIDDEN = {"clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}
LAYOUT = Layout((("w", (SIZE,)),))
PEERS: dict[str, tuple[Any, dict[str, float]]] = {
    "adam": (flower.FedAdam, {"eta": 0.2, "beta_1": 0.8, "beta_2": 0.95, "tau": 0.05}),
    "yogi": (flower.FedYogi, {"eta": 0.2, "beta_1": 0.8, "beta_2": 0.95, "tau": 0.05}),
    "adagrad": (flower.FedAdagrad, {"eta": 0.2, "tau": 0.05}),
    "sgd": (flower.FedAvgM, {"server_learning_rate": 0.2, "server_momentum": 0.8}),
}


def rule_of(*, noise: Noise | None = None, site_privacy: Any = None, **strategy: Any) -> Rule:
    table = {
        "federation": {"name": "a", "rounds": 1},
        "model": {"base": "b"},
        "task": {"kind": "generation"},
        "exchange": {"kind": "lora"},
        "training": {"learning_rate": 0.1, "local_steps": 1},
        "sites": {"min": 7},
        "strategy": strategy,
    }
    if site_privacy is not None:
        table["site_privacy"] = site_privacy
    return make_rule(check_config(table, FederationConfig, source="f.toml"), LAYOUT, noise=noise)


def ours(kind: str, **more: Any) -> Rule:
    options: dict[str, Any] = {"momentum": 0.8} if kind == "sgd" else {"beta_1": 0.8}
    options |= {"beta_1": 0.0} if kind == "adagrad" else {}
    return rule_of(optimizer=kind, learning_rate=0.2, beta_2=0.95, tau=0.05, **options, **more)


def deltas(round_: int) -> list[Vector]:
    rng = np.random.default_rng(round_)
    return [rng.normal(scale=0.3, size=SIZE).astype(np.float32) for _ in range(3)]


class _OneNode:
    def get_node_ids(self) -> list[int]:
        return [1]


def flowers_rounds(kind: str) -> list[Any]:
    """Return the arrays after each round, shape `(SIZE,)`, in float64."""
    made, options = PEERS[kind]
    strategy = made(min_train_nodes=1, min_available_nodes=1, **options)
    current, found = np.ones(SIZE), []
    for round_ in range(1, ROUNDS + 1):
        record = ArrayRecord({"w": Array(current)})
        list(strategy.configure_train(round_, record, ConfigRecord(), cast(Grid, _OneNode())))
        replies = []
        for number, delta in enumerate(deltas(round_)):
            content = RecordDict(
                {
                    "arrays": ArrayRecord({"w": Array(current + delta)}),
                    "metrics": MetricRecord({"num-examples": number + 1}),
                }
            )
            replies.append(Message(content, number + 1, "train"))
        arrays, _ = strategy.aggregate_train(round_, replies)
        current = arrays["w"].numpy()
        assert current.dtype == np.float64
        found.append(current)
    return found


def our_rounds(rule: Rule, state: State, current: Vector, rounds: range) -> tuple[Vector, State]:
    for round_ in rounds:
        sent = [update(d, site=f"s{n}", weight=n + 1) for n, d in enumerate(deltas(round_))]
        current, state = run_round(rule, state, current, sent, round_=round_)
    return current, state


@pytest.mark.parametrize("kind", list(PEERS))
def test_steps_are_those_of_flowers_strategy(kind: str) -> None:
    current, state = np.ones(SIZE, dtype=np.float32), cast(State, {})
    for round_, wanted in enumerate(flowers_rounds(kind), start=1):
        current, state = our_rounds(ours(kind), state, current, range(round_, round_ + 1))
        np.testing.assert_allclose(current, wanted, rtol=1e-6, atol=1e-9)
    assert np.abs(current - 1).max() > 0.05  # it moved, so there was something to compare


def test_momentum_around_any_rule_is_flowers_too() -> None:
    rule = ServerOptimizer(
        FedAvg(), "sgd", learning_rate=0.2, momentum=0.8, beta_1=0.9, beta_2=0.99, tau=1e-3
    )
    current, state = np.ones(SIZE, dtype=np.float32), cast(State, {})
    for round_, wanted in enumerate(flowers_rounds("sgd"), start=1):
        current, state = our_rounds(rule, state, current, range(round_, round_ + 1))
        np.testing.assert_allclose(current, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", list(PEERS))
def test_a_restart_between_rounds_changes_no_bit(kind: str) -> None:
    start = np.ones(SIZE, dtype=np.float32)
    whole, memory = our_rounds(ours(kind), {}, start, range(1, 7))
    half, state = our_rounds(ours(kind), {}, start, range(1, 4))
    rest, end = our_rounds(ours(kind), {n: a.copy() for n, a in state.items()}, half, range(4, 7))
    assert rest.tobytes() == whole.tobytes()
    assert {n: a.tobytes() for n, a in end.items()} == {n: a.tobytes() for n, a in memory.items()}


def test_the_rules_own_memory_stands_beside_the_optimizers() -> None:
    rule = ours("adam", rule="centred-clipping", hostile_max=1)
    _, state = our_rounds(rule, {}, np.ones(SIZE, dtype=np.float32), range(1, 3))
    own = {name for name in state if not name.startswith("optimizer/")}
    assert own
    assert set(state) - own == {"optimizer/m", "optimizer/v"}


def test_a_rate_is_taken_once_behind_a_norm_bound() -> None:
    rule = rule_of(learning_rate=0.5, norm_bound=1e6)
    assert isinstance(rule, NormBound)
    found, _ = run_round(rule, {}, np.zeros(SIZE, np.float32), [update(np.ones(SIZE, np.float32))])
    np.testing.assert_allclose(found, 0.5)


def test_flowers_strategies_take_the_rate_too() -> None:
    rule = rule_of(rule="flwr:FedAvg", learning_rate=0.5)
    found, _ = run_round(rule, {}, np.zeros(SIZE, np.float32), [update(np.ones(SIZE, np.float32))])
    np.testing.assert_allclose(found, 0.5)


def test_an_optimizer_steps_along_the_noised_mean_of_hidden_sites() -> None:
    def silent(size: int, std: float) -> Vector:
        return np.zeros(size, np.float32)

    hidden = {"weights": "equal", "learning_rate": 0.25}
    plain = rule_of(noise=silent, site_privacy=HIDDEN, **hidden)
    assert isinstance(plain, SiteDPFedAvg)
    rule = rule_of(noise=silent, site_privacy=HIDDEN, optimizer="adagrad", beta_1=0.0, **hidden)
    assert isinstance(rule, ServerOptimizer)
    long = update(np.full(SIZE, 100, np.float32))
    found, _ = run_round(rule, {}, np.zeros(SIZE, np.float32), [long])
    d = 1 / np.sqrt(SIZE) / 7  # cut to length 1, of 7 sites; adagrad's first step has sqrt(v) = d
    np.testing.assert_allclose(found, 0.25 * d / (d + 1e-3), rtol=1e-4)


def test_plain_averaging_has_no_optimizer_around_it() -> None:
    assert isinstance(rule_of(), FedAvg)
    assert isinstance(rule_of(learning_rate=0.5, momentum=0.9), FedAvg)
    assert isinstance(rule_of(optimizer="adam"), ServerOptimizer)
    assert not isinstance(rule_of(rule="median"), ServerOptimizer)
    assert isinstance(rule_of(rule="median", momentum=0.5), ServerOptimizer)


@pytest.mark.parametrize("rule", ["fedsvd", "flora", "flexlora", "fedex-lora"])
@pytest.mark.parametrize(
    "strategy", [{"optimizer": "yogi"}, {"learning_rate": 0.5}, {"momentum": 0.9}]
)
def test_a_rule_that_sets_arrays_anew_has_no_step(rule: str, strategy: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="sets the arrays anew, and makes no step"):
        rule_of(rule=rule, **strategy)
