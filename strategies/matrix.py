"""The matrix: what each rule can be combined with, and the refusal of what does not fit."""

from collections.abc import Callable
from dataclasses import dataclass

from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.federation_rounds import Strategy
from intramural.strategies.catalogue import KINDS
from intramural.strategies.kind import Kind
from intramural.strategies.rule import Traits

FLOWER_PREFIX = "flwr:"
FLOWER_ROBUST = frozenset({"FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan"})
"""Those of Flower's strategies that bear hostile sites; how many, their own options say."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One thing that a federation may ask of its rule."""

    title: str
    key: str
    """The key of federation.toml that asks for it."""
    why: str
    """Why a rule without it is refused."""
    has: Callable[[Traits], bool]
    asked: Callable[[FederationConfig], bool]


def _steps(strategy: Strategy) -> bool:
    plain = ("sgd", 0.0, 1.0)
    return (strategy.optimizer, strategy.momentum, strategy.learning_rate) != plain


COLUMNS: tuple[Column, ...] = (
    Column(
        title="record DP",
        key="[privacy]",
        why="it was not examined, or makes no sense, on noised updates",
        has=lambda traits: traits.record_dp,
        asked=lambda federation: federation.privacy is not None,
    ),
    Column(
        title="site DP",
        key="[site_privacy]",
        why="its result does not follow from one bounded sum, which noise could hide a site in",
        has=lambda traits: traits.site_dp,
        asked=lambda federation: federation.site_privacy is not None,
    ),
    Column(
        title="mixed ranks",
        key="exchange.rank_min",
        why="factors of different ranks cannot be averaged apart",
        has=lambda traits: traits.mixed_ranks,
        asked=lambda federation: federation.exchange.rank_min is not None,
    ),
    Column(
        title="hostile sites",
        key="strategy.hostile_max or strategy.before",
        why="one hostile site moves its result at will",
        has=lambda traits: traits.byzantine,
        asked=lambda federation: (
            federation.strategy.hostile_max > 0 or federation.strategy.before != "none"
        ),
    ),
    Column(
        title="server optimizer",
        key="strategy.optimizer, learning_rate or momentum",
        why="it sets the arrays anew, and makes no step",
        has=lambda traits: traits.optimizer,
        asked=lambda federation: _steps(federation.strategy),
    ),
)
INFORMATION: tuple[tuple[str, Callable[[Traits], bool]], ...] = (
    ("exact for LoRA", lambda traits: traits.exact_for_lora),
    ("sums alone", lambda traits: traits.sums_only),
)
"""What a rule declares and no key asks for; 'sums alone' is what secure aggregation will need."""


def traits_of(rule: str) -> Traits:
    """Return what a rule declares, one of Flower's too."""
    if rule.startswith(FLOWER_PREFIX):
        robust = rule.removeprefix(FLOWER_PREFIX) in FLOWER_ROBUST
        return Traits(sums_only=False, exact_for_lora=False, mixed_ranks=False, byzantine=robust)
    return KINDS[rule].traits


def check_fits(federation: FederationConfig) -> None:
    """Do nothing if the federation's rule goes with all that it asks for.

    Raises:
        ConfigError: It does not; the message names the key, the reason, and the nearest rule that
            does.
    """
    rule, exchange = federation.strategy.rule, federation.exchange.kind
    if rule in KINDS and KINDS[rule].needs_lora and exchange != "lora":
        raise ConfigError(
            f"strategy.rule = {rule!r} is for exchange.kind = 'lora', and it is {exchange!r}; "
            "use 'fedavg'"
        )
    if federation.asynchrony is not None:
        raise ConfigError(
            "[asynchrony]: rounds that do not wait for their cohort are not built yet; remove the "
            "table"
        )
    traits, asked = traits_of(rule), [c for c in COLUMNS if c.asked(federation)]
    if rule == "scaffold":  # it has a learning rate of its own, and refuses the others itself
        asked = [c for c in asked if c.title != "server optimizer"]
    missing = [column for column in asked if not column.has(traits)]
    if not missing:
        return
    first = missing[0]
    near = nearest(rule, asked, lora=exchange == "lora")
    remedy = f"use {near!r}" if near else "no rule goes with all that is asked; ask for less"
    raise ConfigError(
        f"strategy.rule = {rule!r} does not go with {first.key}: {first.why}; {remedy}, or leave "
        f"{first.key} out"
    )


def nearest(rule: str, asked: list[Column], *, lora: bool) -> str | None:
    """Return the rule that goes with all that is asked and is otherwise most like `rule`.

    One for LoRA's factors if it is one, then the one that shares most declarations; among equals
    the first of the catalogue.
    """
    traits = traits_of(rule)
    needs_lora = rule in KINDS and KINDS[rule].needs_lora

    def likeness(kind: Kind) -> int:
        known = [column.has for column in COLUMNS] + [lambda traits: traits.exact_for_lora]
        same = sum(1 for has in known if has(kind.traits) == has(traits))
        return same + (len(known) if kind.needs_lora == needs_lora else 0)

    fitting = [
        name
        for name, kind in KINDS.items()
        if name != rule
        and (lora or not kind.needs_lora)
        and all(column.has(kind.traits) for column in asked)
    ]
    return max(fitting, key=lambda name: likeness(KINDS[name]), default=None)


def table() -> list[list[str]]:
    """Return the matrix as rows of words, the titles first."""
    checks = [(title, has) for title, has in INFORMATION]
    checks += [(column.title, column.has) for column in COLUMNS]
    rows = [["rule", *(title for title, _ in checks)]]
    for name, kind in KINDS.items():
        rows.append([name, *("yes" if has(kind.traits) else "no" for _, has in checks)])
    return rows
