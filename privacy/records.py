"""Records: what one backward pass leaves of each weight's gradient, and whose rows they are."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import Parameter, functional

from intramural.core.errors import TrainingError, Unclippable

ONE_HOT_MAX = 16
"""Tables up to this many entries (token types) are products with one-hot rows: faster to add up."""


DENSE_SHARE = 2
"""Unit gradients are kept up to this many times the size of their factors: they save the norm's
Gram matrices and the sum's product, and attention's weights are within it at 128 tokens."""


def working(tensor: Tensor) -> Tensor:
    """Return the tensor in the precision of norms and sums: at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def full_precision(device: torch.device) -> torch.autocast:
    """Return a context in which norms and sums are not cast to half precision."""
    return torch.autocast(device.type, enabled=False)


class Rows:
    """Which unit owns each row of the forward pass."""

    def __init__(self, owners: Sequence[int]) -> None:
        """Take the owners: numbered from 0 without gaps, a unit's rows together and in order."""
        previous = -1
        for owner in owners:
            if owner not in (previous, previous + 1) or owner < 0:
                raise TrainingError("the rows of a unit must stand together, units numbered from 0")
            previous = owner
        self.count = len(owners)
        self.units = previous + 1
        self.alone = self.units == self.count
        """Whether every unit has a single row, which is free."""
        self.owners = torch.tensor(owners, dtype=torch.long)
        self._groups = self._by_size()

    def _by_size(self) -> list[tuple[Tensor, Tensor, int]]:
        """Return (units, their rows, rows a unit) for each number of rows that a unit has."""
        sizes = torch.bincount(self.owners, minlength=self.units)
        return [
            (
                (sizes == size).nonzero()[:, 0],
                (sizes[self.owners] == size).nonzero()[:, 0],
                int(size),
            )
            for size in sorted(set(sizes.tolist()))
        ]

    def grouped(self, *tensors: Tensor) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Yield units of equal size, each tensor `(rows, length, ...)` laid end to end a unit.

        The pieces have shape `(units, size * length, ...)`: nothing is padded, and nothing is
        copied where all units have the same size.
        """
        for units, rows, size in self._groups:
            parts = tensors
            if len(self._groups) > 1:
                parts = tuple(tensor[rows.to(tensor.device)] for tensor in tensors)
            shape = (len(units), size * tensors[0].shape[1])
            yield units.to(tensors[0].device), [p.reshape(*shape, *p.shape[2:]) for p in parts]

    def unit_sums(self, per_row: Tensor) -> Tensor:
        """Return the sum of each unit's rows; `(rows, ...)` becomes `(units, ...)`."""
        if self.alone:
            return per_row
        sums = per_row.new_zeros(self.units, *per_row.shape[1:])
        return sums.index_add_(0, self.owners.to(per_row.device), per_row)

    def spread(self, per_unit: Tensor) -> Tensor:
        """Return each row's value of what is given a unit."""
        return per_unit if self.alone else per_unit[self.owners.to(per_unit.device)]


@dataclass(frozen=True, kw_only=True)
class Product:
    """A gradient that is a product: the sum over positions of grads ⊗ inputs."""

    inputs: Tensor
    """What went into the layer, shape (rows, length, in)."""
    grads: Tensor
    """The gradient of what came out, shape (rows, length, out)."""
    input_first: bool
    """Whether the weight has shape (in, out), as transformers' Conv1D, not (out, in)."""

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        """Left and right: a row's gradient is left^T right."""
        return (self.inputs, self.grads) if self.input_first else (self.grads, self.inputs)


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """A gradient that falls on the looked-up entries of a table."""

    ids: Tensor
    """Which entries, shape (rows, length)."""
    grads: Tensor
    """The gradient of what was looked up, shape (rows, length, width)."""
    column: bool
    """Whether entries are the table's columns, as in PEFT's `lora_embedding_A`."""


@dataclass
class Record:
    """One weight's gradient over all its uses in the pass; the kinds add up."""

    dense: Tensor | None = None
    """Each unit's gradient, shape (units, weight.numel())."""
    product: Product | None = None
    lookup: Lookup | None = None


@dataclass
class Pass:
    """The records of one micro-batch, by weight."""

    rows: Rows
    records: dict[Parameter, Record] = field(default_factory=dict)


