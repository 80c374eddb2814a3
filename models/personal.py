"""Personal: a site's own model beside the federation's, or made of it after the last round.

Ditto (Li et al. 2021, https://arxiv.org/abs/2012.04221, algorithm 1): in each round the site's own
model v takes steps v -= rate * (gradient of the site's loss at v + pull * (v - w)), where w is what
the coordinator sent. Fine-tuning takes plain steps from the federation's last model.
"""

from dataclasses import replace

from intramural.core.federation import FederationConfig
from intramural.core.layout import Vector
from intramural.core.seeds import derive_seed
from intramural.models.job import Job
from intramural.models.resident import Resident
from intramural.models.training import RoundPlan, train_round


def train_beside(resident: Resident, job: Job, start: Vector, own: Vector | None) -> Vector:
    """Return the site's own model after a round of Ditto; the resident model then holds it.

    Args:
        resident: The federation's model.
        job: The round's.
        start: What the coordinator sent, w; shape `(layout.size,)`.
        own: v, shape `(trained_layout.size,)`; None: it begins as w.

    Raises:
        TrainingError: As `train_round`.
    """
    exchange = resident.loaded.exchange
    exchange.write(start)
    anchor = exchange.read_trained()
    if own is not None:
        exchange.write_trained(own)
    train_round(
        resident.loaded,
        resident.task,
        job.tokens,
        job.plan,
        anchor=exchange.trained_layout.unflatten(anchor),
    )
    return exchange.read_trained()


def fine_tune(resident: Resident, job: Job, start: Vector) -> Vector:
    """Return the federation's model after the site's own steps; the resident model then holds it.

    Raises:
        TrainingError: As `train_round`.
    """
    exchange = resident.loaded.exchange
    exchange.write(start)
    train_round(resident.loaded, resident.task, job.tokens, job.plan)
    return exchange.read_trained()


def own_plan(federation: FederationConfig, plan: RoundPlan) -> RoundPlan:
    """Return the plan of a site's own steps: personal.steps of them, on batches of their own.

    Ditto goes by the round's learning rate; what is tuned after the run, by training.learning_rate.
    """
    personal = federation.personal
    assert personal is not None
    keys: dict[str, object] = {"local_steps": personal.steps, "local_epochs": None}
    if personal.kind == "ditto":
        keys["proximal"] = personal.pull
    else:
        keys |= {"proximal": 0.0, "schedule": "constant", "warmup": 0.0}
    seed = derive_seed(plan.seed, "personal")
    return replace(plan, seed=seed, training=plan.training.model_copy(update=keys))
