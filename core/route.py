"""Route: which part of a model's trained parameters travels, down to the sites and up from them.

A rule may have the sites train one LoRA factor in turn, keep a part at home, or be sent more than
they send back. All of that follows from the manifest and the round, so coordinator and site find
the same layouts, and nobody has to say them.

PEFT names a layer's two factors `...NAME.lora_A.default.weight`, shape `(rank, inputs)`, and
`...NAME.lora_B.default.weight`, shape `(outputs, rank)`; the layer gains alpha / rank * B A.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np

from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout, Vector

Factor = Literal["A", "B"]

RESIDUAL, CONTROL = "residual/", "control/"
"""First parts of the names of what is sent down beside the parameters: what a layer's frozen weight
has gained, shape `(outputs, inputs)`; and SCAFFOLD's control variate, shaped as the parameters."""
RESIDUAL_RULES = frozenset({"flora", "fedex-lora"})
CONTROL_RULES = frozenset({"scaffold"})
COUNTED_RULES = frozenset({"fednova"})
"""Rules that need to know how many steps are behind an update."""
B_ALONE = frozenset({"ffa-lora", "fedsvd"})
"""Rules whose sites train B, and never A."""
ALTERNATING = frozenset({"rolora"})
"""Rules whose sites train B in odd rounds and A in even ones."""
PERSONAL_B = frozenset({"fedsa-lora"})
"""Rules whose sites keep B at home."""


def factor_of(name: str) -> Factor | None:
    """Return which LoRA factor a parameter is, or None."""
    if ".lora_A." in name:
        return "A"
    return "B" if ".lora_B." in name else None


def trained_factor(rule: str, round: int) -> Factor | None:
    """Return the one LoRA factor that sites train in a round (from 1), or None for both."""
    if rule in B_ALONE:
        return "B"
    if rule in ALTERNATING:
        return "B" if round % 2 else "A"
    return None


def trains(turn: Factor | None, name: str) -> bool:
    """Return whether a parameter is trained in a factor's turn: all but the other LoRA factor."""
    return turn is None or factor_of(name) in (None, turn)


def is_trained(federation: FederationConfig, name: str, *, round: int) -> bool:
    """Return whether the sites train a parameter in a round."""
    return trains(trained_factor(federation.strategy.rule, round), name)


def is_personal(federation: FederationConfig, name: str) -> bool:
    """Return whether a trained parameter stays at each site."""
    if federation.strategy.rule in PERSONAL_B and factor_of(name) == "B":
        return True
    module = f".{name.rpartition('.')[0]}."
    return any(f".{end}." in module for end in federation.exchange.personal)


def pairs_of(names: Mapping[str, object] | tuple[str, ...]) -> tuple[tuple[str, str, str], ...]:
    """Return (layer, name of A, name of B) of every LoRA pair among the names, in order of A."""
    there = set(names)
    found = []
    for name in names:
        if factor_of(name) == "A" and (other := name.replace(".lora_A.", ".lora_B.")) in there:
            found.append((name.partition(".lora_A.")[0], name, other))
    return tuple(found)


def downlink(federation: FederationConfig, trained: Layout) -> Layout:
    """Return the layout of the coordinator's vector.

    Args:
        federation: Says the rule.
        trained: The model's trained parameters at the federation's rank, in the model's order.
    """
    kept = tuple(e for e in trained.entries if not is_personal(federation, e[0]))
    rule = federation.strategy.rule
    extras: tuple[tuple[str, tuple[int, ...]], ...] = ()
    if rule in RESIDUAL_RULES:
        shapes = dict(kept)
        extras = tuple(
            (RESIDUAL + layer, (shapes[b][0], shapes[a][1]))
            for layer, a, b in pairs_of(tuple(shapes))
        )
    elif rule in CONTROL_RULES:
        extras = tuple((CONTROL + name, shape) for name, shape in kept)
    return Layout(kept + extras) if extras or len(kept) < len(trained.entries) else trained


def uplink(federation: FederationConfig, down: Layout, *, round: int) -> Layout:
    """Return the layout of a site's update in a round: `down` less what sites do not train in it.

    `down` itself, where that is all of it.
    """
    rule = federation.strategy.rule
    turn = trained_factor(rule, round)
    if turn is None and rule not in RESIDUAL_RULES | CONTROL_RULES:  # nothing comes beside
        return down
    part = _part_in_turn(down, turn)
    return down if part is None else part


@lru_cache(maxsize=64)
def _part_in_turn(down: Layout, turn: Factor | None) -> Layout | None:
    """Return the layout of what is trained in a factor's turn; None: it is all of `down`."""
    kept = tuple(
        entry
        for entry in down.entries
        if not entry[0].startswith((RESIDUAL, CONTROL)) and trains(turn, entry[0])
    )
    return Layout(kept) if len(kept) < len(down.entries) else None


def up_bytes_max(federation: FederationConfig, down: Layout) -> int:
    """Return the bytes of a site's largest update; what it trains turns with the rounds."""
    return max(uplink(federation, down, round=round).nbytes for round in (1, 2))


@dataclass(frozen=True)
class Part:
    """Where a smaller layout's parameters lie in a larger one's vector."""

    whole: Layout
    part: Layout

    @cached_property
    def _spans(self) -> list[tuple[slice, slice]]:
        """Places in the whole and in the part, neighbours joined."""
        starts = {slot.name: slot.start for slot in self.whole.slots()}
        spans: list[tuple[slice, slice]] = []
        for slot in self.part.slots():
            lo = starts[slot.name]
            if spans and spans[-1][0].stop == lo:
                spans[-1] = (
                    slice(spans[-1][0].start, lo + slot.size),
                    slice(spans[-1][1].start, slot.stop),
                )
            else:
                spans.append((slice(lo, lo + slot.size), slice(slot.start, slot.stop)))
        return spans

    @property
    def is_whole(self) -> bool:
        """Whether the two layouts are one."""
        return self.whole is self.part or self.whole.entries == self.part.entries

    def gather(self, vector: Vector) -> Vector:
        """Return the part of a whole vector; the vector itself, where that is all of it."""
        if self.is_whole:
            return vector
        found = np.empty(self.part.size, dtype=np.float32)
        for there, here in self._spans:
            found[here] = vector[there]
        return found

    def scatter(self, values: Vector, out: Vector) -> None:
        """Write the part's values to their places in a whole vector."""
        for there, here in self._spans:
            out[there] = values[here]
