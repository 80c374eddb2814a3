"""Updates: the reply that says what a round of training changed, and what it tells beside."""

from typing import TYPE_CHECKING

from intramural.core.federation import FederationConfig
from intramural.core.layout import Vector
from intramural.core.messages import TrainRequest, Update
from intramural.core.route import COUNTED_RULES
from intramural.models.job import Job

if TYPE_CHECKING:
    from intramural.client.guard import Guard


def update_of(
    site: str,
    federation: FederationConfig,
    request: TrainRequest,
    job: Job,
    delta: Vector,
    *,
    guard: "Guard | None",
    loss: float | None,
    seconds: float,
) -> Update:
    """Return a site's update; `guard` is the site's under [privacy], and else None.

    Guarantees:
        Under [privacy] nothing but the vector tells of the records: the weight is 1, and there
        is no loss, no time and no count of steps. Without it, steps are told where the rule is one
        of `COUNTED_RULES`: with training.local_epochs they tell how many records there are.
    """
    layout = job.up.digest
    if guard is not None:
        return Update(
            site=site,
            round=request.round,
            layout=layout,
            weight=1,
            loss=None,
            seconds=None,
            ledger_entries=len(guard.ledger),
            ledger_head=guard.ledger.head,
            seeded=not guard.is_private,
            delta=delta,
        )
    tells_steps = federation.strategy.rule in COUNTED_RULES
    return Update(
        site=site,
        round=request.round,
        layout=layout,
        weight=1 if federation.strategy.weights == "equal" else len(job.tokens),
        loss=loss,
        seconds=seconds,
        steps=job.plan.steps(len(job.tokens)) if tells_steps else None,
        delta=delta,
    )
