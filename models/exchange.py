"""Exchange: which parameters travel, and their way into and out of one flat vector."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from intramural.core.layout import Layout, Vector, written_to_send
from intramural.core.route import CONTROL, RESIDUAL
from intramural.models.residual import FrozenWeights

Array = NDArray[np.float32]


class Exchange:
    """Reads and writes a model's trained parameters as flat float32 vectors.

    The coordinator's vector has `layout`. What is trained and not in it stays here: `own_layout`.
    A LoRA factor may be smaller in the model than in the layout: it is then the first rows of A,
    or the first columns of B, and the rest counts as zero.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        layout: Layout | None = None,
        frozen: FrozenWeights | None = None,
    ) -> None:
        """Fix order and names: those of `parameters`, which stay the model's own tensors.

        Args:
            parameters: All that is trained. Those that stay here now hold their initial values.
            layout: Of the coordinator's vector; None: the parameters, and nothing else.
            frozen: What the residuals in the layout go to.
        """
        self.parameters = dict(parameters)
        trained = Layout(tuple((n, tuple(p.shape)) for n, p in self.parameters.items()))
        self.trained_layout = trained
        """Of all that is trained, as large as it is here."""
        self.layout = trained if layout is None else layout
        travels = {name for name, _ in self.layout.entries}
        self.own_layout = Layout(tuple(e for e in trained.entries if e[0] not in travels))
        self.is_plain = self.layout.entries == trained.entries
        """The vector is the trained parameters, whole, and nothing else."""
        self._controlled = [name for name in self.parameters if CONTROL + name in travels]
        self._frozen = frozen
        self._held: dict[str, tuple[int, Array]] = {}
        """Address and memory of parameters: to ask PyTorch for it takes longer than to copy few."""
        self._own_start = self.read_own()

    def read(self) -> Vector:
        """Return a copy of what travels, shape `(layout.size,)`, as memory that can travel.

        Residuals, control variates and the unused part of a smaller factor are zeros.
        """

        def copy(out: Vector) -> None:
            if not self.is_plain:
                out[:] = 0.0
            for slot in self.layout.slots():
                if slot.name in self.parameters:
                    values = self._values(slot.name)
                    whole = out[slot.start : slot.stop].reshape(slot.shape)
                    whole[_corner(values.shape)] = values

        return written_to_send(self.layout.size, copy)

    def read_own(self) -> Vector:
        """Return a copy of what stays here, shape `(own_layout.size,)`."""
        return self._read(self.own_layout)

    def read_trained(self) -> Vector:
        """Return a copy of all that is trained, shape `(trained_layout.size,)`."""
        return self._read(self.trained_layout)

    def write_trained(self, vector: Vector) -> None:
        """Set all that is trained, and nothing else, to what `read_trained` returned."""
        self._write(self.trained_layout.unflatten(vector))

    def _read(self, layout: Layout) -> Vector:
        out = np.empty(layout.size, dtype=np.float32)
        for slot in layout.slots():
            out[slot.start : slot.stop] = self._values(slot.name).reshape(-1)
        return out

    def delta(self, start: Vector, up: Layout) -> Vector:
        """Return the parameters of `up` less `start`, as the memory that will travel.

        Of a smaller factor the unused part is `-start`: with `start` it is zero again, exactly.

        Args:
            start: What was written, shape `(layout.size,)`.
            up: The parameters that travel back, in this order; all of them, or a part.
        """
        before = self.layout.unflatten(start)

        def subtract(out: Vector) -> None:
            for slot in up.slots():
                values, was = self._values(slot.name), before[slot.name]
                whole = out[slot.start : slot.stop].reshape(slot.shape)
                if values.shape == slot.shape:
                    np.subtract(values, was, out=whole)
                    continue
                used = _corner(values.shape)
                np.negative(was, out=whole)
                np.subtract(values, was[used], out=whole[used])

        return written_to_send(up.size, subtract)

    def write(self, vector: Vector, own: Vector | None = None) -> None:
        """Set all that is trained; the vectors may be read-only and are not kept.

        Args:
            vector: The coordinator's, shape `(layout.size,)`.
            own: What stays here, shape `(own_layout.size,)`; None: its initial values, so that
                nothing of whoever used the model before is left.

        Raises:
            WireError: A vector has another size.
        """
        views = self.layout.unflatten(vector)
        views |= self.own_layout.unflatten(self._own_start if own is None else own)
        self._write(views)
        if self._frozen is not None:
            self._frozen.write({layer: views[RESIDUAL + layer] for layer in self._frozen.layers})

    def _write(self, views: Mapping[str, Array]) -> None:
        for name, parameter in self.parameters.items():
            values, memory = views[name], self._memory(name)
            if values.shape != parameter.shape:
                values = values[_corner(tuple(parameter.shape))]
            if memory is not None:
                # torch.from_numpy warns about read-only memory; NumPy copies without a word
                np.copyto(memory, values)
            else:
                with torch.no_grad():
                    parameter.copy_(torch.tensor(values))

    @property
    def is_base_moved(self) -> bool:
        """Whether the last vector written changed weights of the base model."""
        return self._frozen is not None and self._frozen.is_moved

    def controls(self, vector: Vector) -> dict[str, Array]:
        """Return the control variates that came with a vector, as views, by parameter."""
        if not self._controlled:
            return {}
        views = self.layout.unflatten(vector)
        return {name: views[CONTROL + name] for name in self._controlled}

    def _values(self, name: str) -> Array:
        """Return a parameter's numbers, in its own memory or copied from where they are."""
        memory = self._memory(name)
        if memory is None:
            memory = self.parameters[name].detach().to("cpu", torch.float32).numpy()
        return memory

    def _memory(self, name: str) -> Array | None:
        """Return a parameter's own memory, or None: NumPy cannot have it as float32."""
        parameter = self.parameters[name]
        at, memory = self._held.get(name, (0, None))
        if memory is None or parameter.data_ptr() != at:  # `.to` and `.data` give it another
            if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
                self._held.pop(name, None)
                return None
            memory = parameter.detach().numpy()
            self._held[name] = parameter.data_ptr(), memory  # which stays its own while it is here
        return memory


def _corner(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Return where a smaller array lies in a larger one: at its beginning, on every side."""
    return tuple(slice(size) for size in shape)
