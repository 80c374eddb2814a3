"""Stacked: the travelling parameters of many clients, side by side, and one optimizer for all."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from intramural.core.federation import Training
from intramural.core.layout import Layout, Vector, sendable
from intramural.models.loading import Loaded
from intramural.models.steps import make_optimizer


class Stack:
    """Some clients' parameters: one tensor a name, shape `(clients, *shape)`, client i at place i.

    The optimizers of `make_optimizer` work number by number, so a step on the stack is each
    client's own step.
    """

    def __init__(self, loaded: Loaded, start: Vector, *, clients: int, settings: Training) -> None:
        """Give each client a copy of `start`, shape `(exchange.layout.size,)`."""
        exchange = loaded.exchange
        self._layout, self._start, self._clients = exchange.layout, start, clients
        self._gradient_clip = settings.gradient_clip
        self.start = tensors_of(loaded, start)
        """What all clients have before the first step: one tensor a name, without clients."""
        self.parameters: dict[str, Tensor] = {}
        # by the shapes of one client: a stacked bias must not pass for a matrix
        self._optimizer = make_optimizer(list(exchange.parameters.values()), settings)
        stacked = {}
        for name, parameter in exchange.parameters.items():
            one = self.start[name]
            many = one.expand(clients, *one.shape).contiguous().requires_grad_()
            self.parameters[name] = stacked[parameter] = many
        for group in self._optimizer.param_groups:
            group["params"] = [stacked[parameter] for parameter in group["params"]]
        held = {id(tensor): name for name, tensor in self.parameters.items()}
        self.order = [held[id(p)] for g in self._optimizer.param_groups for p in g["params"]]
        """Names in the optimizer's order, which is that of a private step's noise."""

    def step(self, rate: float) -> None:
        """Clip each client's gradient by its own norm, if set; then step and clear."""
        if self._gradient_clip is not None:
            self._clip(self._gradient_clip)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _clip(self, most: float) -> None:
        """As `torch.nn.utils.clip_grad_norm_` does to one client."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients])
        factors = (most / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))

    def client(self, place: int) -> dict[str, Tensor]:
        """Return one client's parameters, as views."""
        return {name: tensor.detach()[place] for name, tensor in self.parameters.items()}

    def deltas(self) -> list[Vector]:
        """Return each client's parameters less the start."""
        start = self._layout.unflatten(self._start)

        def write(name: str, out: Tensor) -> None:
            now = self.parameters[name].detach().to("cpu", torch.float32)
            torch.sub(now, torch.tensor(start[name]), out=out)

        return written_deltas(self._layout, self._clients, write)


def tensors_of(loaded: Loaded, vector: Vector) -> dict[str, Tensor]:
    """Return a vector's parameters by name, as tensors of their own beside the model's."""
    views = loaded.exchange.layout.unflatten(vector)
    return {
        name: torch.tensor(views[name], device=parameter.device, dtype=parameter.dtype)
        for name, parameter in loaded.exchange.parameters.items()
    }


def written_deltas(
    layout: Layout, clients: int, write: Callable[[str, Tensor], None]
) -> list[Vector]:
    """Return clients' deltas, which can be sent as they are.

    `write` is given each parameter's name and where to put it, shape `(clients, *shape)`.
    """
    whole = np.empty((clients, layout.size), dtype=np.float32)
    wide = torch.from_numpy(whole)
    for slot in layout.slots():
        write(slot.name, wide[:, slot.start : slot.stop].view(clients, *slot.shape))
    return [sendable(row) for row in whole]


def pieces(count: int, most: int) -> Sequence[range]:
    """Return 0 .. count - 1 in as few pieces of at most `most` as there can be, alike in size."""
    parts = -(-count // most)
    edges = [count * i // parts for i in range(parts + 1)] if parts else [0]
    return [range(a, b) for a, b in pairwise(edges)]
