"""Rows: a step of clients that share their parameters, with all clients' rows in one plain pass.

Without `vmap`, which writes each operation out for a stack. What a row says must not depend on the
others of its batch, nor may a layer see the rows in another order than the batch has them:
`batched_fit` tries both.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from intramural.core.errors import TrainingError
from intramural.models.tasks import Batch

Move = dict[str, Tensor]
"""How far a client's layer has moved: its weight by `inputs` and `outputs`, its bias by `bias`."""


def row_factors(
    losses: Callable[[Batch], Tensor],
    layers: Iterable[nn.Linear],
    batch: Batch,
    weights: Tensor,
    *,
    moves: Mapping[nn.Linear, Move],
) -> tuple[Tensor, dict[nn.Linear, tuple[Tensor, Tensor]]]:
    """Return clients' weighted sums of losses, and their gradients as factors, as `factors` does.

    Args:
        losses: Returns the losses of a batch of rows, shape `(rows,)`.
        layers: Those that train.
        batch: Clients and rows first.
        weights: Of the rows, shape (clients, rows).
        moves: Of layers that have moved.

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
        if move := moves.get(layer):
            output = _moved(own, output.reshape(clients, -1, layer.out_features), move).view(
                output.shape
            )
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


def _moved(inputs: Tensor, output: Tensor, move: Move) -> Tensor:
    """Return a layer's output, of shape (clients, positions, out), as it has moved."""
    if "inputs" not in move:
        return output - move["bias"][:, None] if "bias" in move else output
    shares = torch.bmm(inputs, move["inputs"].mT)
    if "bias" in move:  # which is the sum of the outputs: as if each input had a one more
        shares = shares + 1
    return torch.baddbmm(output, shares, move["outputs"], alpha=-1)
