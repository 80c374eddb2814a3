"""Job: one site's round of training, ready to run; and the one way to run it alone."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from intramural.core.layout import Layout, Vector
from intramural.models.corrections import Named
from intramural.models.resident import Resident
from intramural.models.tasks import Tokens
from intramural.models.training import RoundPlan, train_round

if TYPE_CHECKING:
    from intramural.models.private_training import PrivateRound

Trained = tuple[Vector, float | None]
"""A site's delta, shape `(up.size,)`, and the mean of its steps' losses; None when private."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One site's round."""

    tokens: Tokens
    """The site's training records, at least one."""
    plan: RoundPlan
    up: Layout
    """Of what travels back."""
    private: "PrivateRound | None" = None
    """Under [privacy]; each site has its own."""
    own: Vector | None = None
    """What stays at the site, shape `(own_layout.size,)`; None: its initial values."""
    shift: Named | None = None
    """What each step's gradient gains, by parameter; never under [privacy]."""


def run_job(resident: Resident, job: Job, start: Vector) -> Trained:
    """Train the resident model from `start`, and return what changed.

    Raises:
        TrainingError, Unclippable: As `train_round` and `train_privately`.
    """
    loaded, loss = resident.loaded, None
    loaded.exchange.write(start, job.own)
    if job.private is None:
        loss = train_round(loaded, resident.task, job.tokens, job.plan, shift=job.shift)
    else:
        # here: accounting and Opacus take seconds to load, which only [privacy] needs
        from intramural.models.private_training import train_privately

        assert job.shift is None, "a correction by records would have no noise"
        train_privately(loaded, resident.task, job.tokens, job.plan, job.private)
    return loaded.exchange.delta(start, job.up), loss
