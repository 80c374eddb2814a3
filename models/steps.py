"""Steps: a site's optimizer as a round uses it: set the rate, step, forget the gradients."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from intramural.core.federation import Training

LARGE = 1 << 20
"""Numbers of a model, or an embedding, from which on `Eager` is worth its while."""

Step = Callable[[float], None]
"""Steps at a learning rate, and clears the gradients."""


def decay_groups(
    parameters: Sequence[nn.Parameter], settings: Training
) -> list[tuple[list[nn.Parameter], float]]:
    """Return the parameters with their weight decay, which spares biases and norms (vectors)."""
    matrices = [p for p in parameters if p.ndim > 1]
    return [
        (matrices, settings.weight_decay),
        ([p for p in parameters if p.ndim <= 1], 0.0),
    ]


def make_optimizer(parameters: Sequence[nn.Parameter], settings: Training) -> Any:
    """Return the site's optimizer as PyTorch has it."""
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in decay_groups(parameters, settings)
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=fused)


def make_step(parameters: Sequence[nn.Parameter], settings: Training) -> Step:
    """Return the steps of `make_optimizer`, afresh; gradients that were left behind are cleared.

    A round that failed may have left another site's gradients on the shared model.
    """
    for parameter in parameters:
        parameter.grad = None
    if settings.optimizer == "sgd":
        return _Sgd(parameters, settings).step
    optimizer = make_optimizer(parameters, settings)

    def step(rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def can_step_early(settings: Training, size: int) -> bool:
    """Return whether `Eager` can take the steps of a model, and it is worth its while.

    Args:
        settings: Of the training; what looks at whole gradients needs them.
        size: Numbers that are trained.
    """
    return size >= LARGE and not (
        settings.optimizer != "sgd"
        or settings.momentum
        or settings.weight_decay
        or settings.gradient_clip
        or settings.proximal
        or settings.gradient_checkpointing  # a layer is run again on the way back, as it was
    )


class Eager:
    """Steps a parameter of plain SGD as soon as its gradient is whole, and forgets that.

    A layer's gradient is then used while it is at hand, and its memory goes to the next layer's:
    the model's whole gradient never exists. No bit differs from a step at the end.

    And a large embedding's gradient names only the rows that a batch has: the others stay as they
    are, and zeros as many as the vocabulary are neither made nor added. The rows are the same, but
    for the order in which those of a token that comes twice are added.
    """

    def __init__(self) -> None:
        """Do nothing yet."""
        self.rate = 0.0
        """Learning rate of the step."""
        self.is_on = False
        """Whether the next gradients are a batch's whole ones."""

    @contextmanager
    def stepping(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Take the steps within, when it `is_on`; what it leaves `make_step`'s step takes."""
        lookups = _lookups(model, {id(p) for p in parameters if p.numel() >= LARGE})
        hooks = [p.register_post_accumulate_grad_hook(self._step) for p in parameters]  # type: ignore[no-untyped-call]
        try:
            for module in lookups:
                module.sparse = True
            yield
        finally:
            for module in lookups:
                module.sparse = False
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _step(self, parameter: Tensor) -> None:
        if self.is_on and parameter.grad is not None:
            _move(parameter, parameter.grad, self.rate)
            parameter.grad = None


def _lookups(model: nn.Module, large: set[int]) -> list[nn.Embedding]:
    """Return the embeddings of these parameters that are nothing else."""
    holders = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    return [
        module
        for module in model.modules()
        if type(module) is nn.Embedding
        and not (module.sparse or module.scale_grad_by_freq)
        and id(module.weight) in large
        and module.weight.device.type in ("cpu", "cuda")
        and holders[id(module.weight)] == 1  # an output layer's gradient is whole in any case
    ]


def _move(parameter: Tensor, gradient: Tensor, rate: float) -> None:
    parameter.add_(gradient.coalesce() if gradient.is_sparse else gradient, alpha=-rate)


class _Sgd:
    """PyTorch's SGD without the optimizer object, whose hooks cost a third of a small model's step.

    The same operations in the same order on all parameters at once, so that no bit differs.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], settings: Training) -> None:
        groups = decay_groups(parameters, settings)
        self._decay: dict[Tensor, float] = {p: decay for group, decay in groups for p in group}
        self._decays = any(self._decay.values())
        self._momentum = settings.momentum
        self._buffers: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        moved: list[Tensor] = [p for p in self._decay if p.grad is not None]
        if not moved:
            return
        gradients = [p.grad for p in moved if p.grad is not None]
        if any(gradient.is_sparse for gradient in gradients):  # plain SGD, as `Eager` has it
            for parameter, gradient in zip(moved, gradients, strict=True):
                _move(parameter, gradient, rate)
                parameter.grad = None
            return
        if self._decays:
            for parameter, gradient in zip(moved, gradients, strict=True):
                if decay := self._decay[parameter]:
                    gradient.add_(parameter, alpha=decay)
        if self._momentum:
            gradients = [self._gathered(p, g) for p, g in zip(moved, gradients, strict=True)]
        torch._foreach_add_(moved, gradients, alpha=-rate)
        for parameter in moved:
            parameter.grad = None

    def _gathered(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """Return the parameter's velocity, with its gradient added; the first one is that alone."""
        if parameter not in self._buffers:
            self._buffers[parameter] = gradient  # nobody else holds it: `step` lets go of it
        else:
            self._buffers[parameter].mul_(self._momentum).add_(gradient)
        return self._buffers[parameter]
