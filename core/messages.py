"""What coordinator and sites say to each other. `wire.py` puts it into Flower's records."""

from dataclasses import dataclass, field
from typing import Literal

from intramural.core.layout import Vector
from intramural.core.metrics import Sums

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, kw_only=True)
class Hello:
    """Coordinator: who are you, and can you take part in this federation?"""

    manifest: str
    """Digest of the manifest."""


@dataclass(frozen=True, kw_only=True)
class Welcome:
    """Site: this is my name, and these parameters I would send."""

    site: str
    layout: str
    """Digest of the layout the site derived from the manifest and its own base model."""
    base: str
    """Digest of the site's base model."""
    version: str
    """Version of the site's installed package."""


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """Coordinator: train one round from these parameters."""

    manifest: str
    round: int
    """From 1."""
    layout: str
    vector: Vector = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Update:
    """Site: what one round of local training changed."""

    site: str
    round: int
    layout: str
    weight: int
    """Training records behind the update, at least 1; the rule decides what it counts for."""
    loss: float
    """Mean training loss over the round's steps."""
    seconds: float
    """Time spent training."""
    delta: Vector = field(repr=False)
    """Parameters after minus before, float32, shape `(layout.size,)`."""


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest:
    """Coordinator: evaluate these parameters on one of your splits."""

    manifest: str
    round: int
    """The round that made the parameters; 0 for the initial ones."""
    layout: str
    split: Split
    vector: Vector = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Site: sums that add up across sites."""

    site: str
    round: int
    split: Split
    sums: Sums


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Site: no, and why. An answer, not a failure."""

    site: str
    reason: str
    """One word or two with dashes, for counting."""
    detail: str
    """One line that names no record."""


Request = Hello | TrainRequest | EvaluateRequest
Reply = Welcome | Update | Evaluated | Refusal
