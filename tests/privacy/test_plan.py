"""PrivacyPlan: constants of a federation's file, and what they cost."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.privacy.accountant import SCREEN_INTERVAL, Event, epsilon_pld
from intramural.privacy.plan import PrivacyPlan, evaluations
from intramural.server import machine
from intramural.server.machine import Phase
from tests.reference.pld import Part, pld_epsilon
from tests.tiny import federation

PRIVACY: dict[str, Any] = {
    "unit": "record",
    "noise_multiplier": 1.5,
    "delta": 1e-5,
    "clip_norm": 0.5,
    "nominal_records": 1000,
}


def config(*, privacy: dict[str, Any] | None = None, **sections: Any) -> FederationConfig:
    table = {k: v for k, v in (PRIVACY | (privacy or {})).items() if v is not None}
    sections.setdefault("strategy", {"weights": "equal"})
    return federation(Path("base"), privacy=table, **sections)


def plan(*, privacy: dict[str, Any] | None = None, **sections: Any) -> PrivacyPlan:
    return PrivacyPlan.of(config(privacy=privacy, **sections))


def test_rate_and_divisor_are_public_constants() -> None:
    found = plan(training={"batch_size": 40})
    assert (found.sample_rate, found.divisor, found.nominal_units) == (0.04, 40.0, 1000)
    assert (found.noise_multiplier, found.clip_norm, found.delta) == (1.5, 0.5, 1e-5)
    assert (found.unit, found.relation, found.engine) == ("record", "add-remove", "bookkeeping")
    assert found.records_per_person is None


def test_a_round_is_local_steps_or_passes_over_the_nominal_units() -> None:
    assert plan(training={"local_steps": 7}).steps == 7
    # 1000 units in batches of 32 are 31.25 batches a pass: 32
    epochs = {"local_epochs": 3, "local_steps": None, "batch_size": 32}
    sections = {k: v for k, v in epochs.items() if v is not None}
    content = config().model_dump()
    content["training"] |= {"local_steps": None, **sections}
    assert PrivacyPlan.of(FederationConfig.model_validate(content)).steps == 96


def test_persons_are_counted_as_persons() -> None:
    person = {"unit": "person", "nominal_persons": 200, "records_per_person": 4}
    found = plan(privacy=person, training={"batch_size": 20})
    assert (found.unit, found.sample_rate, found.divisor) == ("person", 0.1, 20.0)
    assert (found.records_per_person, found.nominal_units) == (4, 200)


def test_a_batch_of_all_units_is_allowed_and_warned_of() -> None:
    found = plan(training={"batch_size": 1000})
    assert found.sample_rate == 1.0
    assert found.warnings() == ["every unit is in every step: sampling adds no privacy"]


def test_events_and_costs_are_those_of_the_rounds() -> None:
    found = plan(federation={"rounds": 5}, training={"local_steps": 20})
    one = Event(sample_rate=0.008, noise_multiplier=1.5, steps=20)
    assert found.event() == one
    assert found.event(3).steps == 3
    assert found.total() == (Event(sample_rate=0.008, noise_multiplier=1.5, steps=100),)
    assert found.total(0) == ()
    assert found.cost(0) == 0.0
    expected = epsilon_pld([one] * 5, delta=1e-5, relation="add-remove", interval=SCREEN_INTERVAL)
    assert found.cost(interval=SCREEN_INTERVAL) == pytest.approx(expected, rel=1e-6)
    costs = [found.cost(rounds, interval=SCREEN_INTERVAL) for rounds in range(6)]
    assert costs == sorted(set(costs))


def test_epsilon_is_kept_over_all_rounds_and_evaluations() -> None:
    privacy = {"noise_multiplier": None, "epsilon": 2.5, "metrics_noise": 20.0}
    found = plan(
        privacy=privacy,
        federation={"rounds": 10},
        training={"local_steps": 10, "batch_size": 40},
        evaluation={"every": 3},
    )
    # validation after rounds 3, 6, 9 and 10, then a test
    assert found.total()[1] == Event(sample_rate=1.0, noise_multiplier=20.0, steps=5)
    assert 2.49 < found.cost() <= 2.5
    silent = plan(
        privacy=privacy | {"metrics_noise": None},
        federation={"rounds": 10},
        training={"local_steps": 10, "batch_size": 40},
    )
    assert silent.metrics_event() is None
    assert silent.noise_multiplier < found.noise_multiplier
    assert 2.49 < silent.cost() <= 2.5


def test_a_federation_that_replaces_units_is_costed_so() -> None:
    found = plan(privacy={"relation": "replace-one"}, training={"local_steps": 10})
    assert found.relation == "replace-one"
    part = (0.008, 1.5, 20)  # two rounds of ten steps, 8 of 1000
    expected = pld_epsilon(part, delta=1e-5, relation="replace-one")
    assert expected > 1.05 * pld_epsilon(part, delta=1e-5)  # or the next line would show nothing
    assert found.cost() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("metrics", "evaluated"),
    # two evaluations on validation and one on test
    [({}, []), ({"metrics_noise": 20.0}, [(1.0, 20.0, 3)])],
)
def test_noise_keeps_a_federation_that_replaces_units_within_its_epsilon(
    metrics: dict[str, Any], evaluated: list[Part]
) -> None:
    privacy = {"noise_multiplier": None, "epsilon": 2.5, "relation": "replace-one"} | metrics
    found = plan(privacy=privacy, training={"local_steps": 10, "batch_size": 40})
    parts = [(0.04, found.noise_multiplier, 20), *evaluated]
    assert 2.49 < pld_epsilon(*parts, delta=1e-5, relation="replace-one") <= 2.5


def test_a_plan_is_made_once_and_always_the_same() -> None:
    privacy = {"noise_multiplier": None, "epsilon": 2.5}
    assert plan(privacy=privacy) == plan(privacy=privacy)


@pytest.mark.parametrize("rounds", [1, 2, 7, 10])
@pytest.mark.parametrize("every", [0, 1, 2, 3, 20])
def test_evaluations_are_those_the_server_asks_for(rounds: int, every: int) -> None:
    rules = machine.Rules(rounds=rounds, sites_min=1, evaluate_every=every)
    state, asked = machine.State(), [0] * (rounds + 1)
    while state.phase is not Phase.DONE:
        if state.phase is Phase.WAIT:
            sites = frozenset({"a"})
            state, effects = machine.step(
                rules, state, machine.Sites(eligible=sorted(sites), now_s=0)
            )
            if state.phase is Phase.WAIT:
                state = machine.chosen(rules, state, sites, 0.0)
        else:
            answer = machine.Answer(
                site="a", phase=state.phase, round=state.round, attempt=1, good=True
            )
            state, _ = machine.step(rules, state, answer)
            state, effects = machine.step(rules, state, machine.Tick(now_s=0))
        for effect in effects:
            if isinstance(effect, machine.Evaluate):
                asked[effect.round] += 1
    planned = [evaluations(done, every, rounds) for done in range(rounds + 1)]
    assert planned == list(itertools.accumulate(asked))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"training": {"batch_size": 1001}}, "privacy.nominal_records = 1000, so the sample rate"),
        ({"strategy": {"weights": "examples"}}, 'set strategy.weights = "equal"'),
        (
            {"training": {"gradient_checkpointing": True}, "privacy": {"engine": "opacus"}},
            "hides layers from privacy.engine = 'opacus'",
        ),
        ({"privacy": {"noise_multiplier": None, "epsilon": 1e-6}}, "raise privacy.epsilon"),
    ],
)
def test_impossible_plans_are_refused(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan(**sections)


def test_all_that_is_wrong_is_said_at_once_and_persons_are_named() -> None:
    person = {"unit": "person", "nominal_persons": 20, "records_per_person": 4}
    with pytest.raises(ConfigError, match=r"nominal_persons = 20[\s\S]*strategy\.weights"):
        plan(privacy=person, training={"batch_size": 21}, strategy={"weights": "examples"})


def test_no_privacy_is_no_plan() -> None:
    with pytest.raises(ConfigError, match=r"add the table \[privacy\]"):
        PrivacyPlan.of(federation(Path("base")))


def test_clipping_what_is_noised_is_post_processing() -> None:
    assert plan(training={"gradient_clip": 1.0}) == plan()


def test_unwise_plans_are_warned_of() -> None:
    assert plan().warnings() == []
    found = plan(privacy={"delta": 5e-4, "noise_multiplier": 0.3}).warnings()
    assert [line.split(":")[0] for line in found] == [
        "delta 0.0005 is above 1 / (10 x 1000 records)",
        "noise multiplier 0.3 is below 0.5",
    ]
