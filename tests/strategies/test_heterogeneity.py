"""SCAFFOLD, FedNova and staleness: each as a second implementation has it."""

from typing import Any

import numpy as np
import pytest

from intramural.core.errors import AggregationError, ConfigError
from intramural.core.federation import FederationConfig, Training
from intramural.core.layout import Layout, Vector
from intramural.core.messages import Update
from intramural.core.route import CONTROL, downlink
from intramural.strategies.catalogue import KINDS
from intramural.strategies.fedavg import FedAvg
from intramural.strategies.fednova import step_norm
from intramural.strategies.registry import make_rule
from intramural.strategies.rule import Rule, State
from tests.reference.scaffold import Gradient, Point, fednova_step, scaffold_round
from tests.strategies.lora_rounds import config, trained
from tests.strategies.updates import run_round, update

SIZE = 4
W = Layout((("w", (SIZE,)),))
SCAFFOLD: dict[str, Any] = {
    "training": {"optimizer": "sgd", "learning_rate": 0.05, "local_steps": 10},
    "strategy": {"weights": "equal", "learning_rate": 0.9},
    "sites": {"min": 3},
}


def with_steps(delta: Point | Vector, *, site: str, steps: int | None, weight: int = 1) -> Update:
    one = update(np.asarray(delta, np.float32), site=site, weight=weight)
    return Update(**{**{f: getattr(one, f) for f in one.__dataclass_fields__}, "steps": steps})


def quadratics() -> list[Gradient]:
    """Return gradients of three sites whose minima and curvatures differ."""
    rng = np.random.default_rng(3)
    made: list[Gradient] = []
    for curvature in (0.2, 1.0, 6.0):
        goal, bend = rng.normal(size=SIZE) * 3, np.full(SIZE, curvature)
        made.append(lambda y, goal=goal, bend=bend: bend * (y - goal))  # type: ignore[misc]
    return made


def minimum(gradients: list[Gradient]) -> Point:
    """Return where the mean of the gradients is zero: they are linear."""
    at_zero = np.mean([g(np.zeros(SIZE)) for g in gradients], axis=0)
    slope = np.mean([g(np.ones(SIZE)) for g in gradients], axis=0) - at_zero
    found: Point = -at_zero / slope
    return found


def train(
    rule: Rule, federation: FederationConfig, vector: Vector, own: list[Point], asked: list[int]
) -> list[Update]:
    """Return the sites' updates: plain steps with the correction, as a site makes them."""
    layout = downlink(federation, W)
    named = layout.unflatten(vector)
    x, c = named["w"].astype(np.float64), named[CONTROL + "w"].astype(np.float64)
    sent = []
    for site in asked:
        y = x.copy()
        for _ in range(10):
            y -= 0.05 * (quadratics()[site](y) - own[site] + c)
        own[site] = own[site] - c - (y - x) / (10 * 0.05)
        sent.append(with_steps(y - x, site=f"s{site}", steps=10))
    return sent


@pytest.mark.parametrize("asked", [[0, 1, 2], [0, 2], [1]])
def test_scaffold_is_the_papers_though_sites_send_their_change_alone(asked: list[int]) -> None:
    federation = config("scaffold", **SCAFFOLD)
    rule = make_rule(federation, downlink(federation, W))
    vector = np.zeros(2 * SIZE, dtype=np.float32)
    own = [np.zeros(SIZE) for _ in range(3)]
    state: State = {}
    x, c, theirs = np.zeros(SIZE), np.zeros(SIZE), [np.zeros(SIZE) for _ in range(3)]
    for round_ in range(1, 8):
        sent = train(rule, federation, vector, own, asked)
        vector, state = run_round(rule, state, vector, sent, round_=round_)
        x, c = scaffold_round(
            x, c, theirs, quadratics(), asked, steps=10, rate=0.05, server_rate=0.9
        )
        np.testing.assert_allclose(vector, np.concatenate([x, c]), rtol=1e-4, atol=1e-5)


