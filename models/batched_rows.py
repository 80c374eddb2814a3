"""Rows: a step of clients that share their parameters, with all clients' rows in one plain pass.

Without `vmap`, which writes each operation out for a stack. What a row says must not depend on the
others of its batch, nor may a layer see the rows in another order than the batch has them:
`batched_fit` tries both.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from intramural.core.errors import TrainingError
from intramural.models.tasks import Batch

Factors = dict[nn.Linear, tuple[Tensor, Tensor]]
"""Of each layer its inputs and the gradients of its outputs, shapes (clients, positions, in) and
(.., out), or with units (clients, units, positions, ..): a weight's gradient is their product."""
Names = tuple[str | None, str | None]
"""Of a layer's weight and bias; None: it does not train."""


def row_factors(
    losses: Callable[[Batch], Tensor],
    layers: Mapping[nn.Linear, Names],
    batch: Batch,
    weights: Tensor,
    *,
    moved: Factors,
) -> tuple[Tensor, Factors]:
    """Return clients' weighted sums of losses, and their gradients as factors, as `factors` does.

    Args:
        losses: Returns the losses of a batch of rows, shape `(rows,)`.
        layers: Those that train.
        batch: Clients and rows first.
        weights: Of the rows, shape (clients, rows).
        moved: As `BatchedLosses.factors` has it.

    Raises:
        TrainingError: A layer ran twice, or what it said was written over.
    """
    clients = len(weights)
    inputs: dict[nn.Linear, Tensor] = {}
    outputs: dict[nn.Linear, tuple[Tensor, int]] = {}

    def tap(layer: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if layer in inputs:
            raise TrainingError("a layer ran twice in a pass; its gradient is not one product")
        own = args[0].reshape(clients, -1, layer.in_features)
        inputs[layer] = own.detach()
        if layer in moved:
            apart = output.reshape(clients, -1, layer.out_features)
            output = _moved(own, apart, layers[layer], moved[layer]).view(output.shape)
        if not output.requires_grad:
            output.requires_grad_()
        outputs[layer] = output, output._version
        return output

    handles = [layer.register_forward_hook(tap) for layer in layers]
    try:
        with torch.enable_grad():
            found = losses({name: tensor.flatten(0, 1) for name, tensor in batch.items()})
            sums = (found.view(weights.shape) * weights).sum(1)
    finally:
        for handle in handles:
            handle.remove()
    if any(output._version != version for output, version in outputs.values()):
        raise TrainingError("a layer's output is written over; its gradient is lost")
    told = [output for output, _ in outputs.values()]
    grads = torch.autograd.grad(sums.sum(), told, materialize_grads=True)
    return sums.detach(), {
        layer: (inputs[layer], grad.reshape(clients, -1, layer.out_features))
        for layer, grad in zip(outputs, grads, strict=True)
    }


def _moved(inputs: Tensor, output: Tensor, names: Names, moved: tuple[Tensor, Tensor]) -> Tensor:
    """Return a layer's output, of shape (clients, positions, out), as it has moved."""
    (weight, bias), (before, away) = names, moved
    if weight is None:
        return output - away.sum(1, keepdim=True)
    shares = torch.bmm(inputs, before.mT)
    if bias is not None:  # as if each input had a one more
        shares = shares + 1
    return torch.baddbmm(output, shares, away, alpha=-1)
