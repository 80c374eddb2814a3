"""Norms: each unit's squared gradient norm, from records, over all weights together.

A weight whose gradient is left^T right has the squared norm sum((left left^T) * (right right^T)),
two small matrices over positions in place of the gradient itself; Goodfellow 2015,
https://arxiv.org/abs/1510.01799, and Li et al. 2022, https://arxiv.org/abs/2110.05679. The cross
term of a table shared with an output layer is taken at the looked-up entries alone.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import Parameter

from intramural.privacy.records import (
    Lookup,
    Pass,
    Product,
    Record,
    Rows,
    multiplied,
    scattered,
    working,
)

ROUNDING = 2.0**-22
"""Float32 rounding of a Gram norm's terms, as a share of what they would be without signs."""

DOUBT_MAX = 2e-5
"""Rounding above this share of a squared norm is too much: the unit's gradient is written out.

Where positions nearly cancel, a norm is far below its positions' sizes; rounding then would hide
it, and the unit would pass unclipped. Below the share, the rounding is added to the norm, which so
may come out too large, by half of it, and never too small.
"""


CHUNK = 512
"""Elements that are squared and added in float32: four million would lose 2e-3 of a norm."""


@dataclass(frozen=True)
class Bundle:
    """Products whose inputs are one tensor: queries, keys and values share half of the work."""

    weights: list[Parameter]
    products: list[Product]

    @property
    def inputs(self) -> Tensor:
        """The inputs, shape (rows, length, in)."""
        return self.products[0].inputs


def unit_norms(done: Pass) -> Tensor:
    """Return each unit's gradient norm over all weights, shape `(units,)`, float64.

    Corners: no position at all gives 0; what is not finite, or overflows float32, gives NaN or
    infinity. Records that mix kinds are first written out, so the pass may change its form, not
    its meaning.

    Guarantees:
        A norm is too small by no more than the rounding of the gradient written out in float32.
    """
    for weight, record in done.records.items():
        _settle(done.rows, weight, record)
    first = next(iter(done.records))
    exact, gram, doubt = torch.zeros(3, done.rows.units, dtype=torch.float64, device=first.device)
    for record in done.records.values():
        if record.dense is not None:
            exact += squared_norms(record.dense)
        elif record.lookup is not None and record.product is None:
            exact += _lookup_squares(done.rows, record.lookup)
        elif record.lookup is not None and record.product is not None:
            cross, rounding = _cross_terms(done.rows, record.product, record.lookup)
            gram += _lookup_squares(done.rows, record.lookup) + 2.0 * cross
            doubt += 2.0 * rounding
    for bundle in bundles(done):
        squares, rounding = _gram_squares(done.rows, bundle)
        gram += squares
        doubt += rounding
    for unit in (doubt > DOUBT_MAX * (exact + gram)).nonzero()[:, 0].tolist():
        gram[unit], doubt[unit] = _written_square(done, unit), 0.0
    total: Tensor = exact + gram + doubt
    return total.sqrt_()


