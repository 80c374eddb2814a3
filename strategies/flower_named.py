"""Our rules under names of their own, as strategies of a stock Flower app."""

import inspect
from typing import Any

from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from intramural.core.config import check_config
from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.federation_rounds import Strategy as Settings
from intramural.core.layout import Layout
from intramural.core.route import pairs_of, uplink
from intramural.strategies.catalogue import KINDS
from intramural.strategies.fedavg import FedAvg
from intramural.strategies.flower import RuleStrategy
from intramural.strategies.registry import make_rule
from intramural.strategies.robust import Robust

NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "FedAvg": ("fedavg", {}),
    "FedAvgM": ("fedavg", {"momentum": 0.9}),
    "FedAdam": ("fedavg", {"optimizer": "adam", "learning_rate": 0.1}),
    "FedYogi": ("fedavg", {"optimizer": "yogi", "learning_rate": 0.1}),
    "FedAdagrad": ("fedavg", {"optimizer": "adagrad", "beta_1": 0.0, "learning_rate": 0.1}),
    "FFALora": ("ffa-lora", {}),
    "RoLoRA": ("rolora", {}),
    "FedSVD": ("fedsvd", {}),
    "FlexLoRA": ("flexlora", {}),
    "Median": ("median", {}),
    "TrimmedMean": ("trimmed-mean", {"hostile_max": 1}),
    "Krum": ("krum", {"hostile_max": 1}),
    "MultiKrum": ("multi-krum", {"hostile_max": 1}),
    "GeometricMedian": ("geometric-median", {}),
    "CentredClipping": ("centred-clipping", {}),
}
"""By class name: the rule, and what its options are unless said otherwise."""
SITE_PART = {
    "FLoRA": "FedSVD",
    "FedExLora": "FedSVD",
    "FedSALora": "FFALora",
    "Scaffold": "FedAvg",
    "FedNova": "FedAvg",
}
"""Rules that need a part at the sites which a stock client lacks, and what works instead."""
MIN_NODES = "min_train_nodes"
FLOWERS = frozenset(inspect.signature(FlowerFedAvg).parameters)
"""Options of Flower's own."""
ENOUGH = 1 << 20
"""Sites of a federation that is there for its rule alone; how many reply, a round finds out."""


class NamedStrategy(RuleStrategy):
    """A rule whose layout is known when the first arrays come.

    Options of the rule (those of [strategy], and of strategy.options) and of Flower's FedAvg are
    keywords, and `seed`, which the order of bucketing is drawn from. Where the rule has the sites
    train one LoRA factor, a client must freeze the other, and need not send it: a reply that moved
    it is left out.
    RoLoRA's clients train B in odd rounds and A in even ones; `server-round` in their
    configuration tells which it is. A robust rule asks for as many nodes as its hostile ones need,
    unless `min_train_nodes` asks for more.

    Example:
        `FedSVD(fraction_train=0.5).start(grid, initial_arrays, num_rounds=3)`
    """

    named = "FedAvg"

    def __init__(self, *, seed: int = 0, **options: Any) -> None:
        """Sort the options, and check those of the rule.

        Raises:
            ConfigError: One does not fit.
            TypeError: There is no such option.
        """
        name, defaults = NAMED[self.named]
        ours = set(Settings.model_fields) - {"rule", "options"}
        told = defaults | {key: options.pop(key) for key in sorted(ours & set(options))}
        inner = {key: options.pop(key) for key in KINDS[name].options if key in options}
        if unknown := sorted(set(options) - FLOWERS):
            known = sorted({*ours, *KINDS[name].options, "seed"} | FLOWERS)
            raise TypeError(f"{self.named} takes no {unknown}; it takes {known}")
        table = {
            "federation": {"name": "flower", "rounds": 1, "seed": seed},
            "model": {"base": "the app's"},
            "task": {"kind": "generation"},
            "exchange": {"kind": "lora"},
            "training": {"learning_rate": 0.1, "local_steps": 1},
            "strategy": told | {"rule": name, "options": inner},
            "sites": {"min": ENOUGH},
        }
        self.federation = check_config(table, FederationConfig, source=self.named)
        make_rule(self.federation, Layout(()))  # now, and not when the first round is over
        made = KINDS[name].make(self.federation, Layout(()))
        least = max(2, made.least) if isinstance(made, Robust) else 2
        options = {MIN_NODES: least, "min_available_nodes": least} | options
        if isinstance(made, Robust) and options[MIN_NODES] < made.least:
            raise ConfigError(
                f"{self.named}: hostile_max = {made.hostile_max} needs {made.least} replies a "
                f"round, and min_train_nodes = {options[MIN_NODES]} may bring fewer; raise it, or "
                "lower hostile_max"
            )
        super().__init__(FedAvg(), **options)
        self._layout: Layout | None = None

    def _prepare(self) -> None:
        """Make the rule when its arrays are seen first.

        Raises:
            ConfigError: It acts on LoRA's factors, and there are none.
        """
        layout = self.layout()
        if layout == self._layout:
            return
        names = tuple(name for name, _ in layout.entries)
        if KINDS[NAMED[self.named][0]].needs_lora and not pairs_of(names):
            raise ConfigError(
                f"{self.named} acts on LoRA's factors, and no arrays are named as PEFT names them "
                "('LAYER.lora_A.weight' and 'LAYER.lora_B.weight'); send them by name, or use "
                "FedAvg"
            )
        self._layout, self.rule, self.state = layout, make_rule(self.federation, layout), {}

    def _uplink(self, layout: Layout, server_round: int) -> Layout:
        """Return the layout of what the rule has the clients train in a round."""
        return uplink(self.federation, layout, round=server_round)


def named_strategy(name: str) -> type[NamedStrategy]:
    """Return the strategy class of that name.

    Raises:
        ConfigError: The rule needs a part at the sites that a stock client lacks.
        KeyError: There is none.
    """
    if name in SITE_PART:
        raise ConfigError(
            f"{name} needs a part at the sites, which a stock Flower client lacks; use "
            f"{SITE_PART[name]}, or run it with `intramural`"
        )
    rule, _ = NAMED[name]
    doc = f"{KINDS[rule].title}, as a strategy of a stock Flower app; see `NamedStrategy`."
    return type(name, (NamedStrategy,), {"named": name, "__doc__": doc, "__module__": __name__})
