"""The registry: the rule a federation names, with its settings, or a helpful refusal."""

from typing import Any

import pytest

from intramural.core.config import check_config
from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout
from intramural.strategies.fedavg import FedAvg
from intramural.strategies.flower import FlowerRule
from intramural.strategies.registry import make_rule
from intramural.strategies.rule import Rule

LAYOUT = Layout((("w", (2,)),))


def rule_of(**strategy: Any) -> Rule:
    table = {
        "federation": {"name": "a", "rounds": 1},
        "model": {"base": "b"},
        "task": {"kind": "generation"},
        "exchange": {"kind": "lora"},
        "training": {"learning_rate": 0.1, "local_steps": 1},
        "sites": {"min": 1},
        "strategy": strategy,
    }
    return make_rule(check_config(table, FederationConfig, source="f.toml"), LAYOUT)


def test_fedavg_is_the_default_and_takes_every_setting() -> None:
    rule = rule_of(weights="equal", weight_cap=9, learning_rate=0.5, momentum=0.9)
    assert isinstance(rule, FedAvg)
    got = (rule.weights, rule.weight_cap, rule.learning_rate, rule.momentum)
    assert got == ("equal", 9, 0.5, 0.9)


def test_a_flower_rule_takes_its_options() -> None:
    rule = rule_of(rule="flwr:FedTrimmedAvg", options={"beta": 0.3})
    assert isinstance(rule, FlowerRule)
    assert rule.name == "flwr:FedTrimmedAvg"
    assert vars(rule._strategy)["beta"] == 0.3


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ({"rule": "fedavgg"}, r"no rule 'fedavgg'; did you mean 'fedavg'\?"),
        ({"rule": "xyz"}, "no rule 'xyz'; known: fedavg, .*flwr:NAME"),
        ({"rule": "flwr:FedNope"}, "'flwr:FedNope' cannot be used; can: "),
        ({"rule": "flwr:FedYogi", "options": {"x": 1}}, "strategy.options: FedYogi takes only"),
        ({"rule": "fedavg", "options": {"eta": 1}}, "fedavg takes none, not"),
    ],
)
def test_refused(strategy: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rule_of(**strategy)
