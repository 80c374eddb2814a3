"""Batched private rounds: the steps of `train_privately`, for many clients of equal shape at once.

Draws, noise, and their order are each client's own: with the same generator a client draws the
same units and gets the same noise, bit for bit, as in `train_privately`.
"""

import sys
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from intramural.core.errors import ConfigError, TrainingError
from intramural.core.layout import Vector
from intramural.models.batched import CLIENTS_MAX, alike, check_alike, stack_size
from intramural.models.batched_fit import fit_of
from intramural.models.batched_losses import BatchedLosses, Index, filled, merged, plain_attention
from intramural.models.batched_units import Factored, Factors, Units, Written
from intramural.models.job import Job
from intramural.models.loading import Loaded
from intramural.models.private_training import PrivateRound
from intramural.models.schedule import learning_rate
from intramural.models.stacked import Stack, pieces
from intramural.models.steps import make_optimizer
from intramural.models.tasks import Batch, Task, Tokens
from intramural.privacy.clipped_sums import clip_factors
from intramural.privacy.moved import MovedCheck
from intramural.privacy.records import full_precision
from intramural.privacy.sampler import PoissonSampler
from intramural.privacy.tensors import check_same_tensors
from intramural.privacy.unfit import check_fit

GRADIENT_BYTES_MAX = 1 << 27
"""About how much memory the units' gradients of a stack may take at a time; see `_clipped_sums`."""

Drawn = list[list[int]]
"""Rows of each unit that a client drew in a step."""


def train_jobs_privately(
    loaded: Loaded,
    task: Task,
    jobs: Sequence[Job],
    start: Vector,
    *,
    clients_max: int = CLIENTS_MAX,
) -> list[Vector | TrainingError]:
    """Train every client from `start` for a round of noised steps; return the deltas in order.

    Each job has a `private` of its own, all under one plan. The model's own parameters are neither
    read nor written. `dropout_seed` is not used: a model that drops is refused.

    Returns:
        For a client of which a tensor did not move in the first step, the error in its place.

    Guarantees:
        For each client those of `train_privately`: its steps draw every unit on its own with the
        plan's sample rate from the client's own generator; a drawn unit adds a vector of L2 norm at
        most `clip_norm` over all trained tensors together to its client's sum, and to no other
        client's, and adds zero if its gradient is not finite; noise of standard deviation
        noise_multiplier * clip_norm is drawn once a step, whether anybody was drawn or not; then
        the plan's public constant divides. A unit runs in a pass of its own, and what is measured
        is what is added, so that no model can make a unit add more. How far rows are padded, and
        so how a client's numbers round, follows from whom the others of its stack drew.

    Raises:
        ConfigError: The model or its training cannot be batched; see `unfit_reason`.
        Unclippable: The model mixes records, or trains tensors that do not travel.
    """
    if not jobs:
        return []
    check_alike(jobs)
    plan = _private(jobs[0]).plan
    assert all(_private(job).plan == plan for job in jobs)
    assert len({id(_private(job).random) for job in jobs}) == len(jobs), "a generator is shared"
    if plan.engine != "bookkeeping":
        raise ConfigError(f"the batched engine does not clip as privacy.engine = {plan.engine!r}")
    settings = jobs[0].plan.training
    losses = fit_of(loaded, task, settings, length=len(jobs[0].tokens.inputs[0]))
    check_fit(loaded.model)
    parameters = list(loaded.exchange.parameters.values())
    check_same_tensors(loaded.model, make_optimizer(parameters, settings))
    results: dict[int, Vector | TrainingError] = {}
    with plain_attention():
        most = stack_size(loaded, losses, jobs, rows=_rows_expected, clients_max=clients_max)
        for places in alike(jobs, key=lambda job: (plan.steps, _units(job)), most=most):
            chunk = [jobs[place] for place in places]
            results |= zip(places, _train(loaded, losses, chunk, start), strict=True)
    return [results[place] for place in range(len(jobs))]


def _private(job: Job) -> PrivateRound:
    assert job.private is not None, "a private round needs its plan, units and generator"
    return job.private


def _units(job: Job) -> int:
    return len(_private(job).units)


def _rows_expected(job: Job) -> int:
    """Return about how many rows a step draws at most: the mean, and four deviations."""
    plan, longest = _private(job).plan, max(map(len, _private(job).units), default=1)
    mean = plan.sample_rate * _units(job)
    return longest * min(_units(job), int(mean + 4 * mean**0.5) + 1)


