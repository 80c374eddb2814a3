"""Units' gradients of many clients: written out, or as the factors of linear layers' gradients.

Both answer two questions: how long is each unit's gradient, and what is each client's sum of them,
scaled. The factors of a linear layer's gradient are its inputs and its outputs' gradients.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from intramural.models.stacked import pieces
from intramural.privacy.norms import squared_norms

WRITTEN_MAX = 1 << 24
"""Numbers of one layer's gradients that are written out at a time to be measured."""

Sums = Mapping[str, Tensor]
"""By name, `(clients, *shape)`."""


class Units(Protocol):
    """The gradients of some units of each client, `(clients, units)` of them."""

    def squares(self) -> Tensor:
        """Return their squared L2 norms over all weights together, (clients, units), float64."""
        ...

    def add(self, factors: Tensor, sound: Tensor, sums: Sums) -> None:
        """Add each client's gradients times `factors` to its sums.

        Both arguments have shape (clients, units). What is not sound adds exactly zero.
        """
        ...


class Written:
    """Units' gradients written out: for any layer."""

    def __init__(self, gradients: Mapping[str, Tensor]) -> None:
        """Take gradients by name, `(clients, units, *shape)`."""
        self._gradients = gradients

    def squares(self) -> Tensor:
        """Return the squared norms, (clients, units)."""
        parts = [
            squared_norms(_in_memory(g).flatten(0, 1).flatten(1)).view(g.shape[:2])
            for g in self._gradients.values()
        ]
        return torch.stack(parts).sum(0)

    def add(self, factors: Tensor, sound: Tensor, sums: Sums) -> None:
        """Add the scaled gradients, a matrix product a weight."""
        all_sound = bool(sound.all())
        for name, gradient in self._gradients.items():
            turned = _in_memory(gradient)
            total = sums[name] if turned is gradient else sums[name].mT
            flat = (turned if all_sound else _only(turned, sound)).flatten(2)
            total += torch.bmm(factors.unsqueeze(1), flat).view(total.shape)


def _in_memory(tensor: Tensor) -> Tensor:
    """Return the tensor itself, or turned where its last dimension but one runs fastest.

    So are the gradients of linear layers; to write them out otherwise would take a pass.
    """
    turned = tensor.ndim > 3 and tensor.stride(-2) == 1 and tensor.stride(-1) > 1
    return tensor.mT if turned else tensor


@dataclass(frozen=True, kw_only=True)
class Factors:
    """A linear layer's inputs and its outputs' gradients."""

    weight: str | None
    """Name of the weight, or None: it does not travel."""
    bias: str | None
    inputs: Tensor
    """Shape (clients, units, positions, in)."""
    outputs: Tensor
    """Shape (clients, units, positions, out)."""


class Factored:
    """Units' gradients as factors: for models that train linear layers only, each used once."""

    def __init__(self, layers: Sequence[Factors]) -> None:
        """Take the layers' factors, of one layer at least; a weight without has no gradient."""
        self._layers = layers

    def squares(self) -> Tensor:
        """Return the squared norms, (clients, units)."""
        parts = []
        for layer in self._layers:
            if layer.weight is not None:
                parts.append(_product_squares(layer.inputs, layer.outputs))
            if layer.bias is not None:
                whole = layer.outputs.sum(2)
                parts.append(squared_norms(whole.flatten(0, 1)).view(whole.shape[:2]))
        return torch.stack(parts).sum(0)

    def add(self, factors: Tensor, sound: Tensor, sums: Sums) -> None:
        """Add the scaled gradients, a matrix product a weight: the one plain training has."""
        all_sound = bool(sound.all())
        for layer in self._layers:
            inputs, outputs = layer.inputs, layer.outputs
            if not all_sound:
                inputs, outputs = _only(inputs, sound), _only(outputs, sound)
            scaled = (outputs * factors[:, :, None, None]).flatten(1, 2)
            if layer.weight is not None:
                sums[layer.weight].baddbmm_(scaled.mT, inputs.flatten(1, 2))
            if layer.bias is not None:
                sums[layer.bias].add_(scaled.sum(1))


def _product_squares(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return the squared norm of each unit's outputs^T inputs, float64.

    One position: the product of two squared lengths. Several: sum((x x^T) * (g g^T)) over pairs of
    positions, in float64, whose rounding stays far below a norm although positions cancel; or
    written out where that is the smaller.
    """
    clients, units, positions, width = inputs.shape
    x, g = inputs.flatten(0, 1), outputs.flatten(0, 1)
    if positions == 1:
        squares = squared_norms(x[:, 0]) * squared_norms(g[:, 0])
    elif positions * (width + g.shape[2]) > width * g.shape[2]:
        parts = pieces(len(x), max(1, WRITTEN_MAX // (width * g.shape[2])))
        written = (torch.bmm(g[a.start : a.stop].mT, x[a.start : a.stop]) for a in parts)
        squares = torch.cat([squared_norms(part.flatten(1)) for part in written])
    else:
        x, g = x.double(), g.double()
        gram = torch.bmm(x, x.mT).mul_(torch.bmm(g, g.mT))
        squares = gram.sum((1, 2))
    return squares.view(clients, units)


def _only(tensor: Tensor, sound: Tensor) -> Tensor:
    """Put zero in the place of what is not sound: a factor of 0 times NaN would be NaN."""
    return torch.where(sound.view(*sound.shape, *[1] * (tensor.ndim - 2)), tensor, 0.0)
