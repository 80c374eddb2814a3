"""What a coordinator works with, and what it ends with."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Any

from intramural.core.federation import FederationConfig
from intramural.core.journal import Journal
from intramural.core.layout import Layout, Vector
from intramural.core.metrics import Sums
from intramural.server.directory import Manners
from intramural.server.holdout import Holdout
from intramural.server.lost import Again
from intramural.server.moves import Rules
from intramural.server.post import Post
from intramural.server.watcher import Watcher
from intramural.strategies.rule import Rule


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run ended with."""

    vector: Vector = field(repr=False)
    history: list[dict[str, Any]]
    """One record a round, as the report has them."""
    test: dict[str, Sums]
    """Each site's sums on its own test records."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a coordinator works with; it changes none of it but the folder's content."""

    federation: FederationConfig
    run: str = ""
    layout: Layout
    base: str
    """Digest of the base model."""
    rule: Rule
    post: Post
    journal: Journal
    checkpoints: Any
    """Folder of the checkpoints."""
    watcher: Watcher
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    poll_s: float = 0.2
    """Pause between two looks for replies when none came."""
    patience_s: float = inf
    """How long a round may wait for sites before the run stops."""
    durable: bool = True
    """Checkpoints are on disk before a round counts as committed, and not just the system's."""
    greeting_s: float = 120.0
    """How long nodes that do not answer their greeting hold up a round."""
    again: Again | None = None
    """How lost requests are asked again; None: never."""
    manners: Manners | None = None
    """How nodes are greeted that come back, wait or fall silent; None: each once."""
    added: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """What a simulation adds to a round's record, or puts in a key's place; asked at a commit."""
    world: Callable[[], dict[str, Any]] | None = None
    """What a simulation keeps of its clock and of requests under way; asked at a commit of an
    asynchronous round. With it the clock of a resumed run goes on where it stopped, and the sites
    are where they were: those under way are asked there though they be away."""
    holdout: Holdout | None = None
    """The coordinator's own records, where [gate] judges by them."""
    crowd: int | None = None
    """A large simulation's number of sites, which nobody greets; None: they are greeted."""

    @property
    def rules(self) -> Rules:
        """What the machine goes by."""
        federation = self.federation
        late = federation.asynchrony
        return Rules(
            rounds=federation.federation.rounds,
            sites_min=federation.sites.min,
            share=federation.sites.share,
            quorum=federation.sites.quorum,
            deadline_s=federation.sites.deadline_s,
            evaluate_every=federation.evaluations_every,
            buffer=late.buffer if late is not None else 0,
            staleness_max=late.staleness_max if late is not None else 0,
        )