def test_scaffold_is_the_papers_where_another_cohort_is_drawn_each_round() -> None:
    strategy = SCAFFOLD["strategy"] | {"options": {"population": 3}}
    sites = {"min": 1, "share": 0.5}
    federation = config("scaffold", **SCAFFOLD | {"strategy": strategy, "sites": sites})
    rule = make_rule(federation, downlink(federation, W))
    vector, own = np.zeros(2 * SIZE, dtype=np.float32), [np.zeros(SIZE) for _ in range(3)]
    x, c, theirs = np.zeros(SIZE), np.zeros(SIZE), [np.zeros(SIZE) for _ in range(3)]
    for round_, asked in enumerate([[0, 1], [2], [1, 2], [0], [0, 2], [1]], start=1):
        sent = train(rule, federation, vector, own, asked)
        vector, _ = run_round(rule, {}, vector, sent, round_=round_)
        x, c = scaffold_round(
            x, c, theirs, quadratics(), asked, steps=10, rate=0.05, server_rate=0.9
        )
    np.testing.assert_allclose(vector, np.concatenate([x, c]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(c, np.mean(theirs, axis=0))  # what c is for


def test_scaffold_finds_the_minimum_where_averaging_stays_beside_it() -> None:
    federation = config("scaffold", **SCAFFOLD)
    rule, plain = make_rule(federation, downlink(federation, W)), FedAvg(weights="equal")
    vector, own = np.zeros(2 * SIZE, dtype=np.float32), [np.zeros(SIZE) for _ in range(3)]
    averaged = np.zeros(SIZE, dtype=np.float32)
    for round_ in range(1, 61):
        vector, _ = run_round(
            rule, {}, vector, train(rule, federation, vector, own, [0, 1, 2]), round_=round_
        )
        sent = []
        for site, gradient in enumerate(quadratics()):
            y = averaged.astype(np.float64)
            for _ in range(10):
                y -= 0.05 * gradient(y)
            sent.append(update(np.asarray(y - averaged, np.float32), site=f"s{site}"))
        averaged, _ = run_round(plain, {}, averaged, sent, round_=round_)
    goal = minimum(quadratics())
    assert np.abs(vector[:SIZE] - goal).max() < 1e-3
    assert np.abs(averaged - goal).max() > 0.1


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("training", "optimizer", "adamw"),
        ("training", "momentum", 0.9),
        ("training", "weight_decay", 0.1),
        ("training", "schedule", "linear"),
        ("training", "warmup", 0.1),
        ("training", "gradient_clip", 1.0),
        ("training", "proximal", 0.1),
        ("strategy", "weights", "examples"),
        ("strategy", "momentum", 0.5),
    ],
)
def test_scaffold_refuses_steps_that_it_cannot_undo(section: str, key: str, value: Any) -> None:
    sections = {n: dict(v) for n, v in SCAFFOLD.items()}
    sections[section][key] = value
    federation = config("scaffold", **sections)
    with pytest.raises(ConfigError, match=rf"{section}\.{key} is"):
        make_rule(federation, downlink(federation, W))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"strategy": {"norm_bound": 1.0}}, r"remove strategy\.norm_bound"),
        ({"gate": {}}, r"remove \[gate\]"),
        ({"strategy": {"options": {"population": 2}}}, "population must be .* at least 3, got 2"),
        ({"strategy": {"optimizer": "adam"}}, r"strategy\.optimizer is 'adam'"),
        ({"training": {"local_steps": None, "local_epochs": 1}}, r"set training\.local_steps"),
    ],
)
def test_scaffold_refuses_what_parts_its_control_variate_from_the_sites(
    table: dict[str, Any], message: str
) -> None:
    sections = {n: SCAFFOLD.get(n, {}) | table.get(n, {}) for n in SCAFFOLD | table}
    federation = config("scaffold", **sections)
    with pytest.raises(ConfigError, match=message):
        make_rule(federation, downlink(federation, W))


def test_scaffold_must_know_how_many_sites_there_are() -> None:
    for few in ({"share": 0.5}, {"quorum": 0.5}):  # or c would move as if all had answered
        federation = config("scaffold", **SCAFFOLD | {"sites": {"min": 3} | few})
        with pytest.raises(ConfigError, match=r"set strategy\.options\.population"):
            make_rule(federation, downlink(federation, W))


def sgd(**changes: Any) -> Training:
    table = {"optimizer": "sgd", "learning_rate": 0.1, "local_epochs": 1} | changes
    return Training.model_validate(table)


def test_the_length_of_steps_is_that_of_the_coefficients_written_out() -> None:
    assert step_norm(sgd(), 7) == 7
    assert step_norm(Training.model_validate({"learning_rate": 1.0, "local_epochs": 1}), 5) == 5
    # momentum r: the gradient of step k counts 1 + r + ... + r**(t - 1 - k)
    written_out = sum(sum(0.9**j for j in range(6 - k)) for k in range(6))
    assert step_norm(sgd(momentum=0.9), 6) == pytest.approx(written_out)
    # proximal term: what came before shrinks by 1 - rate * mu at each later step
    shrunk = sum((1 - 0.1 * 2.0) ** (4 - 1 - k) for k in range(4))
    assert step_norm(sgd(proximal=2.0), 4) == pytest.approx(shrunk)
    assert step_norm(sgd(proximal=1e-15), 9) == pytest.approx(9)  # hardly any pull: the steps


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fednova_is_the_papers(momentum: float) -> None:
    epochs = {"local_steps": None, "local_epochs": 1, "batch_size": 8}
    federation = config("fednova", training=epochs | {"optimizer": "sgd", "momentum": momentum})
    rng, steps, weights = np.random.default_rng(1), [3, 11, 40], [24, 81, 320]  # ceil(w / 8) steps
    deltas = [rng.normal(size=SIZE) for _ in steps]
    current = rng.normal(size=SIZE).astype(np.float32)
    sent = [
        with_steps(d, site=f"s{n}", steps=t, weight=w)
        for n, (d, t, w) in enumerate(zip(deltas, steps, weights, strict=True))
    ]
    lengths = [step_norm(federation.training, t) for t in steps]
    wanted = current + fednova_step(deltas, weights, lengths)
    found = [run_round(make_rule(federation, W), {}, current, s)[0] for s in (sent, sent[::-1])]
    np.testing.assert_allclose(found[0], wanted, rtol=1e-5, atol=1e-6)
    assert found[0].tobytes() == found[1].tobytes()


