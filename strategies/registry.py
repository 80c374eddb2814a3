"""The registry: from a federation to the rule that it names, with all that stands around it."""

import difflib

from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout, Vector
from intramural.core.route import uplink
from intramural.strategies.catalogue import KINDS
from intramural.strategies.fedavg import FedAvg
from intramural.strategies.lora_error import AggregationErrorMeter
from intramural.strategies.matrix import FLOWER_PREFIX, check_fits
from intramural.strategies.measured import Measured
from intramural.strategies.norm_bound import NormBound
from intramural.strategies.routed import Routed
from intramural.strategies.rule import Rule
from intramural.strategies.scaffold import Scaffold
from intramural.strategies.server_optimizer import ServerOptimizer
from intramural.strategies.site_dp import Noise, SiteDPFedAvg


def check_rule(federation: FederationConfig) -> None:
    """Do nothing if there is such a rule, and it goes with all that the federation asks for.

    All that can be known without a model; with one, `make_rule` finds the rest.

    Raises:
        ConfigError: As `make_rule`.
    """
    make_rule(federation, Layout(()), noise=_never)


def _never(size: int, std: float) -> Vector:
    raise AssertionError("a rule that is made to be checked runs no round")


def _check_named(federation: FederationConfig) -> None:
    """Refuse a rule that is none of ours, or options that it does not take."""
    name = federation.strategy.rule
    if name not in KINDS:
        near = difflib.get_close_matches(name, KINDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(KINDS)}, flwr:NAME"
        raise ConfigError(f"strategy.rule: no rule {name!r}; {hint}")
    if unknown := sorted(set(federation.strategy.options) - set(KINDS[name].options)):
        takes = sorted(KINDS[name].options) or "none"
        raise ConfigError(f"strategy.options: {name} takes {takes}, not {unknown}; remove them")


def make_rule(federation: FederationConfig, layout: Layout, *, noise: Noise | None = None) -> Rule:
    """Return the rule of `strategy.rule`.

    Args:
        federation: As checked.
        layout: Of the coordinator's vector.
        noise: Where [site_privacy] takes its noise from; a claim needs a secret generator's.

    Raises:
        ConfigError: No such rule, options that it does not take, or what it does not go with: see
            `check_fits`, and the rule's own function.
    """
    name, settings = federation.strategy.rule, federation.strategy
    if not name.startswith(FLOWER_PREFIX):
        _check_named(federation)
    check_fits(federation)
    if name.startswith(FLOWER_PREFIX):
        from intramural.strategies.flower import FlowerRule

        options = dict(settings.options)
        flower: Rule = FlowerRule.named(name.removeprefix(FLOWER_PREFIX), layout, options)
        return _bounded(_stepping(flower, federation), federation)
    if federation.site_privacy is not None:
        assert noise is not None, "without noise there is nothing to claim"
        if settings.norm_bound is not None:
            raise ConfigError(
                "strategy.norm_bound: [site_privacy] cuts updates to its clip_norm; remove it"
            )
        return _hiding_sites(federation, noise)
    rule = KINDS[name].make(federation, layout)
    if isinstance(rule, FedAvg) and settings.optimizer == "sgd":
        rule.learning_rate, rule.momentum = settings.learning_rate, settings.momentum
    rule = _bounded(_stepping(rule, federation), federation)
    if KINDS[name].routed and uplink(federation, layout, round=1) is not layout:
        rule = Routed(rule, federation, layout)
    meter = AggregationErrorMeter(federation, layout)
    return Measured(rule, meter) if meter.applies else rule


def _stepping(rule: Rule, federation: FederationConfig) -> Rule:
    """Return the rule as the step of the server's optimizer, where that is not plain."""
    settings = federation.strategy
    if isinstance(rule, FedAvg | Scaffold) and settings.optimizer == "sgd":
        return rule  # it has a rate of its own, and takes no copy of the model
    plain = ("sgd", 0.0, 1.0)
    if (settings.optimizer, settings.momentum, settings.learning_rate) == plain:
        return rule
    return ServerOptimizer(
        rule,
        settings.optimizer,
        learning_rate=settings.learning_rate,
        momentum=settings.momentum,
        beta_1=settings.beta_1,
        beta_2=settings.beta_2,
        tau=settings.tau,
    )


def _bounded(rule: Rule, federation: FederationConfig) -> Rule:
    """Return the rule, behind the norm bound where the federation sets one.

    Raises:
        ConfigError: Ranks are mixed: a small one's update leads the factors that it lacks to zero,
            which is no way that its training went.
    """
    bound = federation.strategy.norm_bound
    if bound is not None and federation.exchange.rank_min is not None:
        raise ConfigError(
            "strategy.norm_bound measures an update whole, and with exchange.rank_min those of "
            "small ranks hold more than was trained; remove one of the two"
        )
    return rule if bound is None else NormBound(rule, bound)


def _hiding_sites(federation: FederationConfig, noise: Noise) -> Rule:
    """Return the rule that noises the sum; another optimizer's step is made of its result alone."""
    hidden, settings = federation.site_privacy, federation.strategy
    assert hidden is not None
    assert settings.rule == "fedavg", "the federation allows no other rule"
    is_plain = settings.optimizer == "sgd"
    rule = SiteDPFedAvg(
        clip_norm=hidden.clip_norm,
        noise_multiplier=hidden.noise_multiplier,
        divisor=federation.sites.min,
        noise=noise,
        learning_rate=settings.learning_rate if is_plain else 1.0,
        momentum=settings.momentum if is_plain else 0.0,
    )
    return rule if is_plain else _stepping(rule, federation)
