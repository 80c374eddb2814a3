"""The local training loop: a round's steps on one site's records, and evaluation."""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from math import fsum, isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from intramural.core.errors import TrainingError
from intramural.core.federation import FederationConfig, Training
from intramural.core.metrics import Sums, add_sums
from intramural.core.route import Factor, trained_factor, trains
from intramural.core.seeds import derive_seed, generator
from intramural.models.corrections import Corrections, Named
from intramural.models.loading import Loaded
from intramural.models.schedule import learning_rate
from intramural.models.steps import Eager, can_step_early, make_step
from intramural.models.tasks import Batch, Task, Tokens

Indices = list[int]
_ENGINE: Any = getattr(torch.autograd.Variable, "_execution_engine", None)
"""PyTorch's engine of gradients; see `add_gradients`."""

PADDING_MAX = {"cpu": 64}
"""Padding tokens that a part of a batch may hold; see `micro_batches`. Measured on MiniLM."""
PADDING_MAX_ELSEWHERE = 1 << 14
"""An accelerator does a batch of this size in the time of one token."""


@dataclass(frozen=True, kw_only=True)
class RoundPlan:
    """One round of one site's training; with a seed it is the same everywhere."""

    training: Training
    round: int
    """From 1."""
    rounds: int
    seed: int
    site: str
    micro_batch: int | None = None
    """Examples a forward pass; None: any number. A memory knob: the parts' gradients add
    up to the batch's, so without dropout results differ in their last bits only."""
    factor: Factor | None = None
    """The one LoRA factor that is trained in this round; None: both."""

    @classmethod
    def of(
        cls, federation: FederationConfig, *, round: int, site: str, micro_batch: int | None
    ) -> "RoundPlan":
        """Return a federation's plan for one round at one site."""
        return cls(
            training=federation.training,
            round=round,
            rounds=federation.federation.rounds,
            seed=federation.federation.seed,
            site=site,
            micro_batch=micro_batch,
            factor=trained_factor(federation.strategy.rule, round),
        )

    def steps(self, examples: int) -> int:
        """Return the number of steps this round, at a site with so many examples."""
        if self.training.local_steps is not None:
            return self.training.local_steps
        per_epoch = -(-examples // self.training.batch_size)
        return (self.training.local_epochs or 0) * per_epoch

    def batches(self, examples: int) -> Iterator[Indices]:
        """Yield the round's batches: shuffled passes, each example once a pass."""
        rng = generator(self.seed, "batches", self.round, self.site)
        size = min(self.training.batch_size, examples)
        queue = rng.permutation(examples)
        for _ in range(self.steps(examples)):
            if not len(queue):
                queue = rng.permutation(examples)
            yield queue[:size].tolist()  # a pass's last batch may be short, none is skipped
            queue = queue[size:]


def train_round(
    loaded: Loaded,
    task: Task,
    tokens: Tokens,
    plan: RoundPlan,
    *,
    anchor: Named | None = None,
    shift: Named | None = None,
) -> float:
    """Train the model in place for one round and return the mean of the steps' losses.

    The optimizer starts afresh each round; the learning rate goes on over the whole federation.

    Args:
        loaded: The model, with its parameters as the round begins.
        task: What is learnt.
        tokens: The site's training records.
        plan: The round.
        anchor: Where training.proximal pulls to; None: where the round begins.
        shift: What each step's gradient gains, as SCAFFOLD has it; None: nothing.

    Raises:
        TrainingError: A loss was not finite; the parameters are then worthless.
    """
    model, settings = loaded.model, plan.training
    steps = plan.steps(len(tokens))
    losses: list[Tensor] = []
    if not all(module.training for module in loaded.modules):
        model.train()  # not by its own word: a PEFT model trains while its base still does not
    drawing = dropout_from(derive_seed(plan.seed, "dropout", plan.round, plan.site), loaded.device)
    with drawing, trained_alone(loaded, plan.factor) as trained, ExitStack() as stack:
        parameters, eager = list(trained.values()), Eager()
        if not shift and can_step_early(settings, loaded.exchange.trained_layout.size):
            stack.enter_context(eager.stepping(model, parameters))
        optimizer_step = make_step(parameters, settings)
        correct = Corrections(trained, pull=settings.proximal, anchor=anchor, shift=shift)
        for step, batch in enumerate(plan.batches(len(tokens))):
            progress = (plan.round - 1 + step / steps) / plan.rounds
            eager.rate = rate = learning_rate(settings, progress)
            losses.append(_accumulate(loaded, task, tokens, batch, plan, eager=eager))
            if settings.gradient_clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, settings.gradient_clip)
            correct()
            optimizer_step(rate)
    values = [sum(rows) / len(rows) for rows in (step.tolist() for step in losses)]
    for step, value in enumerate(values, start=1):
        if not isfinite(value):
            raise TrainingError(
                f"loss is not finite at step {step} of round {plan.round}; "
                "lower training.learning_rate or set training.gradient_clip"
            )
    return fsum(values) / len(values)


