"""A task's losses as a function of the travelling parameters, for many clients at once."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from intramural.core.errors import TrainingError
from intramural.core.tokens import Ids
from intramural.models.batched_rows import Factors, Names, row_factors
from intramural.models.loading import Loaded
from intramural.models.tasks import Batch, Task, Tokens
from intramural.models.training import to_device

Index = NDArray[np.int64]
"""Rows of `merged` tokens, of any shape; that of the batch it stands for."""


Move = dict[str, Tensor]
"""How far a client's layer has moved: its weight by `inputs` and `outputs`, its bias by `bias`."""


@dataclass
class Sizes:
    """What was found of a model's passes, and need not be looked for in each round."""

    outputs: dict[Hashable, dict[nn.Linear, tuple[int, ...]]] = field(default_factory=dict)
    """By the shapes of a batch: those of each layer's output."""
    kept: dict[int, int] = field(default_factory=dict)
    """By a row's length: the memory of `kept_bytes`."""


class BatchedLosses(nn.Module):
    """The resident model, run with other parameters than its own; it is never written to."""

    def __init__(
        self,
        loaded: Loaded,
        task: Task,
        *,
        wide_masks: bool,
        factored: bool,
        in_rows: bool = False,
        sizes: Sizes | None = None,
    ) -> None:
        """Take the model and its task.

        `wide_masks`: attention masks have shape (rows, 1, 1, length) and hold what is added to
        scores. Of one of shape (rows, length) some models ask whether it is all ones, a question
        with as many answers as clients. `factored`: units' gradients are had as factors.
        `in_rows`: those of clients that share their parameters, in one plain pass. `sizes`: what
        was found earlier of this model.
        """
        super().__init__()
        self.model = loaded.model
        self.wide_masks = wide_masks
        self.layers = _linear_layers(loaded) if factored else None
        """Names of weight and bias of each trained layer, if no others are trained."""
        self._in_rows = in_rows
        self._loaded, self._task = loaded, task
        self._sizes = Sizes() if sizes is None else sizes

    def forward(self, batch: Batch) -> Tensor:
        """Return the task's losses, shape `(rows,)`."""
        return self._task.losses(self.model, batch)

    def one(self, parameters: Mapping[str, Tensor], batch: Batch, weights: Tensor) -> Tensor:
        """Return the weighted sum of one client's losses; `weights` has shape `(rows,)`.

        Rows of weight 0 count for nothing, as long as their losses are finite.
        """
        return (self._losses(parameters, batch) * weights).sum()

    def _losses(self, parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
        named = {f"model.{name}": tensor for name, tensor in parameters.items()}
        losses: Tensor = functional_call(self, named, (batch,))
        return losses

    def many(self, parameters: Mapping[str, Tensor], batch: Batch, weights: Tensor) -> Tensor:
        """Return each client's weighted sum, shape `(clients,)`; arguments have clients first."""
        sums: Tensor = vmap(self.one)(dict(parameters), batch, weights)
        return sums

    def unit_gradients(
        self, parameters: Mapping[str, Tensor], batch: Batch, weights: Tensor
    ) -> dict[str, Tensor]:
        """Return each unit's gradient of its weighted sum, by name, `(clients, units, *shape)`.

        `batch` and `weights` have clients, units, and a unit's rows first. A unit runs in a pass
        of its own: no other row can reach its gradient.
        """
        units = vmap(grad(self.one), in_dims=(None, 0, 0))
        gradients: dict[str, Tensor] = vmap(units)(dict(parameters), batch, weights)
        return gradients

    def factors(
        self,
        parameters: Mapping[str, Tensor],
        batch: Batch,
        weights: Tensor,
        *,
        shared: bool = False,
        moved: Factors | None = None,
    ) -> tuple[Tensor, Factors]:
        """Return weighted sums, and their gradients as factors.

        `batch` and `weights` have clients and rows first, as in `many`, or clients, units, and a
        unit's rows, as in `unit_gradients`. A layer that did not run has no factors.
        `shared`: the parameters are one client's, and all clients'; that is a good deal faster.
        `moved`: what each client's layers have moved since, by the negative of the product; for
        clients' rows, and not for units.

        Raises:
            TrainingError: A layer ran twice, or what it said was written over.
        """
        apart = weights.shape[:-1]
        detached = {name: tensor.detach() for name, tensor in parameters.items()}
        if shared and self._in_rows and len(apart) == 1:
            assert self.layers is not None
            return row_factors(
                lambda rows: self._losses(detached, rows),
                self.layers,
                batch,
                weights,
                moved=moved or {},
            )
        shapes = self.output_shapes(detached, batch, weights, shared=shared)
        order = list(shapes)
        device = weights.device
        probes = [
            torch.zeros(*apart, *shape, device=device, requires_grad=True)
            for shape in shapes.values()
        ]

        moves = [self._move(layer, moved) for layer in order] if moved else []

        def run(
            parameters: dict[str, Tensor],
            probes: list[Tensor],
            moves: list[Move],
            batch: Batch,
            weights: Tensor,
        ) -> tuple[Tensor, list[Tensor]]:
            with _tapped(order, probes, moves) as inputs:
                loss = self.one(parameters, batch, weights)
            return loss, [inputs[layer].detach() for layer in order]

        inner = run if len(apart) == 1 else vmap(run, in_dims=(None, 0, None, 0, 0))
        runs = vmap(inner, in_dims=(None if shared else 0, 0, 0, 0, 0))
        with torch.enable_grad():
            losses, inputs = runs(detached, probes, moves, batch, weights)
            grads = torch.autograd.grad(losses.sum(), probes, materialize_grads=True)
        pairs = zip(inputs, grads, strict=True)
        found = [tuple(_positions(t, len(apart)) for t in pair) for pair in pairs]
        return losses.detach(), {layer: (x, g) for layer, (x, g) in zip(order, found, strict=True)}

    def _move(self, layer: nn.Linear, moved: Factors) -> Move:
        """Return what `_tapped` needs to know of a layer."""
        assert self.layers is not None
        weight, bias = self.layers[layer]
        if layer not in moved:
            return {}
        inputs, outputs = moved[layer]
        found = {} if weight is None else {"inputs": inputs, "outputs": outputs}
        return found if bias is None else found | {"bias": outputs.sum(1)}

    @torch.no_grad()
    def output_shapes(
        self, parameters: Mapping[str, Tensor], batch: Batch, weights: Tensor, *, shared: bool
    ) -> dict[nn.Linear, tuple[int, ...]]:
        """Return the shapes of the outputs of each layer that runs in one client's or unit's pass.

        They are found by one such pass.
        """
        assert self.layers is not None
        first = (0,) * (weights.ndim - 1)
        key = tuple(tuple(tensor[first].shape) for tensor in batch.values())
        if key not in self._sizes.outputs:
            with _tapped(list(self.layers), None, []) as outputs:
                own = {n: tensor if shared else tensor[0] for n, tensor in parameters.items()}
                self.one(own, {n: t[first] for n, t in batch.items()}, weights[first])
            self._sizes.outputs[key] = {layer: tuple(out.shape) for layer, out in outputs.items()}
        return self._sizes.outputs[key]

    def kept_bytes(self, tokens: Tokens, row: int) -> int:
        """Return the memory that a forward pass of one row keeps for its backward pass."""
        length = len(tokens.inputs[row])
        if length not in self._sizes.kept:
            own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
            kept: dict[int, int] = {}

            def keep(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in own:
                    kept[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, _same):
                batch = self.batch(tokens, np.array([row]))
                alive: Any = self(batch)  # or an address could be used twice
            del alive
            self._sizes.kept[length] = sum(kept.values())
        return self._sizes.kept[length]

    def batch(self, tokens: Tokens, index: Index) -> Batch:
        """Return rows as one batch on the device; its tensors have shape `(*index.shape, ...)`."""
        flat = to_device(self._task.pad(tokens, index.ravel().tolist()), self._loaded.device)
        if self.wide_masks and "attention_mask" in flat:
            mask = flat["attention_mask"][:, None, None]
            lowest = torch.finfo(torch.float32).min
            flat["attention_mask"] = torch.where(mask > 0, 0.0, lowest)
        return {name: t.view(*index.shape, *t.shape[1:]) for name, t in flat.items()}


def end_to_end(parts: Sequence[Ids]) -> Ids:
    """Return the parts' rows, as one matrix where they are matrices of one width."""
    matrices = [part for part in parts if isinstance(part, np.ndarray)]
    if len(matrices) == len(parts) and len({matrix.shape[1] for matrix in matrices}) == 1:
        return np.concatenate(matrices)
    return [row for part in parts for row in part]


def merged(tokens: Sequence[Tokens]) -> tuple[Tokens, Index]:
    """Return the clients' tokens laid end to end, and where each client's begin."""
    counts = [len(own) for own in tokens]
    whole = Tokens(
        inputs=end_to_end([own.inputs for own in tokens]),
        targets=end_to_end([own.targets for own in tokens]),
    )
    return whole, np.cumsum([0, *counts[:-1]], dtype=np.int64)


def filled(rows: Sequence[int], size: int) -> list[int]:
    """Return the rows and then the first of them again, `size` in all.

    A filler is one of the client's own, so that its loss is finite where the client's are.
    """
    return [*rows, *[rows[0]] * (size - len(rows))]


@contextmanager
def plain_attention() -> Iterator[None]:
    """Let attention be written out within: its fused kernels take no stack of clients at once."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _linear_layers(loaded: Loaded) -> dict[nn.Linear, Names] | None:
    """Return weight's and bias's names of the layers trained; None: others are trained, or twice.

    A layer's name is None where it does not travel.
    """
    names: dict[Tensor, str] = {p: name for name, p in loaded.exchange.parameters.items()}
    found: dict[nn.Linear, Names] = {}
    for module in loaded.model.modules():
        if type(module) is nn.Linear:
            weight = names.get(module.weight)
            bias = names.get(module.bias) if module.bias is not None else None
            if weight is not None or bias is not None:
                found[module] = (weight, bias)
    held = [name for pair in found.values() for name in pair if name is not None]
    return found if sorted(held) == sorted(names.values()) else None


@contextmanager
def _tapped(
    layers: Sequence[nn.Linear], probes: Sequence[Tensor] | None, moves: Sequence[Move]
) -> Iterator[dict[nn.Linear, Tensor]]:
    """Keep what goes into the layers, and add a probe to what comes out; or keep what comes out.

    A probe is zero: its gradient is that of the layer's output. With `moves` what comes out is that
    of the layer as it has moved.
    """
    kept: dict[nn.Linear, Tensor] = {}

    def tap(layer: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if layer in kept:
            raise TrainingError("a layer ran twice in a pass; its gradient is not one product")
        if probes is None:
            kept[layer] = output
            return output
        kept[layer] = args[0]
        output = output + probes[places[layer]]
        move = moves[places[layer]] if moves else {}
        if "inputs" in move:
            output = output - (args[0] @ move["inputs"].mT) @ move["outputs"]
        return output - move["bias"] if "bias" in move else output

    places = {layer: place for place, layer in enumerate(layers)}
    handles = [layer.register_forward_hook(tap) for layer in layers]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _positions(tensor: Tensor, apart: int) -> Tensor:
    """Return a tensor with one dimension of positions between the first `apart` and the last."""
    return tensor.flatten(apart, -2)
