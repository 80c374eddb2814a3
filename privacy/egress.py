"""Egress: the last gate at a site. What is not on the list does not leave."""

from dataclasses import dataclass

from intramural.core.errors import EgressRefused
from intramural.core.layout import Layout
from intramural.core.messages import Evaluated, Refusal, Reply, Update, Welcome
from intramural.core.metrics import NOISED_SUMS, PERSONAL

SUMS = {
    "classification": frozenset({"confusion", "loss", "examples"}),
    "generation": frozenset(
        {"loss", "examples", "token_loss", "tokens", "correct_tokens", "hit_shares"}
    ),
}
"""Names of the evaluation sums that a task lets out."""


@dataclass(frozen=True, kw_only=True)
class EgressPolicy:
    """What may leave a site in one federation."""

    layout: Layout | None
    """The one layout a vector may have; None: no vector may leave."""
    task: str
    payload_bytes_max: int
    private: bool = False
    """Under a privacy claim the noised vector leaves, and nothing else about the records."""
    steps: bool = False
    """The rule needs to know how many steps are behind an update."""
    personal: bool = False
    """With [personal] the test of the site's own model leaves beside that of the federation's."""

    def check(self, reply: Reply) -> Reply:
        """Return the reply if it may leave.

        Guarantees:
            A vector leaves only in the layout derived from the approved manifest, so no further
            tensor can ride along; sums leave only under the task's names; sizes are bounded.

        Raises:
            EgressRefused: It may not; the rule is named.
        """
        match reply:
            case Update():
                self._check_update(reply)
            case Evaluated() if self.private:
                if set(reply.sums.counts) != set(NOISED_SUMS):
                    raise EgressRefused(
                        item="exact evaluation sums",
                        rule="under [privacy] only noised counts are released",
                        remedy="Set privacy.metrics_noise, or evaluate on public records.",
                    )
            case Evaluated():
                if unknown := set(reply.sums.counts) - self._sums(reply):
                    raise EgressRefused(
                        item=f"sums {sorted(unknown)}",
                        rule=f"{self.task} lets out {sorted(SUMS[self.task])} only",
                        remedy="Install the package version that the federation names.",
                    )
            case Welcome() | Refusal():
                pass
        return reply

    def _sums(self, reply: Evaluated) -> frozenset[str]:
        """Return the names of the sums that may leave."""
        names = SUMS[self.task]
        if self.personal and reply.split == "test":
            names |= {PERSONAL + name for name in names}
        return names

    def _check_update(self, update: Update) -> None:
        layout = self.layout
        if layout is None or update.layout != layout.digest or update.delta.size != layout.size:
            raise EgressRefused(
                item=f"a vector of layout {update.layout[:19]}",
                rule="the approved manifest has another layout",
                remedy="Compare the base model's digest and [exchange].",
            )
        said = (update.loss, update.seconds, update.steps)
        if self.private and (said != (None, None, None) or update.weight != 1):
            raise EgressRefused(
                item="a loss, a time, or a count of records or steps",
                rule="under [privacy] they are not released",
                remedy="This is a bug of the site's package; report it.",
            )
        if update.steps is not None and not self.steps:
            raise EgressRefused(
                item="a count of steps",
                rule="the federation's rule does not need it",
                remedy="This is a bug of the site's package; report it.",
            )
        if update.delta.nbytes > self.payload_bytes_max:
            raise EgressRefused(
                item=f"{update.delta.nbytes} bytes",
                rule=f"policy.payload_bytes_max is {self.payload_bytes_max}",
                remedy="Train an adapter, or raise the limit in site.toml.",
            )