class Recorder:
    """Takes what layers hand over during backward.

    A weight used twice in a pass, by one layer or by two that share it, has one record: products
    and lookups are joined along the positions, so that the norm sees every cross term.
    """

    def __init__(self, names: Mapping[Parameter, str]) -> None:
        """Take the trainable parameters and their names; no other may be recorded."""
        self._names = dict(names)
        self._pass: Pass | None = None
        self._silent: Tensor | None = None
        self._heard = False

    def open(self, owners: Sequence[int]) -> None:
        """Start a pass; the records of the last one must have been taken."""
        if self.pending:
            raise TrainingError(
                "a forward pass began before the last one's gradients were clipped; call step() "
                "after each backward, and signal_skip_step() before it within a logical batch"
            )
        self._pass, self._silent = Pass(Rows(owners)), None

    @property
    def pending(self) -> bool:
        """Whether a backward pass has left records that nobody took."""
        return self._pass is not None and bool(self._pass.records)

    def take(self) -> Pass | None:
        """Return the pass and forget it; None if no backward pass ran since the last time."""
        done, self._pass = self._pass, None
        return done if done is not None and done.records else None

    def drop(self) -> None:
        """Forget the pass."""
        self._pass, self._silent = None, None

    def clear(self) -> None:
        """Forget what a backward left of the pass; the pass stays open."""
        if self._pass is not None:
            self._pass.records.clear()

    def expect_silence(self, rows: Tensor | None) -> None:
        """Check instead of recording: the gradients of these rows must be zero. None ends it."""
        self._silent, self._heard = rows, self._heard and rows is None

    @property
    def heard(self) -> bool:
        """Whether in the last check a row that may speak had a finite gradient other than zero."""
        return self._heard

    @property
    def opened(self) -> Pass | None:
        """The open pass; a layer's forward keeps it, for its backward to give to `resume`."""
        return self._pass

    def resume(self, opened: Pass | None) -> None:
        """Check that a backward belongs to the open pass; else rows would go to other units."""
        if opened is None or opened is not self._pass:
            raise TrainingError(
                "backward ran on another forward pass than the last; run one forward and one "
                "backward a part of the batch"
            )

    @property
    def rows_open(self) -> int:
        """The number of rows of the open pass."""
        if self._pass is None:
            raise TrainingError("a private forward pass began without open()")
        return self._pass.rows.count

    def rows(self, tensor: Tensor, layer: nn.Module) -> int:
        """Return the number of rows open, which must be the tensor's first dimension."""
        if tensor.ndim < 1 or tensor.shape[0] != self.rows_open:
            name = next((self._names[p] for p in layer.parameters() if p in self._names), "")
            raise Unclippable(
                f"{name} ({type(layer).__name__}): its input does not have one entry a row of the "
                "batch, so a unit's gradient cannot be told apart; freeze it"
            )
        return self.rows_open

    def refuse_elsewhere(self, parameter: Parameter, grad: Tensor | None) -> None:
        """Refuse a gradient that came by another way than the layer's rule. A tensor hook."""
        if grad is not None:
            raise Unclippable(
                f"{self._name(parameter)}: used outside the layer that owns it, "
                "where a unit's gradient cannot be taken; freeze it"
            )

    def add_rows(self, parameter: Parameter, grads: Tensor) -> None:
        """Add each row's gradient of a parameter, shape `(rows, parameter.numel())`."""
        done = self._checked(parameter, grads)
        if done is not None:
            self._add_dense(done, parameter, done.rows.unit_sums(working(grads)))

    def add_product(
        self, parameter: Parameter, inputs: Tensor, grads: Tensor, *, input_first: bool
    ) -> None:
        """Add a use of a weight as a matrix; any number of dimensions between first and last."""
        done = self._checked(parameter, grads)
        if done is None:
            return
        new = Product(inputs=sequence(inputs), grads=sequence(grads), input_first=input_first)
        rows, positions = done.rows, new.inputs.shape[0] * new.inputs.shape[1]
        # What may be kept until the clip factors are known: the gradients, or their two factors.
        factors = positions * sum(side.shape[2] for side in new.sides)
        if rows.units * parameter.numel() <= DENSE_SHARE * factors:
            self._add_dense(done, parameter, multiplied(rows, new))
            return
        record = done.records.setdefault(parameter, Record())
        if record.product is None:
            record.product = new
        elif record.product.input_first == input_first:
            record.product = Product(
                inputs=torch.cat([working(record.product.inputs), working(new.inputs)], dim=1),
                grads=torch.cat([working(record.product.grads), working(new.grads)], dim=1),
                input_first=input_first,
            )
        else:
            self._add_dense(done, parameter, multiplied(rows, new))

    def add_lookup(
        self, parameter: Parameter, ids: Tensor, grads: Tensor, *, column: bool = False
    ) -> None:
        """Add a use of a weight as a table; `ids` of shape `(rows, ...)`."""
        entries = parameter.shape[1] if column else parameter.shape[0]
        if entries <= ONE_HOT_MAX:
            hot = functional.one_hot(ids, entries).to(grads.dtype)
            self.add_product(parameter, hot, grads, input_first=not column)
            return
        done = self._checked(parameter, grads)
        if done is None:
            return
        flat = ids.reshape(len(ids), prod(ids.shape[1:]))
        new = Lookup(ids=flat, grads=sequence(grads), column=column)
        record = done.records.setdefault(parameter, Record())
        if record.lookup is None:
            record.lookup = new
        elif record.lookup.column == column:
            record.lookup = Lookup(
                ids=torch.cat([record.lookup.ids, new.ids], dim=1),
                grads=torch.cat([working(record.lookup.grads), working(new.grads)], dim=1),
                column=column,
            )
        else:
            self._add_dense(done, parameter, scattered(done.rows, new, entries))

    def _checked(self, parameter: Parameter, grads: Tensor) -> Pass | None:
        """Return the open pass, or None where this backward only checks for silence."""
        if self._pass is None or grads.shape[0] != self._pass.rows.count:
            raise TrainingError(
                f"{self._name(parameter)}: backward ran on another forward pass than the last"
            )
        if parameter not in self._names:
            raise Unclippable("a layer's parameter was replaced after the engine was made")
        if self._silent is None:
            return self._pass
        spoke = (grads.nan_to_num(0.0, 0.0, 0.0) != 0).flatten(1).any(1)  # what is not finite
        silent = torch.zeros_like(spoke)  # proves nothing
        silent[self._silent.to(grads.device)] = True
        if bool((spoke & silent).any()):
            raise Unclippable(
                f"{self._name(parameter)}: a row's loss depends on other rows of the batch"
            )
        self._heard = self._heard or bool(spoke.any())
        return None

    def _name(self, parameter: Parameter) -> str:
        return self._names.get(parameter, "a parameter")

    @staticmethod
    def _add_dense(done: Pass, parameter: Parameter, per_unit: Tensor) -> None:
        record = done.records.setdefault(parameter, Record())
        if record.dense is None:
            record.dense = per_unit
        else:
            record.dense = record.dense + per_unit


