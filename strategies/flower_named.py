"""Our rules under names of their own, as strategies of a stock Flower app."""

from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from intramural.core.config import check_config
from intramural.core.errors import ConfigError, WireError
from intramural.core.federation import FederationConfig
from intramural.core.federation_rounds import Strategy as Settings
from intramural.core.layout import Layout, Vector
from intramural.core.route import Part, uplink
from intramural.strategies.catalogue import KINDS
from intramural.strategies.fedavg import FedAvg
from intramural.strategies.flower import RuleStrategy
from intramural.strategies.registry import make_rule

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


class NamedStrategy(RuleStrategy):
    """A rule whose layout is known when the first arrays come.

    Options of the rule (those of [strategy], and of strategy.options) and of Flower's FedAvg are
    keywords. LoRA's `rank` and `alpha` too; they matter to FlexLoRA alone. Where the rule has the
    sites train one LoRA factor, a client must freeze the other: a reply that moved it is left out.
    RoLoRA's clients train B in odd rounds and A in even ones; `server-round` in their
    configuration tells which it is.

    Example:
        `FedSVD(fraction_train=0.5).start(grid, initial_arrays, num_rounds=3)`
    """

    named = "FedAvg"

    def __init__(self, *, rank: int = 8, alpha: float = 16.0, **options: Any) -> None:
        """Sort the options, and check those of the rule.

        Raises:
            ConfigError: One does not fit.
        """
        name, defaults = NAMED[self.named]
        ours = set(Settings.model_fields) - {"rule", "options"}
        told = defaults | {key: options.pop(key) for key in sorted(ours & set(options))}
        # so many that the rule bears its hostile ones, whichever robust rule it is
        fewest = 2 * told["hostile_max"] + 3 if told.get("hostile_max") else 2
        options = {MIN_NODES: fewest, "min_available_nodes": fewest} | options
        inner = {key: options.pop(key) for key in KINDS[name].options if key in options}
        table = {
            "federation": {"name": "flower", "rounds": 1},
            "model": {"base": "the app's"},
            "task": {"kind": "generation"},
            "exchange": {"kind": "lora", "rank": rank, "alpha": alpha},
            "training": {"learning_rate": 0.1, "local_steps": 1},
            "strategy": told | {"rule": name, "options": inner},
            "sites": {"min": options[MIN_NODES]},
        }
        self.federation = check_config(table, FederationConfig, source=self.named)
        make_rule(self.federation, Layout(()))  # now, and not when the first round is over
        super().__init__(FedAvg(), **options)
        self._layout: Layout | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remember the arrays; make the rule when they are seen first."""
        messages = super().configure_train(server_round, arrays, config, grid)
        layout = self.layout()
        if layout != self._layout:
            self._layout, self.rule = layout, make_rule(self.federation, layout)
        return messages

    def _delta(self, whole: Vector, layout: Layout, server_round: int) -> tuple[Vector, Layout]:
        """Return what the rule takes of a reply: the part that is trained in this round.

        Raises:
            WireError: Another part moved.
        """
        up = uplink(self.federation, layout, round=server_round)
        if up is layout:
            return whole, layout
        sent = {name for name, _ in up.entries}
        for name, change in layout.unflatten(whole).items():
            if name not in sent and change.any():
                factor = "A" if ".lora_A." in name else "B"
                raise WireError(
                    f"reply moved LoRA's {factor}, which {self.named} keeps as it is in round "
                    f"{server_round}; freeze lora_{factor} at the client"
                )
        return Part(layout, up).gather(whole), up


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
