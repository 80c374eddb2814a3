"""The registry: a rule by the name a federation gives it."""

import difflib
from collections.abc import Callable

from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout
from intramural.strategies.fedavg import FedAvg
from intramural.strategies.rule import Rule

RULES: dict[str, Callable[[FederationConfig], Rule]] = {
    "fedavg": lambda federation: FedAvg(
        weights=federation.strategy.weights,
        weight_cap=federation.strategy.weight_cap,
        learning_rate=federation.strategy.learning_rate,
        momentum=federation.strategy.momentum,
    ),
}
FLOWER_PREFIX = "flwr:"


def make_rule(federation: FederationConfig, layout: Layout) -> Rule:
    """Return the rule of `strategy.rule`.

    Raises:
        ConfigError: No such rule, or options that it does not take.
    """
    name = federation.strategy.rule
    if name.startswith(FLOWER_PREFIX):
        from intramural.strategies.flower import FlowerRule

        return FlowerRule.named(
            name.removeprefix(FLOWER_PREFIX), layout, dict(federation.strategy.options)
        )
    if name not in RULES:
        near = difflib.get_close_matches(name, RULES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(RULES)}, flwr:NAME"
        raise ConfigError(f"strategy.rule: no rule {name!r}; {hint}")
    if federation.strategy.options:
        raise ConfigError("strategy.options: only a 'flwr:' rule takes options; remove them")
    return RULES[name](federation)
