"""The second implementation: one unit at a time, plain autograd, sums in float64."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Losses = Callable[[nn.Module, Sequence[int]], Tensor]
"""Losses of the rows of these numbers, one each."""


def unit_gradients(
    model: nn.Module, losses: Losses, units: Sequence[Sequence[int]]
) -> list[dict[str, Tensor]]:
    """Return each unit's gradient: the sum over its rows, each row alone in its pass."""
    gradients = []
    for rows in units:
        total: dict[str, Tensor] = {}
        for row in rows:
            model.zero_grad(set_to_none=True)
            losses(model, [row]).sum().backward()  # type: ignore[no-untyped-call]
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and parameter.grad is not None:
                    total[name] = total.get(name, 0.0) + parameter.grad.double()
        gradients.append(total)
    model.zero_grad(set_to_none=True)
    return gradients


def norms(gradients: Sequence[dict[str, Tensor]]) -> list[float]:
    """Return each unit's norm."""
    return [float(sum(g.square().sum() for g in one.values()) ** 0.5) for one in gradients]


def clipped_sum(
    gradients: Sequence[dict[str, Tensor]],
    *,
    clip_norm: float,
    lengths: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """Return the sum of the gradients, each scaled to a norm of at most `clip_norm`.

    Less a millionth of it, as the engine promises. With `lengths`, what an engine took for the
    gradients' norms, their own do not count.
    """
    lengths = norms(gradients) if lengths is None else lengths
    return weighted_sum(gradients, [min(1.0, clip_norm * (1 - 1e-6) / n) for n in lengths])


def opacus_sum(gradients: Sequence[dict[str, Tensor]], *, clip_norm: float) -> dict[str, Tensor]:
    """Return the sum of the gradients scaled as Opacus does: by clip_norm / (norm + 1e-6)."""
    return weighted_sum(gradients, [min(1.0, clip_norm / (n + 1e-6)) for n in norms(gradients)])


def weighted_sum(
    gradients: Sequence[dict[str, Tensor]], factors: Sequence[float]
) -> dict[str, Tensor]:
    """Return the sum of the gradients, each times its factor."""
    total: dict[str, Tensor] = {}
    for one, factor in zip(gradients, factors, strict=True):
        for name, gradient in one.items():
            total[name] = total.get(name, 0.0) + factor * gradient
    return total


def relative_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the L2 distance of all tensors together, as a share of the expected length."""
    wrong = torch.zeros((), dtype=torch.float64)
    size = torch.zeros((), dtype=torch.float64)
    for name in expected.keys() | got.keys():
        a = got[name].double() if name in got else torch.zeros(())
        b = expected[name] if name in expected else torch.zeros(())
        wrong += (a - b).square().sum()
        size += b.square().sum()
    return float((wrong / size).sqrt())