def test_fednova_is_fedavg_where_all_make_the_same_steps() -> None:
    federation = config("fednova", training={"local_steps": 5})
    sent = [with_steps(np.full(SIZE, v), site=f"s{v}", steps=5, weight=v) for v in (1, 2, 5)]
    nova, _ = run_round(make_rule(federation, W), {}, np.zeros(SIZE, np.float32), sent)
    mean, _ = run_round(FedAvg(), {}, np.zeros(SIZE, np.float32), sent)
    np.testing.assert_allclose(nova, mean, rtol=1e-6)
    np.testing.assert_allclose(mean, (1 + 4 + 25) / 8, rtol=1e-6)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"training": {"momentum": 0.9, "proximal": 0.1}}, "set one of them to 0"),
        ({"training": {"proximal": 10.0}}, "must be below 1 .* it is 1; lower one"),
        ({"strategy": {"norm_bound": 1.0}}, "norm_bound bounds nothing"),
    ],
)
def test_fednova_refuses_what_it_cannot_scale(tables: dict[str, Any], message: str) -> None:
    training = {"optimizer": "sgd", "learning_rate": 0.1} | tables.get("training", {})
    federation = config("fednova", **tables | {"training": training})
    with pytest.raises(ConfigError, match=message):
        make_rule(federation, W)


def test_fednova_leaves_out_who_does_not_say_his_steps() -> None:
    rule = make_rule(config("fednova"), W)
    fold = rule.begin({}, np.zeros(SIZE, np.float32), round=1)
    with pytest.raises(AggregationError, match="how many steps"):
        rule.add(fold, with_steps(np.ones(SIZE), site="a", steps=None))
    assert fold.sites == []


EPOCHS = {"local_steps": None, "local_epochs": 3, "batch_size": 8}


@pytest.mark.parametrize(
    ("tables", "steps", "message"),
    [
        ({"training": {"local_steps": 5}}, 6, "says 6 steps, and they must be 5"),
        ({"training": EPOCHS}, 2**62, "must be 9"),  # 3 epochs of ceil(17 / 8) batches
        ({"training": EPOCHS}, 8, "must be 9"),
        ({"training": EPOCHS, "strategy": {"weights": "equal"}}, 10_001, "steps_max is 10000"),
        (
            {
                "training": EPOCHS,
                "strategy": {"weights": "equal", "options": {"steps_max": 90}},
            },
            91,
            "steps_max is 90",
        ),
    ],
)
def test_fednova_refuses_steps_that_cannot_be(
    tables: dict[str, Any], steps: int, message: str
) -> None:
    rule = make_rule(config("fednova", **tables), W)
    fold = rule.begin({}, np.zeros(SIZE, np.float32), round=1)
    with pytest.raises(AggregationError, match=message):
        rule.add(fold, with_steps(np.ones(SIZE), site="a", steps=steps, weight=17))
    assert fold.sites == []
    right = {6: 5, 2**62: 9, 8: 9}.get(steps, steps - 1)
    rule.add(fold, with_steps(np.ones(SIZE), site="a", steps=right, weight=17))
    assert fold.sites == ["a"]


def test_late_updates_count_less_and_the_others_no_more() -> None:
    rule = FedAvg(weights="equal", staleness_power=0.5)
    fold = rule.begin({}, np.zeros(SIZE, np.float32), round=4)
    rule.add(fold, update(np.full(SIZE, 8.0), site="late"))  # from round 1: 3 rounds late
    now = update(np.full(SIZE, 1.0), site="now")
    rule.add(fold, Update(**{f: getattr(now, f) for f in now.__dataclass_fields__} | {"round": 4}))
    found, _ = rule.finish(fold)
    np.testing.assert_allclose(found, (8 / 2 + 1) / 2)  # (1 + 3) ** -0.5 = 1/2


@pytest.mark.parametrize("name", ["fedavg", "ffa-lora", "fedsa-lora"])
def test_rules_that_take_late_updates_weigh_them_as_the_federation_says(name: str) -> None:
    assert KINDS[name].traits.asynchronous
    late = {"buffer": 1, "staleness_power": 0.25}
    powers = []
    for sections in ({"asynchrony": late}, {}):
        made = KINDS[name].make(config(name, **sections), trained())
        assert isinstance(made, FedAvg)
        powers.append(made.staleness_power)
    assert powers == [0.25, None]
