"""Steps: a site's optimizer as a round uses it: set the rate, step, forget the gradients."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from intramural.core.federation import Training

ROWS_MIN = 1 << 20
"""Numbers of an embedding of which gradients name only the rows that a batch has."""

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


@contextmanager
def rows_alone(
    model: nn.Module, parameters: Sequence[nn.Parameter], settings: Training, *, is_corrected: bool
) -> Iterator[None]:
    """Have a large embedding's gradient name only the rows that a batch has, within.

    Where a step is plain SGD the others stay as they are, and a gradient of zeros as large as the
    vocabulary is neither made nor added. The rows are the same, but for the order in which those
    of a token that comes twice are added.

    Args:
        model: What is trained.
        parameters: Those that are.
        settings: Of the training; what looks at whole gradients keeps them.
        is_corrected: Whether gradients gain something before the step.
    """
    is_plain = settings.optimizer == "sgd" and not (
        settings.momentum or settings.weight_decay or settings.gradient_clip or is_corrected
    )
    large = {id(p) for p in parameters if is_plain and p.ndim == 2 and p.numel() >= ROWS_MIN}
    found = [m for m in model.modules() if large and _is_lookup(m, large)]
    holders = [id(p) for m in model.modules() if found for p in m.parameters(recurse=False)]
    # one that is an output layer's as well has a whole gradient in any case
    found = [m for m in found if holders.count(id(m.weight)) == 1]
    try:
        for module in found:
            module.sparse = True
        yield
    finally:
        for module in found:
            module.sparse = False


def _is_lookup(module: nn.Module, large: set[int]) -> bool:
    is_plain = type(module) is nn.Embedding and not (module.sparse or module.scale_grad_by_freq)
    return is_plain and id(module.weight) in large


class _Sgd:
    """PyTorch's SGD without the optimizer object, whose hooks cost a third of a small model's step.

    The same operations in the same order on all parameters at once, so that no bit differs.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], settings: Training) -> None:
        groups = decay_groups(parameters, settings)
        self._decay: dict[Tensor, float] = {p: decay for group, decay in groups for p in group}
        self._momentum = settings.momentum
        self._buffers: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        moved: list[Tensor] = []
        for parameter in self._decay:
            if parameter.grad is None:
                continue
            if parameter.grad.is_sparse:  # as `rows_alone` has it
                parameter.add_(parameter.grad.coalesce(), alpha=-rate)
                parameter.grad = None
            else:
                moved.append(parameter)
        if not moved:
            return
        gradients = [p.grad for p in moved if p.grad is not None]
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
