"""The registry: from a federation to the rule that it names, with all that stands around it."""

import difflib

from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout
from intramural.core.route import uplink
from intramural.strategies.catalogue import KINDS
from intramural.strategies.fedavg import FedAvg
from intramural.strategies.routed import Routed
from intramural.strategies.rule import Rule
from intramural.strategies.site_dp import Noise, SiteDPFedAvg

FLOWER_PREFIX = "flwr:"


def make_rule(federation: FederationConfig, layout: Layout, *, noise: Noise | None = None) -> Rule:
    """Return the rule of `strategy.rule`.

    Args:
        federation: As checked.
        layout: Of the coordinator's vector.
        noise: Where [site_privacy] takes its noise from; a claim needs a secret generator's.

    Raises:
        ConfigError: No such rule, or options that it does not take.
    """
    name, settings = federation.strategy.rule, federation.strategy
    if name.startswith(FLOWER_PREFIX):
        from intramural.strategies.flower import FlowerRule

        return FlowerRule.named(name.removeprefix(FLOWER_PREFIX), layout, dict(settings.options))
    if name not in KINDS:
        near = difflib.get_close_matches(name, KINDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(KINDS)}, flwr:NAME"
        raise ConfigError(f"strategy.rule: no rule {name!r}; {hint}")
    if unknown := sorted(set(settings.options) - set(KINDS[name].options)):
        takes = sorted(KINDS[name].options) or "none"
        raise ConfigError(f"strategy.options: {name} takes {takes}, not {unknown}; remove them")
    if federation.site_privacy is not None:
        assert noise is not None, "without noise there is nothing to claim"
        return _hiding_sites(federation, noise)
    rule = KINDS[name].make(federation, layout)
    if isinstance(rule, FedAvg):  # it steps in place, with no copy of the model
        rule.learning_rate, rule.momentum = settings.learning_rate, settings.momentum
    if KINDS[name].routed and uplink(federation, layout, round=1) is not layout:
        rule = Routed(rule, federation, layout)
    return rule


def _hiding_sites(federation: FederationConfig, noise: Noise) -> SiteDPFedAvg:
    hidden = federation.site_privacy
    assert hidden is not None
    assert federation.strategy.rule == "fedavg", "the federation allows no other rule"
    return SiteDPFedAvg(
        clip_norm=hidden.clip_norm,
        noise_multiplier=hidden.noise_multiplier,
        divisor=federation.sites.min,
        noise=noise,
        learning_rate=federation.strategy.learning_rate,
        momentum=federation.strategy.momentum,
    )