def multiplied(rows: Rows, product: Product) -> Tensor:
    """Return each unit's gradient written out, shape `(units, weight.numel())`."""
    left, right = (working(side) for side in product.sides)
    out = left.new_empty(rows.units, left.shape[2] * right.shape[2])
    for units, (a, b) in rows.grouped(left, right):
        with full_precision(a.device):  # a backward may run under autocast
            gradients = torch.bmm(a.transpose(1, 2), b).flatten(1)
        if len(units) == rows.units:
            return gradients
        out[units] = gradients
    return out


def scattered(rows: Rows, lookup: Lookup, entries: int) -> Tensor:
    """Return each unit's gradient of a table written out, shape `(units, table.numel())`."""
    grads = working(lookup.grads)
    width = grads.shape[2]
    slots = rows.owners.to(grads.device).unsqueeze(1) * entries + lookup.ids
    table = grads.new_zeros(rows.units * entries, width)
    table.index_add_(0, slots.flatten(), grads.reshape(-1, width))
    table = table.view(rows.units, entries, width)
    return (table.transpose(1, 2) if lookup.column else table).flatten(1)


def sequence(tensor: Tensor) -> Tensor:
    """Return `(rows, ..., width)` as `(rows, length, width)`, without copying if it can be."""
    return tensor.reshape(tensor.shape[0], prod(tensor.shape[1:-1]), tensor.shape[-1])
