"""Autograd functions of the layers: forward as ever; backward hands over a unit's share.

None of them computes a weight's gradient: backward returns the gradient of the input alone, and
leaves with the recorder what the weight's gradient is made of. Recording happens in backward, so
gradient checkpointing of either kind needs nothing special: what is recomputed in a forward is
recorded once.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from intramural.privacy.records import sequence, working


class Multiply(Function):
    """x W^T + b, or x W + b where the weight has shape (in, out)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, recorder: Any, input_first: bool
    ) -> Tensor:
        """Compute the output."""
        ctx.recorder, ctx.opened, ctx.input_first = recorder, recorder.opened, input_first
        ctx.weight, ctx.bias = weight, bias
        # A frozen weight (bias-only tuning) needs no inputs.
        ctx.save_for_backward(x if weight.requires_grad else x.new_empty(0), weight)
        ctx.dtype = x.dtype
        return functional.linear(x, weight.t() if input_first else weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        """Record, and return the gradient of the input."""
        ctx.recorder.resume(ctx.opened)
        x, weight = ctx.saved_tensors
        if ctx.bias is not None and ctx.bias.requires_grad:
            ctx.recorder.add_rows(ctx.bias, sequence(working(grad)).sum(1))
        if ctx.weight.requires_grad:
            ctx.recorder.add_product(ctx.weight, x, grad, input_first=ctx.input_first)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        weight = weight.to(grad.dtype)  # autocast: the forward used the weight in grad's precision
        back = grad @ (weight.t() if ctx.input_first else weight)
        return back.to(ctx.dtype), None, None, None, None


class LookUp(Function):
    """Entries of a table by number; `padding` is an entry that never gets a gradient."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, table: Tensor, padding: int | None, recorder: Any, column: bool
    ) -> Tensor:
        """Compute the output."""
        ctx.save_for_backward(ids)
        ctx.table, ctx.padding, ctx.column = table, padding, column
        ctx.recorder, ctx.opened = recorder, recorder.opened
        return functional.embedding(ids, table.t() if column else table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None, None]:
        """Record, and return the gradient of the input."""
        ctx.recorder.resume(ctx.opened)
        (ids,) = ctx.saved_tensors
        if ctx.padding is not None:
            grad = grad.masked_fill((ids == ctx.padding).unsqueeze(-1), 0.0)
        ctx.recorder.add_lookup(ctx.table, ids, grad, column=ctx.column)
        return None, None, None, None, None


class Normalize(Function):
    """Layer normalisation over the last dimension, without keeping the normalised input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, recorder: Any
    ) -> Tensor:
        """Compute the output."""
        y, mean, rstd = torch.native_layer_norm(x, [x.shape[-1]], weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.weight, ctx.bias = weight, bias
        ctx.recorder, ctx.opened = recorder, recorder.opened
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        """Record, and return the gradient of the input."""
        ctx.recorder.resume(ctx.opened)
        x, weight, mean, rstd = ctx.saved_tensors
        if ctx.weight.requires_grad:
            per_row = working(x) - mean
            per_row.mul_(rstd).mul_(grad)
            ctx.recorder.add_rows(ctx.weight, sequence(per_row).sum(1))
            del per_row
        if ctx.bias is not None and ctx.bias.requires_grad:
            ctx.recorder.add_rows(ctx.bias, sequence(working(grad)).sum(1))
        back = None
        if ctx.needs_input_grad[0]:
            back = torch.ops.aten.native_layer_norm_backward(
                grad.contiguous(), x, [x.shape[-1]], mean, rstd, weight, None, [True, False, False]
            )[0]
        return back, None, None, None, None


class Spread(Function):
    """A vector as one copy a row, `(rows, 1, ..., 1, width)`, for what multiplies element-wise.

    Autograd sums a copy's gradient over the dimensions of 1, which leaves each row's gradient.
    """

    @staticmethod
    def forward(ctx: Any, vector: Tensor, rows: int, dimensions: int, recorder: Any) -> Tensor:
        """Compute the copies."""
        ctx.vector, ctx.recorder, ctx.opened = vector, recorder, recorder.opened
        shape = (rows, *[1] * (dimensions - 2), vector.numel())
        return vector.reshape(-1).expand(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        """Record, and return the gradient of the input."""
        ctx.recorder.resume(ctx.opened)
        ctx.recorder.add_rows(ctx.vector, grad.flatten(1))
        return None, None, None, None