def _train(
    loaded: Loaded, losses: BatchedLosses, jobs: Sequence[Job], start: Vector
) -> list[Vector | TrainingError]:
    """Take all steps of one stack's clients."""
    plan, privacy = jobs[0].plan, _private(jobs[0]).plan
    tokens, offsets = merged([job.tokens for job in jobs])
    privates = [_private(job) for job in jobs]
    samplers = [PoissonSampler(len(p.units), privacy.sample_rate, p.random) for p in privates]
    stack = Stack(loaded, start, clients=len(jobs), settings=plan.training)
    checks = [MovedCheck(stack.client(place)) for place in range(len(jobs))]
    noise = {n: np.empty(tuple(stack.parameters[n].shape), np.float32) for n in stack.order}
    failed: dict[int, TrainingError] = {}
    for step in range(privacy.steps):
        progress = (plan.round - 1 + step / privacy.steps) / plan.rounds
        rate = learning_rate(plan.training, progress)
        drawn = [
            [(private.units[unit] + offset).tolist() for unit in sampler.draw()]
            for private, sampler, offset in zip(privates, samplers, offsets, strict=True)
        ]
        sums = _clipped_sums(
            losses, stack, tokens, drawn, offsets, privacy.clip_norm, first=step == 0
        )
        _release(stack, sums, privates, noise)
        stack.step(rate)
        if step == 0 and rate > 0:
            failed = _still(checks)
    return [failed.get(place, delta) for place, delta in enumerate(stack.deltas())]


@torch.no_grad()
def _clipped_sums(
    losses: BatchedLosses,
    stack: Stack,
    tokens: Tokens,
    drawn: Sequence[Drawn],
    offsets: Index,
    clip_norm: float,
    *,
    first: bool,
) -> dict[str, Tensor]:
    """Return each client's sum of its drawn units' clipped gradients, `(clients, *shape)` a name.

    Guarantees:
        A unit adds a vector of L2 norm at most `clip_norm` to its client's sum, and nothing to
        another's; one whose gradient is not finite adds exactly zero. A client that drew nobody
        has a sum of zero.
    """
    sums = {name: torch.zeros_like(tensor.detach()) for name, tensor in stack.parameters.items()}
    most = max(1, GRADIENT_BYTES_MAX // sum(tensor.nbytes for tensor in sums.values()))
    if losses.layers is not None:
        most = sys.maxsize  # no gradient is written out
    for piece in pieces(max(map(len, drawn)), most):
        part = [own[piece.start : piece.stop] for own in drawn]
        index, weights = _units_of(part, offsets)
        weights = weights.to(sums[stack.order[0]].device)
        units = _gradients(losses, stack, losses.batch(tokens, index), weights, first=first)
        with full_precision(weights.device):
            norms = units.squares().sqrt_()
            factors = clip_factors(norms, clip_norm=clip_norm)
            factors = torch.where(weights[:, :, 0] > 0, factors, 0.0)  # fillers were not drawn
            units.add(factors.float(), torch.isfinite(norms), sums)
    return sums


def _gradients(
    losses: BatchedLosses, stack: Stack, batch: Batch, weights: Tensor, *, first: bool
) -> Units:
    """Return the units' gradients, as factors if they can be had."""
    parameters = {name: tensor.detach() for name, tensor in stack.parameters.items()}
    if losses.layers is None:
        return Written(losses.unit_gradients(parameters, batch, weights))
    used = stack.start if first else parameters
    _, factors = losses.factors(used, batch, weights, shared=first)
    return Factored(
        [
            Factors(
                weight=losses.layers[layer][0],
                bias=losses.layers[layer][1],
                inputs=inputs,
                outputs=outputs,
            )
            for layer, (inputs, outputs) in factors.items()
        ],
    )


def _units_of(drawn: Sequence[Drawn], offsets: Index) -> tuple[Index, Tensor]:
    """Return rows and weights of units, both of shape (clients, units, rows); fillers weigh 0.

    A client with fewer units than others is filled up with its first row, of weight 0.
    """
    units = max(map(len, drawn))
    rows = max(len(unit) for own in drawn for unit in own)
    index = np.empty((len(drawn), units, rows), dtype=np.int64)
    index[...] = offsets[:, None, None]
    weights = np.zeros(index.shape, dtype=np.float32)
    for client, own in enumerate(drawn):
        for place, unit in enumerate(own):
            index[client, place] = filled(unit, rows)
            weights[client, place, : len(unit)] = 1
    return index, torch.from_numpy(weights)


@torch.no_grad()
def _release(
    stack: Stack,
    sums: Mapping[str, Tensor],
    privates: Sequence[PrivateRound],
    noise: Mapping[str, NDArray[np.float32]],
) -> None:
    """Write (sum + noise) / divisor to the gradients; each client's noise is its own generator's.

    A client's tensors get theirs in the optimizer's order, as in a step by itself. `noise` is
    room to draw it in, shaped as the stack's parameters.
    """
    plan = privates[0].plan
    std = plan.noise_multiplier * plan.clip_norm
    for place, private in enumerate(privates):
        for name in stack.order:
            own = noise[name][place]
            own[...] = private.random.normal(own.size, std=std).reshape(own.shape)
    for name in stack.order:
        total = sums[name]
        total += torch.from_numpy(noise[name]).to(total.device)
        total /= plan.divisor
        stack.parameters[name].grad = total


def _still(checks: Sequence[MovedCheck]) -> dict[int, TrainingError]:
    """Return the errors of clients of which a tensor did not move."""
    failed = {}
    for place, check in enumerate(checks):
        try:
            check.check()
        except TrainingError as error:
            failed[place] = error
    return failed
