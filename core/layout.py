"""Layout: the fixed order, names, shapes and offsets of parameters in one flat float32 vector."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from itertools import accumulate
from math import prod
from typing import cast

import numpy as np
from numpy.typing import NDArray

from intramural.core.canonical import digest_json
from intramural.core.errors import WireError
from intramural.core.pages import ask_for_large_pages

Vector = NDArray[np.float32]
"""One flat float32 vector, shape `(layout.size,)`."""


def written(size: int, write: Callable[[Vector], None]) -> Vector:
    """Return the read-only vector that `write` made of zeros, shape `(size,)`.

    It lies in the `bytes` that Flower wants to send: `BytesIO` hands out what was written in place
    without a copy, once nobody else (so: no variable of the caller) holds the memory.
    """
    buffer = BytesIO(bytes(4 * size))
    ask_for_large_pages(buffer.getbuffer())
    write(np.frombuffer(buffer.getbuffer(), dtype="<f4"))
    return np.frombuffer(buffer.getvalue(), dtype="<f4")


Lender = Callable[[int], memoryview | None]
"""Returns memory of so many bytes to write a vector to that will be sent, or None."""
_lender: ContextVar[Lender | None] = ContextVar("lender", default=None)


@contextmanager
def lent_by(lender: Lender) -> Iterator[None]:
    """Have vectors that will be sent written where `lender` says, and not elsewhere first."""
    before = _lender.set(lender)
    try:
        yield
    finally:
        _lender.reset(before)


def written_to_send(size: int, write: Callable[[Vector], None]) -> Vector:
    """Return the read-only vector that `write` made, as `written`, where what is sent shall lie.

    Args:
        size: Elements.
        write: Sets every one of them: lent memory is not of zeros.
    """
    lender = _lender.get()
    memory = lender(4 * size) if lender is not None else None
    if memory is None:
        return written(size, write)
    write(np.frombuffer(memory, dtype="<f4"))
    return sendable(np.frombuffer(memory, dtype="<f4"))


def sendable(vector: Vector) -> Vector:
    """Return a little-endian vector, read-only, whose memory can be sent as it is."""
    return np.frombuffer(vector.data.cast("B").toreadonly(), dtype="<f4")


def wire_bytes(vector: Vector) -> bytes:
    """Return the little-endian bytes; of what `written` made, its very own, without a copy.

    Of what `sendable` returned, a view of its memory.
    """
    base = vector.base
    if isinstance(base, memoryview):
        is_own = base.readonly and base.nbytes == vector.nbytes
    else:
        is_own = isinstance(base, bytes) and len(base) == vector.nbytes
    if is_own and vector.dtype == "<f4":
        return cast(bytes, base)
    return np.ascontiguousarray(vector, dtype="<f4").tobytes()


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One named parameter's place in the flat vector."""

    name: str
    shape: tuple[int, ...]
    start: int
    """Offset of the first element, in elements."""

    @cached_property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @cached_property
    def stop(self) -> int:
        """Offset after the last element, in elements."""
        return self.start + self.size


@dataclass(frozen=True)
class Layout:
    """Ordered (name, shape) pairs; offsets follow from the order."""

    entries: tuple[tuple[str, tuple[int, ...]], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.entries]
        if len(set(names)) != len(names):
            raise WireError("a layout names a parameter twice; every name must be unique")
        if any(size < 0 for _, shape in self.entries for size in shape):
            raise WireError("a layout holds a negative dimension")

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[np.float32]]) -> "Layout":
        """Return the layout of named arrays, in their order."""
        return cls(tuple((name, tuple(array.shape)) for name, array in arrays.items()))

    @classmethod
    def from_json(cls, value: list[list[object]]) -> "Layout":
        """Read what `to_json` wrote."""
        return cls(tuple((str(name), tuple(shape)) for name, shape in value))  # type: ignore[arg-type]

    def to_json(self) -> list[list[object]]:
        """Return a JSON value: `[[name, [dim, ...]], ...]`."""
        return [[name, list(shape)] for name, shape in self.entries]

    @cached_property
    def size(self) -> int:
        """Number of elements of the flat vector."""
        return sum(prod(shape) for _, shape in self.entries)

    @property
    def nbytes(self) -> int:
        """Bytes of the flat float32 vector."""
        return 4 * self.size

    @cached_property
    def digest(self) -> str:
        """Digest of names and shapes; equal digests mean interchangeable vectors."""
        return digest_json(self.to_json())

    def slots(self) -> tuple[Slot, ...]:
        """Return each parameter's place, in order."""
        return self._slots

    @cached_property
    def _slots(self) -> tuple[Slot, ...]:
        sizes = [prod(shape) for _, shape in self.entries]
        starts = accumulate(sizes, initial=0)
        return tuple(
            Slot(name=name, shape=shape, start=start)
            for (name, shape), start in zip(self.entries, starts, strict=False)
        )

    def flatten(self, arrays: Mapping[str, NDArray[np.float32]]) -> Vector:
        """Return the named arrays as one vector of shape `(size,)`.

        Raises:
            WireError: Names or shapes differ from this layout.
        """
        if set(arrays) != {name for name, _ in self.entries}:
            raise WireError("arrays and layout differ in names")
        vector = np.empty(self.size, dtype=np.float32)
        for slot in self.slots():
            if tuple(arrays[slot.name].shape) != slot.shape:
                raise WireError(f"array {slot.name!r} and layout differ in shape")
            vector[slot.start : slot.stop] = arrays[slot.name].reshape(-1)
        return vector

    def unflatten(self, vector: Vector) -> dict[str, NDArray[np.float32]]:
        """Return named views into `vector`, shaped as in the layout; nothing is copied.

        Raises:
            WireError: `vector` has another size.
        """
        if vector.shape != (self.size,):
            raise WireError(f"vector of shape {vector.shape} does not fit a layout of {self.size}")
        return {s.name: vector[s.start : s.stop].reshape(s.shape) for s in self.slots()}
