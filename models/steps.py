"""Steps: a site's optimizer as a round uses it: set the rate, step, forget the gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

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
    """PyTorch's SGD by its functional form.

    For a small model the optimizer object, with its hooks, costs a third of a step.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], settings: Training) -> None:
        self._groups = decay_groups(parameters, settings)
        self._momentum = settings.momentum
        self._buffers: dict[nn.Parameter, Tensor | None] = dict.fromkeys(parameters)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for group, decay in self._groups:
            moved = [p for p in group if p.grad is not None]
            if not moved:
                continue
            buffers = [self._buffers[p] for p in moved]
            sgd(
                [*moved],
                [p.grad for p in moved if p.grad is not None],
                buffers,
                weight_decay=decay,
                momentum=self._momentum,
                lr=rate,
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )
            for parameter, buffer in zip(moved, buffers, strict=True):
                self._buffers[parameter] = buffer
                parameter.grad = None
