"""The matrix: what each rule can be combined with, and the refusal of what does not fit."""

from collections.abc import Callable
from dataclasses import dataclass

from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.federation_rounds import Strategy
from intramural.core.layout import Layout
from intramural.strategies.catalogue import KINDS
from intramural.strategies.kind import Kind
from intramural.strategies.rule import Traits

FLOWER_PREFIX = "flwr:"
FLOWER_ROBUST = frozenset({"FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan"})
"""Those of Flower's strategies that bear hostile sites; how many, their own options say."""
FLOWER_OWN = "Flower's strategies know strategy.options alone, such as num_malicious_nodes"
"""Why ours do not reach those."""
HOSTILE, STEP_KEYS = "hostile sites", "strategy.optimizer, learning_rate or momentum"


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
        title="asynchrony",
        key="[asynchrony]",
        why="it needs updates that started from the same arrays",
        has=lambda traits: traits.asynchronous,
        asked=lambda federation: federation.asynchrony is not None,
    ),
    Column(
        title=HOSTILE,
        key="strategy.hostile_max or strategy.before",
        why="one hostile site moves its result at will",
        has=lambda traits: traits.byzantine,
        asked=lambda federation: (
            federation.strategy.hostile_max > 0 or federation.strategy.before != "none"
        ),
    ),
    Column(
        title="server optimizer",
        key=STEP_KEYS,
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
            does and can be made with the federation's other settings.
    """
    rule, exchange = federation.strategy.rule, federation.exchange.kind
    if rule in KINDS and KINDS[rule].needs_lora and exchange != "lora":
        raise ConfigError(
            f"strategy.rule = {rule!r} is for exchange.kind = 'lora', and it is {exchange!r}; "
            "use 'fedavg'"
        )
    traits, asked = traits_of(rule), [c for c in COLUMNS if c.asked(federation)]
    refusals = [(c.key, c.why) for c in asked if not c.has(traits)]
    if rule == "scaffold":  # it has a learning rate of its own, and refuses the others itself
        refusals = [(key, why) for key, why in refusals if key != STEP_KEYS]
    if rule.startswith(FLOWER_PREFIX) and traits.byzantine:
        refusals += [(c.key, FLOWER_OWN) for c in asked if c.title == HOSTILE]
    if not refusals:
        return
    key, why = refusals[0]
    raise ConfigError(
        f"strategy.rule = {rule!r} does not go with {key}: {why}; {_remedy(federation, asked)}, or "
        f"leave {key} out"
    )


def _remedy(federation: FederationConfig, asked: list[Column]) -> str:
    """Return which rule to take instead; one that can be made as it stands, if there is one."""
    near = nearest(federation, asked)
    for name in near:
        if complaint(federation, name) is None:
            return f"use {name!r}"
    if near:
        return f"use {near[0]!r} (which then needs more: {complaint(federation, near[0])})"
    return "no rule goes with all that is asked; ask for less"


def complaint(federation: FederationConfig, rule: str) -> str | None:
    """Return why another rule of the catalogue could not be made in this one's place, or None."""
    settings = federation.strategy.model_copy(update={"rule": rule, "options": {}})
    try:
        KINDS[rule].make(federation.model_copy(update={"strategy": settings}), Layout(()))
    except ConfigError as error:
        return str(error)
    return None


def nearest(federation: FederationConfig, asked: list[Column]) -> list[str]:
    """Return the rules that go with all that is asked, those most like the federation's first.

    Those of its character first, for LoRA's factors or not, for hostile sites or not; then those
    that share most declarations; equals in the catalogue's order.
    """
    rule = federation.strategy.rule
    traits, lora = traits_of(rule), federation.exchange.kind == "lora"
    needs_lora = rule in KINDS and KINDS[rule].needs_lora

    def likeness(kind: Kind) -> int:
        known = [column.has for column in COLUMNS] + [lambda traits: traits.exact_for_lora]
        same = sum(1 for has in known if has(kind.traits) == has(traits))
        character = (kind.needs_lora == needs_lora, kind.traits.byzantine == traits.byzantine)
        return same + len(known) * character.count(True)

    fitting = [
        name
        for name, kind in KINDS.items()
        if name != rule
        and (lora or not kind.needs_lora)
        and all(column.has(kind.traits) for column in asked)
    ]
    return sorted(fitting, key=lambda name: -likeness(KINDS[name]))


def table() -> list[list[str]]:
    """Return the matrix as rows of words, the titles first."""
    checks = [(title, has) for title, has in INFORMATION]
    checks += [(column.title, column.has) for column in COLUMNS]
    rows = [["rule", *(title for title, _ in checks)]]
    for name, kind in KINDS.items():
        rows.append([name, *("yes" if has(kind.traits) else "no" for _, has in checks)])
    return rows
