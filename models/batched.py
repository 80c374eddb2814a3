"""Batched: one round of many clients of equal shape, in one pass a step for all of them.

Each client's result is that of `train_round`, to rounding. Small models gain by it: their steps
are mostly the time it takes to start an operation.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from intramural.core.errors import TrainingError
from intramural.core.layout import Vector
from intramural.models.batched_factored import FactoredSteps, pays
from intramural.models.batched_fit import fit_of
from intramural.models.batched_losses import (
    BatchedLosses,
    Index,
    filled,
    merged,
    plain_attention,
)
from intramural.models.job import Job, Trained
from intramural.models.loading import Loaded
from intramural.models.schedule import learning_rate
from intramural.models.stacked import Stack, pieces
from intramural.models.tasks import Batch, Task
from intramural.models.training import RoundPlan

CLIENTS_MAX = 50
"""Clients on a stack: beyond, a step's memory traffic costs what its fewer operations save."""
BYTES_MAX = 1 << 29
"""About how much memory a stack may take, whatever the number of clients; one always goes."""


def train_jobs(
    loaded: Loaded,
    task: Task,
    jobs: Sequence[Job],
    start: Vector,
    *,
    clients_max: int = CLIENTS_MAX,
) -> list[Trained | TrainingError]:
    """Train every client from `start` and return its delta and loss, in the order of the jobs.

    The model's own parameters are neither read nor written.

    Args:
        loaded: The resident model, shared by all.
        task: Its task.
        jobs: The clients; all of one federation and round, whose plans are alike but for the site.
            `micro_batch` is not heeded: it changes no result.
        start: The round's parameters, shape `(layout.size,)`.
        clients_max: Most clients on a stack; a knob of memory and time.

    Returns:
        For a client whose loss was not finite, the error in its place; the others are as ever.

    Raises:
        ConfigError: The model or its training cannot be batched; see `unfit_reason`.
    """
    if not jobs:
        return []
    check_alike(jobs)
    losses = fit_of(loaded, task, jobs[0].plan.training, length=len(jobs[0].tokens.inputs[0]))
    results: dict[int, Trained | TrainingError] = {}
    with plain_attention():
        most = stack_size(loaded, losses, jobs, rows=_rows, clients_max=clients_max)
        for places in alike(jobs, key=lambda job: (_steps(job), _rows(job)), most=most):
            chunk = [jobs[place] for place in places]
            results |= zip(places, _train(loaded, losses, chunk, start), strict=True)
    return [results[place] for place in range(len(jobs))]


def check_alike(jobs: Sequence[Job]) -> None:
    """Hold the jobs to one federation and round."""
    first = jobs[0].plan
    for job in jobs:
        assert job.plan.training == first.training
        assert (job.plan.round, job.plan.rounds) == (first.round, first.rounds)
        assert len(job.tokens)


def alike(
    jobs: Sequence[Job], *, key: Callable[[Job], tuple[int, int]], most: int
) -> Iterator[list[int]]:
    """Yield the jobs' places in chunks of at most `most`, with one number of steps each.

    `key` gives a job's steps and the rows of a step; chunks are of like rows, to pad few.
    """
    keys = [key(job) for job in jobs]
    order = sorted(range(len(jobs)), key=lambda place: (keys[place], place))
    first = 0
    while first < len(order):
        steps = keys[order[first]][0]
        same = [place for place in order[first:] if keys[place][0] == steps]
        for piece in pieces(len(same), most):
            yield [same[i] for i in piece]
        first += len(same)


