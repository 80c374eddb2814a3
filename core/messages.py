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
    run: str = ""
    """Tells this run from others of the same manifest; a resumed run keeps it."""


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
    ledger_entries: int | None = None
    """Length of the site's privacy ledger, without a charge that is not settled; None without
    [privacy]."""
    ledger_head: str | None = None
    """Digest of the last of these entries, which commits to all before it."""


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """Coordinator: train one round from these parameters."""

    manifest: str
    round: int
    """From 1."""
    layout: str
    vector: Vector = field(repr=False)
    run: str = ""
    """Tells this run from others of the same manifest; a resumed run keeps it."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """Site: what one round of local training changed."""

    site: str
    round: int
    layout: str
    weight: int
    """Training records behind the update, at least 1; the rule decides what it counts for."""
    loss: float | None
    """Mean training loss over the round's steps; None under a privacy claim."""
    seconds: float | None
    """Time spent training; None under a privacy claim, for it tells of the number of records."""
    steps: int | None = None
    """Local steps behind the update, at least 1; None under a privacy claim, where the manifest
    fixes them."""
    ledger_entries: int | None = None
    """Length of the site's privacy ledger after this round's charge; None without [privacy]."""
    ledger_head: str | None = None
    """Digest of the ledger's last entry, which commits to all before it."""
    seeded: bool = False
    """Sampling and noise came from a test's seed: nothing is private."""
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
    run: str = ""
    """Tells this run from others of the same manifest; a resumed run keeps it."""


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Site: sums that add up across sites."""

    site: str
    round: int
    split: Split
    sums: Sums
    ledger_entries: int | None = None
    """Length of the site's privacy ledger after this charge; None without [privacy]."""
    ledger_head: str | None = None
    """Digest of the ledger's last entry."""


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
