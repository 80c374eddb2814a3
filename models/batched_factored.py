"""Factored steps: many clients' plain steps on small batches, with no copy of the model each.

A step of SGD takes `rate * G^T X` from a linear layer's weight W: X and G are the layer's inputs
and the gradients of its outputs, a row for each position of the batch. So after some steps a
client's weight is `W - G^T X`, with the rows of all steps one below the other and the rates in G,
and the layer says `x W^T - (x X^T) G`. As long as there are few rows, this is less work than to
write and read again each client's weight in each step; and what W has to do is done for all clients
in one product.
"""

from math import prod

import torch
from torch import Tensor

from intramural.core.federation import Training
from intramural.core.layout import Vector
from intramural.models.batched_losses import BatchedLosses
from intramural.models.batched_rows import Factors
from intramural.models.loading import Loaded
from intramural.models.stacked import tensors_of, written_deltas
from intramural.models.tasks import Batch


def pays(
    losses: BatchedLosses,
    training: Training,
    batch: Batch,
    weights: Tensor,
    *,
    steps: int,
    size: int,
) -> bool:
    """Return whether so many steps on such batches are plain ones, and cheaper as factors.

    The last step multiplies with the rows of all before; a stack, with each client's weights.
    Measured on a perceptron, the two are even between half as many numbers and as many.

    Args:
        losses: Of the model; its own parameters do to find shapes.
        training: Says how steps are made.
        batch: A step's.
        weights: Of the batch's rows.
        steps: How many.
        size: Number of parameters that are trained.
    """
    settings = (training.momentum, training.weight_decay, training.gradient_clip or 0.0)
    if training.optimizer != "sgd" or any(settings) or losses.layers is None:
        return False
    rows = (
        steps * prod(shape[:-1]) * (layer.in_features + layer.out_features)
        for layer, shape in losses.output_shapes({}, batch, weights, shared=True).items()
    )
    return 2 * sum(rows) <= size


class FactoredSteps:
    """Some clients' parameters: what all began with, and how far each has moved, as factors."""

    def __init__(
        self, loaded: Loaded, losses: BatchedLosses, start: Vector, *, clients: int
    ) -> None:
        """Begin at `start`, shape `(exchange.layout.size,)`."""
        self._losses, self._clients = losses, clients
        self._layout = loaded.exchange.layout
        self._start = tensors_of(loaded, start)
        self._moved: Factors = {}

    def step(self, batch: Batch, weights: Tensor, *, rate: float) -> Tensor:
        """Move each client by the gradient of its weighted sum; return the sums, (clients,)."""
        sums, factors = self._losses.factors(
            self._start, batch, weights, shared=True, moved=self._moved
        )
        for layer, (inputs, outputs) in factors.items():
            rows = inputs, outputs * rate
            if layer in self._moved:
                before = self._moved[layer]
                rows = torch.cat([before[0], rows[0]], 1), torch.cat([before[1], rows[1]], 1)
            self._moved[layer] = rows
        return sums

    @torch.no_grad()
    def deltas(self) -> list[Vector]:
        """Return each client's parameters less the start."""
        assert self._losses.layers is not None
        moved: dict[str, tuple[Tensor, Tensor | None]] = {}
        for layer, (inputs, outputs) in self._moved.items():
            weight, bias = self._losses.layers[layer]
            if weight is not None:
                moved[weight] = outputs, inputs
            if bias is not None:
                moved[bias] = outputs, None

        def write(name: str, out: Tensor) -> None:
            if name not in moved:  # its layer did not run
                out.zero_()
                return
            outputs, inputs = moved[name]
            if inputs is None:
                torch.neg(outputs.sum(1), out=out)
            elif out.device == outputs.device:
                torch.baddbmm(out, outputs.mT, inputs, beta=0, alpha=-1, out=out)
            else:
                out.copy_(torch.bmm(outputs.mT, inputs).neg_())

        return written_deltas(self._layout, self._clients, write)