def squared_norms(flat: Tensor) -> Tensor:
    """Return the squared L2 norm of each row of a matrix, float64, right to some 1e-7."""
    whole = flat.shape[1] // CHUNK * CHUNK
    chunks = flat[:, :whole].reshape(len(flat), whole // CHUNK, CHUNK)
    parts = [torch.linalg.vector_norm(chunks, dim=2), flat[:, whole:].norm(dim=1, keepdim=True)]
    squares: Tensor = torch.cat(parts, dim=1).double().square_().sum(1)
    return squares


def bundles(done: Pass) -> Iterator[Bundle]:
    """Yield the products by their inputs. All inputs are alive, so addresses tell them apart."""
    found: dict[Hashable, Bundle] = {}
    for weight, record in done.records.items():
        if record.product is not None:
            x = record.product.inputs
            key = (x.data_ptr(), x.shape, x.stride(), x.dtype)
            bundle = found.setdefault(key, Bundle([], []))
            bundle.weights.append(weight)
            bundle.products.append(record.product)
    yield from found.values()


def _settle(rows: Rows, weight: Parameter, record: Record) -> None:
    """Bring a record to a form whose cross terms are known: dense, or one product and a lookup."""
    product, lookup = record.product, record.lookup
    plain_tie = product is None or lookup is None or not (product.input_first or lookup.column)
    if plain_tie and record.dense is None:
        return
    dense = record.dense
    if product is not None:
        extra = multiplied(rows, product)
        dense = extra if dense is None else dense + extra
    if lookup is not None:
        entries = weight.shape[1] if lookup.column else weight.shape[0]
        extra = scattered(rows, lookup, entries)
        dense = extra if dense is None else dense + extra
    record.dense, record.product, record.lookup = dense, None, None


def _gram_squares(rows: Rows, bundle: Bundle) -> tuple[Tensor, Tensor]:
    """Return the squared norms of weights that share their inputs, added up, and their rounding."""
    grads = [working(product.grads) for product in bundle.products]
    x = working(bundle.inputs)
    squares, rounding = torch.zeros(2, rows.units, dtype=torch.float64, device=x.device)
    for units, (xs, *gs) in rows.grouped(x, *grads):
        gram = torch.bmm(gs[0], gs[0].transpose(1, 2))
        for g in gs[1:]:
            gram = gram.baddbmm_(g, g.transpose(1, 2))
        gram.mul_(torch.bmm(xs, xs.transpose(1, 2)))
        squares[units] = gram.flatten(1).sum(1, dtype=torch.float64)
        # A term is at most the product of its positions' sizes, whose squares are the diagonal.
        sizes = gram.diagonal(dim1=1, dim2=2).sqrt().sum(1, dtype=torch.float64)
        rounding[units] = ROUNDING * sizes.square()
    return squares, rounding


def _written_square(done: Pass, unit: int) -> float:
    """Return one unit's squared norm over the weights that are products, written out in turn."""
    (mine,) = (done.rows.owners == unit).nonzero(as_tuple=True)
    alone = Rows([0] * len(mine))
    total = 0.0
    for weight, record in done.records.items():
        if record.product is None:
            continue
        x, g = (t[mine.to(t.device)] for t in (record.product.inputs, record.product.grads))
        written = multiplied(alone, replace(record.product, inputs=x, grads=g))
        if record.lookup is not None:
            ids, g = (t[mine.to(t.device)] for t in (record.lookup.ids, record.lookup.grads))
            look = replace(record.lookup, ids=ids, grads=g)
            written += scattered(alone, look, weight.shape[0])
        total += float(squared_norms(written))
    return total


def _lookup_squares(rows: Rows, lookup: Lookup) -> Tensor:
    """Return a table's squared gradient norm a unit: entries looked up twice add up first."""
    grads = working(lookup.grads)
    span = int(lookup.ids.max()) + 1 if lookup.ids.numel() else 1
    slots = rows.owners.to(grads.device).unsqueeze(1) * span + lookup.ids
    used, where = torch.unique(slots, return_inverse=True)
    sums = grads.new_zeros(len(used), grads.shape[2])
    sums.index_add_(0, where.flatten(), grads.reshape(-1, grads.shape[2]))
    squares = torch.zeros(rows.units, dtype=torch.float64, device=grads.device)
    return squares.index_add_(0, used // span, sums.square().sum(1).double())


def _cross_terms(rows: Rows, product: Product, lookup: Lookup) -> tuple[Tensor, Tensor]:
    """Return the inner product of a shared table's two gradients, a unit, and its rounding.

    sum over positions s of the output layer and t of the table of
    grads_out[s, ids[t]] * (inputs[s] . grads_in[t]).
    """
    cross, rounding = torch.zeros(2, rows.units, dtype=torch.float64, device=product.grads.device)
    parts = (product.inputs, product.grads, lookup.grads)
    x, out, back = (working(part) for part in parts)
    inner = rows.grouped(x, out)
    outer = rows.grouped(back, lookup.ids)
    for (units, (xs, outs)), (_, (backs, ids)) in zip(inner, outer, strict=True):
        wanted = outs.gather(2, ids.unsqueeze(1).expand(-1, outs.shape[1], -1))
        sizes = wanted.norm(dim=2) * xs.norm(dim=2)
        wanted = wanted.mul_(torch.bmm(xs, backs.transpose(1, 2)))
        cross[units] = wanted.flatten(1).sum(1, dtype=torch.float64)
        bound = sizes.sum(1, dtype=torch.float64) * backs.flatten(1).norm(dim=1)
        rounding[units] = ROUNDING * bound
    return cross, rounding
