"""Exchange: which parameters travel, and their way into and out of one flat vector."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from intramural.core.layout import Layout, Vector, written


class Exchange:
    """Reads and writes a model's travelling parameters as one flat float32 vector."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Fix order and names: those of `parameters`, which stay the model's own tensors."""
        self.parameters = dict(parameters)
        self.layout = Layout(tuple((n, tuple(p.shape)) for n, p in self.parameters.items()))

    def read(self) -> Vector:
        """Return a copy of the parameters, shape `(layout.size,)`, as memory that can travel."""

        def copy(out: Vector) -> None:
            for slot, parameter in zip(self.layout.slots(), self.parameters.values(), strict=True):
                values = parameter.detach().to("cpu", torch.float32)
                out[slot.start : slot.stop] = values.numpy().reshape(-1)

        return written(self.layout.size, copy)

    def delta(self, start: Vector, up: Layout) -> Vector:
        """Return the parameters of `up` less `start`, as the memory that will travel.

        Args:
            start: What was written, shape `(layout.size,)`.
            up: The parameters that travel back, in this order; all of them, or a part.
        """
        places = {slot.name: slot for slot in self.layout.slots()}

        def subtract(out: Vector) -> None:
            for slot in up.slots():
                values = self.parameters[slot.name].detach().to("cpu", torch.float32)
                before = places[slot.name]
                np.subtract(
                    values.numpy().reshape(-1),
                    start[before.start : before.stop],
                    out=out[slot.start : slot.stop],
                )

        return written(up.size, subtract)

    def write(self, vector: Vector) -> None:
        """Set the parameters to `vector`, which may be read-only and is not kept.

        Raises:
            WireError: `vector` has another size.
        """
        views = self.layout.unflatten(vector)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if parameter.device.type == "cpu" and parameter.dtype == torch.float32:
                    # torch.from_numpy warns about read-only memory; NumPy copies without a word
                    np.copyto(parameter.detach().numpy(), views[name])
                else:
                    parameter.copy_(torch.tensor(views[name]))