@contextmanager
def trained_alone(loaded: Loaded, factor: Factor | None) -> Iterator[dict[str, nn.Parameter]]:
    """Yield what a round trains; the other LoRA factor is frozen within, and as before after.

    A frozen parameter has no gradient, so none that could be clipped, noised, decayed or stepped.
    """
    own = loaded.exchange.parameters
    if factor is None:
        yield own
        return
    trained = {name: parameter for name, parameter in own.items() if trains(factor, name)}
    frozen = [p for n, p in own.items() if n not in trained and p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
            parameter.grad = None  # a round that failed may have left one
        yield trained
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def _accumulate(
    loaded: Loaded,
    task: Task,
    tokens: Tokens,
    batch: Indices,
    plan: RoundPlan,
    *,
    eager: Eager | None = None,
) -> Tensor:
    """Add the batch's mean gradient, micro-batch by micro-batch; return each row's loss.

    `eager` takes the step at once, if it can and there is one micro-batch.
    """
    rows_losses: list[Tensor] = []
    waste_max = PADDING_MAX.get(loaded.device.type, PADDING_MAX_ELSEWHERE)
    if not task.padded:
        waste_max = sys.maxsize
    parts = list(micro_batches(tokens, batch, rows_max=plan.micro_batch, waste_max=waste_max))
    if eager is not None:
        eager.is_on = len(parts) == 1
    for rows in parts:
        part = to_device(task.pad(tokens, rows), loaded.device)
        with precision(plan.training, loaded.device):
            losses = task.losses(loaded.model, part)
        # Weights, and no mean on the way: that would be two more operations.
        add_gradients(losses, torch.full_like(losses, 1 / len(batch)))
        rows_losses.append(losses.detach())
    return torch.cat(rows_losses) if len(rows_losses) > 1 else rows_losses[0]


def add_gradients(losses: Tensor, weights: Tensor) -> None:
    """Do what `losses.backward(weights)` does: add the gradients of the weighted sum of losses.

    Straight by PyTorch's engine, as `torch.autograd.backward` calls it (PyTorch 2.4 to 2.13, at
    least): what that looks at before takes as long as a small model's forward pass. It looks for
    functorch's transforms and tensors of other types, and prepares compiled code; here are none of
    them. Where PyTorch has no such engine, its own call does.

    Args:
        losses: What to differentiate, shape `(rows,)`.
        weights: Of each loss, of the same shape, type and device.
    """
    if _ENGINE is None:
        losses.backward(weights)  # type: ignore[no-untyped-call]
        return
    keep_graph, create_graph, inputs = False, False, ()  # no inputs: for all parameters
    _ENGINE.run_backward(
        (losses,),
        (weights,),
        keep_graph,
        create_graph,
        inputs,
        allow_unreachable=True,
        accumulate_grad=True,
    )


def micro_batches(
    tokens: Tokens, batch: Indices, *, rows_max: int | None, waste_max: int
) -> Iterator[Indices]:
    """Yield the batch in parts of alike lengths, the longest first.

    A part ends when padding its next row would bring its padding over `waste_max` tokens, about
    what one more forward and backward pass costs. Short texts then do not pay for the longest of
    their batch. The parts' gradients add up to the batch's.
    """
    if tokens.block is not None:  # all of one length: nothing is wasted
        rows, most = sorted(batch), rows_max or len(batch)
        yield from (rows[first : first + most] for first in range(0, len(rows), most))
        return
    part: Indices = []
    longest = waste = 0
    for index in sorted(batch, key=lambda i: (-len(tokens.inputs[i]), i)):
        length = len(tokens.inputs[index])
        if part and (waste + longest - length > waste_max or len(part) == rows_max):
            yield part
            part = []
        if not part:
            longest, waste = length, 0
        waste += longest - length
        part.append(index)
    yield part


def evaluate(
    loaded: Loaded, task: Task, tokens: Tokens, *, batch_size: int, training: Training
) -> Sums:
    """Return the sums over all examples. Examples go in order of length, to pad least."""
    loaded.model.eval()
    order = np.argsort(tokens.lengths(), kind="stable").tolist()
    parts: list[Sums] = []
    with torch.inference_mode(), precision(training, loaded.device):
        for start in range(0, len(order), batch_size):
            batch = task.pad(tokens, order[start : start + batch_size])
            parts.append(task.measure(loaded.model, to_device(batch, loaded.device)))
    return add_sums(parts)


def precision(training: Training, device: torch.device) -> AbstractContextManager[Any]:
    """Return bfloat16 autocast, or nothing."""
    if training.precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on the device."""
    if device.type == "cpu":  # where batches are made
        return batch
    return {name: tensor.to(device) for name, tensor in batch.items()}


@contextmanager
def dropout_from(seed: int, device: torch.device) -> Iterator[None]:
    """Let dropout draw from a seed; torch's own generators are then as they were.

    Not by `torch.manual_seed`: for each kind of accelerator that is not there it keeps a stack
    trace, which costs a millisecond a round of a small model; nor by `fork_rng`, which looks for
    accelerators too.
    """
    before = torch.get_rng_state()
    before_cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    before_mps = torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif device.type == "mps":
            torch.mps.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(before)
        if before_cuda is not None:
            torch.cuda.set_rng_state(before_cuda, device)
        if before_mps is not None:
            torch.mps.set_rng_state(before_mps)


def use_threads(count: int) -> None:
    """Fix the number of processor threads; sums in another order differ in their last bits."""
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