def stack_size(
    loaded: Loaded,
    losses: BatchedLosses,
    jobs: Sequence[Job],
    *,
    rows: Callable[[Job], int],
    clients_max: int,
) -> int:
    """Return how many clients go on a stack: as many as may, within `BYTES_MAX`.

    A client takes its parameters, their gradient and two moments; and what a forward pass keeps of
    its rows, twice, for the backward pass makes as much.
    """
    longest = max(jobs, key=lambda job: int(job.tokens.lengths().max()))
    row = losses.kept_bytes(longest.tokens, int(longest.tokens.lengths().argmax()))
    client = 4 * loaded.exchange.layout.nbytes + 2 * row * max(map(rows, jobs))
    return max(1, min(clients_max, BYTES_MAX // client))


def _rows(job: Job) -> int:
    return min(job.plan.training.batch_size, len(job.tokens))


def _steps(job: Job) -> int:
    return job.plan.steps(len(job.tokens))


def _train(
    loaded: Loaded, losses: BatchedLosses, jobs: Sequence[Job], start: Vector
) -> list[Trained | TrainingError]:
    """Train the clients of one stack, which have one number of steps."""
    plan, steps = jobs[0].plan, _steps(jobs[0])
    tokens, offsets = merged([job.tokens for job in jobs])
    index, weights = _batches(jobs, offsets, steps)
    weights = weights.to(loaded.device)
    batches = (losses.batch(tokens, rows) for rows in index)
    first = next(batches)
    size, settings = loaded.exchange.layout.size, plan.training
    walk: FactoredSteps | _StackedSteps
    if pays(losses, settings, first, weights[0], steps=steps, size=size):
        walk = FactoredSteps(loaded, losses, start, clients=len(jobs))
    else:
        walk = _StackedSteps(losses, Stack(loaded, start, clients=len(jobs), settings=settings))
    means: list[Tensor] = []
    for step, batch in enumerate(chain([first], batches)):
        progress = (plan.round - 1 + step / steps) / plan.rounds
        means.append(walk.step(batch, weights[step], rate=learning_rate(settings, progress)))
    values = torch.stack(means).double().cpu().numpy().T
    return [
        (delta, float(own.mean())) if np.isfinite(own).all() else _not_finite(own, plan)
        for delta, own in zip(walk.deltas(), values, strict=True)
    ]


class _StackedSteps:
    """Steps of clients that each have their parameters on a stack."""

    def __init__(self, losses: BatchedLosses, stack: Stack) -> None:
        self._losses, self._stack = losses, stack
        self._is_first = True

    def step(self, batch: Batch, weights: Tensor, *, rate: float) -> Tensor:
        """Step each client by its gradient; return the means of losses, shape (clients,)."""
        means = self._backward(batch, weights)
        self._stack.step(rate)
        self._is_first = False
        return means

    def deltas(self) -> list[Vector]:
        """Return each client's parameters less the start."""
        return self._stack.deltas()

    def _backward(self, batch: Batch, weights: Tensor) -> Tensor:
        """Write each client's gradient to the stack; return the means of losses."""
        losses, parameters, first = self._losses, self._stack.parameters, self._is_first
        if losses.layers is None:
            means = losses.many(parameters, batch, weights)
            means.sum().backward()  # type: ignore[no-untyped-call]  # clients share nothing trained
            return means.detach()
        # autograd would leave a weight's gradient as (in, out) in memory; to turn it takes a pass
        used = self._stack.start if first else parameters
        means, factors = losses.factors(used, batch, weights, shared=first)
        for layer, (inputs, outputs) in factors.items():
            weight, bias = losses.layers[layer]
            if weight is not None:
                parameters[weight].grad = torch.bmm(outputs.mT, inputs)
            if bias is not None:
                parameters[bias].grad = outputs.sum(1)
        return means


def _batches(jobs: Sequence[Job], offsets: Index, steps: int) -> tuple[Index, Tensor]:
    """Return each step's rows and weights, both of shape (steps, clients, rows).

    A client's weights add up to 1 over its own rows, for their mean; fillers have weight 0.
    """
    rows = max(map(_rows, jobs))
    index = np.empty((steps, len(jobs), rows), dtype=np.int64)
    weights = np.zeros((steps, len(jobs), rows), dtype=np.float32)
    for place, job in enumerate(jobs):
        for step, batch in enumerate(job.plan.batches(len(job.tokens))):
            index[step, place] = filled(sorted(batch), rows)
            weights[step, place, : len(batch)] = 1 / len(batch)
    index += offsets[None, :, None]
    return index, torch.from_numpy(weights)


def _not_finite(losses: NDArray[np.float64], plan: RoundPlan) -> TrainingError:
    step = int(np.flatnonzero(~np.isfinite(losses))[0]) + 1
    return TrainingError(
        f"loss is not finite at step {step} of round {plan.round}; "
        "lower training.learning_rate or set training.gradient_clip"
    )
