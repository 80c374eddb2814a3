"""A round of differentially private training: Poisson draws, clipped sums, noise, steps."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from numpy.typing import NDArray
from torch import nn

from intramural.models.corrections import Corrections
from intramural.models.loading import Loaded
from intramural.models.schedule import learning_rate
from intramural.models.steps import make_optimizer
from intramural.models.tasks import Task, Tokens
from intramural.models.training import (
    RoundPlan,
    dropout_from,
    precision,
    to_device,
    trained_alone,
)
from intramural.privacy.bookkeeping import BookkeepingEngine
from intramural.privacy.engine import Engine
from intramural.privacy.moved import MovedCheck
from intramural.privacy.opacus_engine import OpacusEngine
from intramural.privacy.opacus_ghost import OpacusGhostEngine
from intramural.privacy.plan import PrivacyPlan
from intramural.privacy.random import SecureRandom
from intramural.privacy.sampler import PoissonSampler
from intramural.privacy.tensors import check_same_tensors

ROWS_MIN = 8
"""Records that a part may always hold, if it has so many, unless the site says otherwise."""
TOKENS_MAX = 1024
"""Padded tokens of a part beyond `ROWS_MIN` records: 8 of 128, more of shorter ones."""

UNPADDED_ROWS_MAX = 1 << 12
"""Records of a part when they are features of a frozen encoder."""

ENGINES: dict[str, Callable[..., Engine]] = {
    "bookkeeping": BookkeepingEngine,
    "opacus": OpacusEngine,
    "opacus-ghost": OpacusGhostEngine,
}
"""By the name in privacy.engine."""
Rows = Sequence[int]


@dataclass(frozen=True, kw_only=True)
class PrivateRound:
    """What one site's private steps go by."""

    plan: PrivacyPlan
    units: Sequence[NDArray]  # type: ignore[type-arg]
    """Rows of each unit: one a record, or a person's bounded rows."""
    random: SecureRandom
    dropout_seed: int
    """Secret, outside tests. Which numbers a record's dropout gets depends on who else is drawn:
    were the seed public, one record would move the others' gradients, beyond any clip norm."""


def train_privately(
    loaded: Loaded, task: Task, tokens: Tokens, plan: RoundPlan, private: PrivateRound
) -> None:
    """Train the model in place for one round of noised steps; returns nothing to release.

    Each step draws every unit on its own with the plan's sample rate, clips each drawn unit's
    summed gradient, adds noise once, and divides by the public batch size. A draw of nobody is a
    step of noise. What the optimizer does then is post-processing. A LoRA factor that the round
    does not train has no part in the norm that is clipped, and no noise.

    Guarantees:
        As the plan's events: so many steps of the Poisson-subsampled Gaussian mechanism, under the
        plan's unit and relation, as long as `dropout_seed` is secret: then each record's mask is as
        random as ever, whoever is drawn beside it.

    Raises:
        Unclippable: The model cannot be clipped exactly. By now the records are read and charged
            for; `rehearse` finds that out before either.
        TrainingError: A trainable tensor did not move in the round's first step.
    """
    with trained_alone(loaded, plan.factor) as trained:
        _train(loaded, task, tokens, plan, private, trained)


def _train(
    loaded: Loaded,
    task: Task,
    tokens: Tokens,
    plan: RoundPlan,
    private: PrivateRound,
    trained: dict[str, nn.Parameter],
) -> None:
    settings, privacy, parameters = plan.training, private.plan, list(trained.values())
    optimizer = make_optimizer(parameters, settings)
    optimizer.zero_grad(set_to_none=True)  # a round that failed may have left another's gradient
    sampler = PoissonSampler(len(private.units), privacy.sample_rate, private.random)
    rows_max = plan.micro_batch or (None if task.padded else UNPADDED_ROWS_MAX)
    loaded.model.train()
    drawing = dropout_from(private.dropout_seed, loaded.device)
    correct = Corrections(trained, pull=settings.proximal)
    with drawing, _engine(loaded, optimizer, private) as engine:
        moved = MovedCheck(trained)
        for step in range(privacy.steps):
            progress = (plan.round - 1 + step / privacy.steps) / plan.rounds
            rate = learning_rate(settings, progress)
            for group in optimizer.param_groups:
                group["lr"] = rate
            drawn = [private.units[i].tolist() for i in sampler.draw()]
            for rows, owners in parts_of(tokens, drawn, rows_max=rows_max):
                batch = to_device(task.pad(tokens, rows), loaded.device)
                engine.open(owners)
                with precision(settings, loaded.device):
                    losses = task.losses(loaded.model, batch)
                engine.fold(losses)
            engine.release()
            if settings.gradient_clip is not None:  # of noised gradients: post-processing
                torch.nn.utils.clip_grad_norm_(parameters, settings.gradient_clip)
            correct()  # of numbers that have their noise: post-processing too
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step == 0:
                check_same_tensors(loaded.model, optimizer)
                if rate > 0:
                    moved.check()


def _engine(loaded: Loaded, optimizer: torch.optim.Optimizer, private: PrivateRound) -> Engine:
    return ENGINES[private.plan.engine](
        loaded.model,
        optimizer,
        clip_norm=private.plan.clip_norm,
        noise_multiplier=private.plan.noise_multiplier,
        divisor=private.plan.divisor,
        noise=private.random,
    )


def parts_of(
    tokens: Tokens, units: Sequence[Rows], *, rows_max: int | None
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield a logical batch in parts: (rows, owner of each row), units whole, the longest first.

    The engine adds the parts up, so they are a knob of memory alone: results differ in their last
    bits. A unit of more than `rows_max` rows is a part by itself.
    """
    rows: list[int] = []
    owners: list[int] = []
    longest = 0
    for unit in sorted(units, key=lambda rows: (-_longest(tokens, rows), rows[0])):
        count = len(rows) + len(unit)
        if rows_max is not None:
            full = count > rows_max
        else:
            full = count > ROWS_MIN and count * longest > TOKENS_MAX
        if rows and full:
            yield rows, owners
            rows, owners = [], []
        if not rows:
            longest = _longest(tokens, unit)
        owners += [owners[-1] + 1 if owners else 0] * len(unit)
        rows += unit
    if rows:
        yield rows, owners


def _longest(tokens: Tokens, rows: Rows) -> int:
    return max(len(tokens.inputs[row]) for row in rows)
