"""Steps: a site's optimizer as a round uses it: set the rate, step, forget the gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from intramural.core.federation import Training

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
        moved: list[Tensor] = [p for p in self._decay if p.grad is not None]
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
