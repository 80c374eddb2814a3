"""Clipped sums: each weight's gradient, every unit's share scaled by its clip factor, added up."""

from collections.abc import MutableMapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import Parameter

from intramural.privacy.norms import Bundle, bundles, unit_norms
from intramural.privacy.records import Pass, working

SLACK = 1e-6
"""How far below the clip norm units are scaled, as a share: the sums round in float32."""

Sums = MutableMapping[Parameter, Tensor]
"""The running sum of each weight, in at least float32 and the weight's shape."""


def clip_factors(norms: Tensor, *, clip_norm: float) -> Tensor:
    """Return what each unit is scaled by, at most 1.

    | norm             | factor                          |
    |------------------|---------------------------------|
    | 0, or small      | 1                               |
    | large            | clip_norm * (1 - SLACK) / norm  |
    | infinite or NaN  | 0                               |
    """
    factors = (clip_norm * (1.0 - SLACK) / norms).clamp(max=1.0)
    return torch.where(torch.isfinite(norms), factors, 0.0)


def add_clipped(done: Pass, sums: Sums, *, clip_norm: float) -> None:
    """Add each unit's clipped gradient to the sums. Records are freed as they are used.

    Guarantees:
        Each unit adds a vector of L2 norm at most `clip_norm` over all weights together; one
        whose gradient is not finite adds exactly zero, and nothing of it reaches the sums.
    """
    norms = unit_norms(done)
    factors = clip_factors(norms, clip_norm=clip_norm)
    sound = torch.isfinite(norms)
    if not bool(sound.all()):
        _silence(done, sound)
    of_units = factors.float()
    of_rows = done.rows.spread(of_units)
    shared = list(bundles(done))
    for weight, record in done.records.items():
        record.product = None
        if record.dense is not None:
            _add(sums, weight, of_units.to(record.dense.dtype) @ record.dense)
            record.dense = None
        if record.lookup is not None:
            look, record.lookup = record.lookup, None
            grads = _scaled(look.grads, of_rows).flatten(0, 1)
            total = _start(sums, weight)
            (total.t() if look.column else total).index_add_(0, look.ids.flatten(), grads)
    while shared:
        _add_products(shared.pop(), of_rows, sums)
    done.records.clear()


def _silence(done: Pass, sound: Tensor) -> None:
    """Put zero in the place of what is not finite: a factor of 0 times NaN would be NaN."""
    keep = done.rows.spread(sound)
    for record in done.records.values():
        if record.dense is not None:
            record.dense = torch.where(sound.unsqueeze(1), record.dense, 0.0)
        if record.lookup is not None:
            record.lookup = replace(record.lookup, grads=_only(record.lookup.grads, keep))
        if record.product is not None:
            inputs, grads = (_only(t, keep) for t in (record.product.inputs, record.product.grads))
            record.product = replace(record.product, inputs=inputs, grads=grads)


def _only(tensor: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep.view(-1, 1, 1), tensor, 0.0)


def _add_products(bundle: Bundle, of_rows: Tensor, sums: Sums) -> None:
    """Add one matrix product a weight; the smaller side is scaled, shared inputs once."""
    inputs = working(bundle.inputs)
    scale_inputs = inputs.shape[2] <= sum(p.grads.shape[2] for p in bundle.products)
    if scale_inputs:
        inputs = _scaled(inputs, of_rows)
    for weight, product in zip(bundle.weights, bundle.products, strict=True):
        grads = working(product.grads)
        if not scale_inputs:
            grads = _scaled(grads, of_rows)
        x, g = inputs.flatten(0, 1), grads.flatten(0, 1)
        left, right = (x, g) if product.input_first else (g, x)
        if weight in sums:
            sums[weight].addmm_(left.t(), right)
        else:
            sums[weight] = left.t() @ right


def _scaled(tensor: Tensor, of_rows: Tensor) -> Tensor:
    tensor = working(tensor)
    return tensor * of_rows.to(tensor.dtype).view(-1, 1, 1)


def _start(sums: Sums, weight: Parameter) -> Tensor:
    """Return a weight's sum, begun at zero."""
    if weight not in sums:
        sums[weight] = torch.zeros_like(working(weight.detach()))
    return sums[weight]


def _add(sums: Sums, weight: Parameter, value: Tensor) -> None:
    value = value.view(weight.shape)
    if weight in sums:
        sums[weight] += value
    else:
        sums[weight] = value
