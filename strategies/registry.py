"""The registry: a rule by the name a federation gives it."""

import difflib
from collections.abc import Callable

from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout
from intramural.strategies.fedavg import FedAvg
from intramural.strategies.rule import Rule
from intramural.strategies.site_dp import Noise, SiteDPFedAvg

RULES: dict[str, Callable[[FederationConfig], Rule]] = {
    "fedavg": lambda federation: FedAvg(
        weights=federation.strategy.weights,
        weight_cap=federation.strategy.weight_cap,
        learning_rate=federation.strategy.learning_rate,
        momentum=federation.strategy.momentum,
    ),
}
FLOWER_PREFIX = "flwr:"


def make_rule(federation: FederationConfig, layout: Layout, *, noise: Noise | None = None) -> Rule:
    """Return the rule of `strategy.rule`.

    Args:
        federation: As checked.
        layout: Of the arrays that travel.
        noise: Where [site_privacy] takes its noise from; a claim needs a secret generator's.

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
    hidden = federation.site_privacy
    if hidden is None:
        return RULES[name](federation)
    assert name == "fedavg", "the federation allows no other rule"
    assert noise is not None, "without noise there is nothing to claim"
    return SiteDPFedAvg(
        clip_norm=hidden.clip_norm,
        noise_multiplier=hidden.noise_multiplier,
        divisor=federation.sites.min,
        noise=noise,
        learning_rate=federation.strategy.learning_rate,
        momentum=federation.strategy.momentum,
    )
