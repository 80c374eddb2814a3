"""Rule: how updates become the next arrays. Every aggregation method is one of these."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray

from intramural.core.layout import Vector
from intramural.core.messages import Update

State = dict[str, NDArray[Any]]
"""What a rule remembers between rounds, by name; goes into the checkpoint as it is."""


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a rule can be combined with; a federation that combines it wrongly is refused."""

    sums_only: bool
    """Needs only sums over sites, so it works where the coordinator sees nothing else."""
    exact_for_lora: bool
    """Its LoRA factors multiply to the mean of the sites' products."""
    mixed_ranks: bool
    """Sites may use different ranks."""
    byzantine: bool
    """Bounds the harm that a minority of hostile sites can do."""
    record_dp: bool = True
    """Works on noised updates; one that does not would undo or misread the noise."""
    site_dp: bool = False
    """Its result follows from one bounded sum of the updates, which [site_privacy] can noise."""
    asynchronous: bool = False
    """Takes updates that started from different rounds' arrays."""
    optimizer: bool = True
    """Its result may be the step of a server optimizer; one that sets arrays anew has no step."""


@dataclass(kw_only=True)
class Fold:
    """A round's aggregation under way; made by `Rule.begin`, changed by `Rule.add` alone."""

    round: int
    current: Vector = field(repr=False)
    state: State = field(repr=False)
    work: Any = field(repr=False)
    """The rule's own accumulator."""
    weight: float = 0.0
    """Sum of the weights added so far."""
    sites: list[str] = field(default_factory=list)
    measures: dict[str, float] = field(default_factory=dict)
    """What `finish` has to tell of the round, by name, for its record."""

    @classmethod
    def around(cls, inner: "Fold", *, current: Vector, state: State) -> "Fold":
        """Return the fold of a rule that hands its updates to another, whose fold is `inner`."""
        return cls(round=inner.round, current=current, state=state, work=inner, sites=inner.sites)


class Rule(Protocol):
    """Streaming aggregation: no input or output, no clock, no hidden state."""

    name: str
    traits: Traits

    def begin(self, state: State, current: Vector, *, round: int) -> Fold:
        """Open a round. `current` has shape `(size,)`; `state` is `{}` in the first round."""
        ...

    def add(self, fold: Fold, update: Update) -> None:
        """Fold one update in. The order of updates does not change the result.

        Its vector may be read until the next one is added: whoever made it leaves it as it is.

        Raises:
            AggregationError: The update cannot be used; the fold is as before.
        """
        ...

    def finish(self, fold: Fold) -> tuple[Vector, State]:
        """Return the next arrays and state; the fold is used up.

        Raises:
            AggregationError: No update was added.
        """
        ...
