"""GhostNorms: each record's gradient norm in one layer, by Opacus' samplers, in float64.

Opacus adds Gram matrices and squares in the precision of the pass. Where positions nearly cancel,
float32 loses the norm, down to 0, and the record would pass unclipped.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from opacus.grad_sample import GradSampleHooksFastGradientClipping
from opacus.grad_sample.embedding_norm_sample import compute_embedding_norm_sample
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient
from opacus.grad_sample.linear import compute_linear_norm_sample
from torch import Tensor, nn

from intramural.privacy.norms import ROUNDING, squared_norms

DOUBLES_MAX: Final = 1 << 22
"""Numbers that are turned into float64 at once, or one row's if those are more."""

Grads = dict[Any, Tensor]
"""By trained parameter."""


def norms_of(layer: nn.Module, inputs: list[Tensor], grads: Tensor) -> Grads:
    """Return each trained parameter's gradient norm a row, shape `(rows,)`, float64.

    Args:
        layer: The layer.
        inputs: What it took in; the first is used.
        grads: Gradients of the losses' sum by what it gave out.

    Guarantees:
        A norm is too small by no more than float32 rounding of the gradient itself.
    """
    if type(layer) is nn.Linear:
        return _in_pieces(_linear_norms, layer, inputs[0], grads)
    if type(layer) is nn.Embedding:
        return _in_pieces(_embedding_norms, layer, inputs[0], grads)
    written = written_out(layer, inputs, grads)
    return {p: squared_norms(g.flatten(1)).sqrt() for p, g in written.items() if p.requires_grad}


def written_out(layer: nn.Module, inputs: list[Tensor], grads: Tensor) -> Grads:
    """Return a layer's gradients, one a row, as Opacus' own samplers write them out."""
    samplers = GradSampleHooksFastGradientClipping.GRAD_SAMPLERS
    sampler = samplers.get(type(layer), ft_compute_per_sample_gradient)
    found: Grads = sampler(layer, inputs, grads)
    return found


def _in_pieces(
    norms: Callable[[Any, Tensor, Tensor], Grads], layer: nn.Module, inputs: Tensor, grads: Tensor
) -> Grads:
    """Take norms of a few rows at a time: float64 of a language model's logits is large."""
    if len(inputs) != len(grads):
        return {}  # one input for all rows; missing norms are refused by name
    numbers = max(1, (inputs.numel() + grads.numel()) // max(1, len(grads)))
    rows = max(1, DOUBLES_MAX // numbers)
    pieces = zip(torch.split(inputs, rows), torch.split(grads, rows), strict=True)
    parts = [norms(layer, some, back) for some, back in pieces]
    return {p: torch.cat([part[p] for part in parts]) for p in parts[0]}


def _linear_norms(layer: nn.Linear, inputs: Tensor, grads: Tensor) -> Grads:
    """Return Opacus' norms in float64, and by how much float32 may miss the gradient."""
    x = inputs.reshape(len(inputs), -1, inputs.shape[-1]).double()
    g = grads.reshape(len(grads), -1, grads.shape[-1]).double()
    found: Grads = compute_linear_norm_sample(layer, [x], g)
    sizes = g.norm(dim=2)
    if layer.weight in found:
        found[layer.weight] = _rounded(found[layer.weight], (sizes * x.norm(dim=2)).sum(1))
    if layer.bias is not None and layer.bias in found:
        found[layer.bias] = _rounded(g.sum(1).norm(dim=1), sizes.sum(1))
    return found


def _rounded(norms: Tensor, sizes: Tensor) -> Tensor:
    """Return norms with the second pass' rounding; where positions cancel, that alone is left."""
    return torch.hypot(norms, ROUNDING * sizes)


def _embedding_norms(layer: nn.Embedding, inputs: Tensor, grads: Tensor) -> Grads:
    """Return Opacus' norms in float64; what stands at the padding is not looked up."""
    back = grads.double()
    if layer.padding_idx is not None:
        back = back.masked_fill((inputs == layer.padding_idx).unsqueeze(-1), 0.0)
    found: Grads = compute_embedding_norm_sample(layer, [inputs], back)
    sizes = back.norm(dim=-1).flatten(1).sum(1)
    return {p: _rounded(norms, sizes) for p, norms in found.items()}
