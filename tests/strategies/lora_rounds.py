"""Builders for rounds of LoRA rules: two layers and a head, at sites that differ."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from intramural.core.config import check_config
from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout, Vector
from intramural.core.messages import Update
from intramural.core.route import RESIDUAL, downlink, uplink
from intramural.strategies.registry import make_rule
from intramural.strategies.rule import Rule, State
from tests.reference.lora_products import Adapter
from tests.strategies.updates import run_round

RANK, ALPHA = 3, 6.0
SCALE = 2.0  # 6 / 3
LAYERS = {"m.query": (7, 5), "m.value": (4, 6)}
"""Outputs and inputs."""
HEAD = "m.classifier.weight"


def a_of(layer: str) -> str:
    return f"{layer}.lora_A.default.weight"


def b_of(layer: str) -> str:
    return f"{layer}.lora_B.default.weight"


def trained() -> Layout:
    entries: list[tuple[str, tuple[int, ...]]] = []
    for layer, (outputs, inputs) in LAYERS.items():
        entries += [(a_of(layer), (RANK, inputs)), (b_of(layer), (outputs, RANK))]
    return Layout((*entries, (HEAD, (2, 4))))


def config(rule: str, **sections: Any) -> FederationConfig:
    table: dict[str, Any] = {
        "federation": {"name": "a", "rounds": 9, "seed": 4},
        "model": {"base": "b"},
        "task": {"kind": "generation"},
        "exchange": {"kind": "lora", "rank": RANK, "alpha": ALPHA},
        "training": {"learning_rate": 0.1, "local_steps": 1},
        "sites": {"min": 1},
        "strategy": {"rule": rule},
    }
    for name, values in sections.items():
        merged = table.get(name, {}) | values
        table[name] = {key: value for key, value in merged.items() if value is not None}
    return check_config(table, FederationConfig, source="f.toml")


class Bench:
    """A rule with its layouts, and sites that train at random."""

    def __init__(self, rule: str, **sections: Any) -> None:
        self.config = config(rule, **sections)
        self.layout = downlink(self.config, trained())
        self.rule: Rule = make_rule(self.config, self.layout)
        self.rng = np.random.default_rng(0)

    def start(self) -> Vector:
        """Return arrays as PEFT begins: A at random, B and residuals zero."""
        vector = np.zeros(self.layout.size, dtype=np.float32)
        for name, part in self.layout.unflatten(vector).items():
            if ".lora_A." in name or name == HEAD:
                part[:] = self.rng.normal(size=part.shape)
        return vector

    def updates(self, count: int, *, round_: int = 1, size: float = 0.3) -> list[Update]:
        up = uplink(self.config, self.layout, round=round_)
        return [
            Update(
                site=f"s{n}",
                round=round_,
                layout=up.digest,
                weight=3 * n + 1,
                loss=0.0,
                seconds=0.0,
                delta=self.rng.normal(scale=size, size=up.size).astype(np.float32),
            )
            for n in range(count)
        ]

    def adapters(self, vector: Vector, update: Update | None = None) -> dict[str, Adapter]:
        """Return the layers of the arrays, or of a site after its training."""
        values = {n: v.astype(np.float64) for n, v in self.layout.unflatten(vector).items()}
        if update is not None:
            up = uplink(self.config, self.layout, round=update.round)
            for name, delta in up.unflatten(update.delta).items():
                values[name] = values[name] + delta
        return {
            layer: Adapter(
                a=values[a_of(layer)],
                b=values[b_of(layer)],
                residual=values.get(RESIDUAL + layer, np.zeros(shape)),
            )
            for layer, shape in LAYERS.items()
        }

    def round(
        self, state: State, current: Vector, updates: Sequence[Update]
    ) -> tuple[Vector, State]:
        return run_round(self.rule, state, current, updates, round_=updates[0].round)
