"""Tally: what a round's replies said beside their vectors, and what its record tells of them."""

from typing import Any

from intramural.core.messages import Evaluated, Update
from intramural.core.metrics import Sums, TaskKind, add_sums, metrics_of, personal_of


class Tally:
    """Losses, sums and refusals of the round that is under way."""

    def __init__(self, kind: TaskKind) -> None:
        """Start empty; `kind` is the task's."""
        self._kind = kind
        self.losses: dict[str, tuple[float | None, int]] = {}
        """By site that counts: its mean loss, or None where it tells none, and its weight."""
        self.sums: dict[str, Sums] = {}
        """By site: of the evaluation under way, or closed last."""
        self.refusals: dict[str, int] = {}
        """How often each reason came, over all of the round's attempts."""
        self.measures: dict[str, float] = {}
        """What the rule had to tell of the round."""

    def trained(self, update: Update) -> None:
        """Note an update that counts."""
        self.losses[update.site] = (update.loss, update.weight)

    def evaluated(self, reply: Evaluated) -> None:
        """Add a site's sums.

        Raises:
            AggregationError: They make no metrics, alone or with the others'; nothing is added.
        """
        metrics_of(self._kind, reply.sums)
        if (own := personal_of(reply.sums)) is not None:
            metrics_of(self._kind, own)
        metrics_of(self._kind, add_sums([reply.sums, *self.sums.values()]))  # may overflow
        self.sums[reply.site] = reply.sums

    def refused(self, reason: str) -> None:
        """Count an answer that does not."""
        self.refusals[reason] = self.refusals.get(reason, 0) + 1

    def train_loss(self) -> float | None:
        """Return the mean of the sites' losses, or None where they tell none."""
        told = [(loss, w) for loss, w in self.losses.values() if loss is not None]
        weight = sum(w for _, w in told)
        return sum(loss * (w / weight) for loss, w in told) if told else None

    def metrics(self) -> dict[str, float]:
        """Return the metrics of all sums together; nothing without any."""
        return metrics_of(self._kind, add_sums(list(self.sums.values()))) if self.sums else {}

    def record(self) -> dict[str, Any]:
        """Return the round's record as far as replies tell it."""
        return {
            "sites": sorted(self.losses),
            "metrics": self.metrics(),
            "train_loss": self.train_loss(),
            "refusals": dict(sorted(self.refusals.items())),
            **self.measures,
        }
