"""Broadcast: a message's arrays in shared memory, so that processes read them without a copy.

A content is taken apart into its form, which is small and travels over a socket, and its bytes,
which are written once into a block that any number of processes map.
"""

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from intramural.core.wire import STYPE

ALIGNMENT = 64
"""Bytes; arrays begin at multiples of it, so that arithmetic on them is as fast as elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """An array without its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stype: str
    start: int
    """Offset of its bytes."""
    stop: int


@dataclass(frozen=True, kw_only=True)
class Form:
    """A content without the bytes of its arrays."""

    records: tuple[tuple[str, type[Any], Any], ...]
    """Key, type and content of each record, in order; of an ArrayRecord, its pieces."""
    nbytes: int
    """Size of the memory that holds the arrays."""

    def pieces(self) -> Iterator[Piece]:
        """Yield the arrays of all records, in order."""
        for _, kind, content in self.records:
            if kind is ArrayRecord:
                yield from content


def take_apart(content: RecordDict) -> tuple[Form, list[bytes]]:
    """Return a content's form, and each array's bytes; nothing is copied."""
    records: list[tuple[str, type[Any], Any]] = []
    parts: list[bytes] = []
    end = 0
    for key, record in content.items():
        if not isinstance(record, ArrayRecord):
            records.append((key, type(record), dict(record)))
            continue
        pieces = []
        for name, array in record.items():
            start = -(-end // ALIGNMENT) * ALIGNMENT
            end = start + len(array.data)
            shape = tuple(array.shape)
            pieces.append(
                Piece(
                    name=name,
                    dtype=array.dtype,
                    shape=shape,
                    stype=array.stype,
                    start=start,
                    stop=end,
                )
            )
            parts.append(array.data)
        records.append((key, ArrayRecord, tuple(pieces)))
    return Form(records=tuple(records), nbytes=end), parts


def put_together(form: Form, memory: memoryview) -> RecordDict:
    """Return the content of a form.

    Arrays of our own encoding are views of `memory`, which must not change while they are used.
    Flower's encoding is copied: its readers copy it in any case, and may want `bytes`.
    """
    content = RecordDict()
    for key, kind, fields in form.records:
        if kind is not ArrayRecord:
            content[key] = cast(type[ConfigRecord | MetricRecord], kind)(fields)
            continue
        record = ArrayRecord()
        for piece in fields:
            part = memory[piece.start : piece.stop]
            array = Array(dtype=piece.dtype, shape=piece.shape, stype=piece.stype, data=b"")
            # set afterwards: the constructor takes no view
            array.data = cast(bytes, part) if piece.stype == STYPE else bytes(part)
            record[piece.name] = array
        content[key] = record
    return content


def write(form: Form, parts: Sequence[bytes], memory: memoryview) -> None:
    """Copy each array's bytes to its place, but those that lie there already."""
    for piece, part in zip(form.pieces(), parts, strict=True):
        place = memory[piece.start : piece.stop]
        if _address(place) != _address(part):
            place[:] = memoryview(part).cast("B")


def _address(memory: bytes | memoryview) -> int:
    return np.frombuffer(memory, dtype=np.uint8).ctypes.data if len(memory) else 0


class Block:
    """Shared memory without a name: it is gone when the last process that has it open is.

    So nothing can be left behind, however the processes end, and no limit on named segments,
    which containers set low, applies.
    """

    def __init__(self, descriptor: int, nbytes: int) -> None:
        """Take over an open descriptor of `nbytes` bytes."""
        self.descriptor = descriptor
        self.nbytes = nbytes

    @classmethod
    def of_size(cls, nbytes: int) -> "Block":
        """Return a new block of zeros, of at least one byte."""
        descriptor = _unnamed()
        os.ftruncate(descriptor, nbytes)
        return cls(descriptor, nbytes)

    def map(self, *, writable: bool = False) -> mmap.mmap:
        """Return the block as memory; it stays valid when the block is closed."""
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        return mmap.mmap(self.descriptor, self.nbytes, mmap.MAP_SHARED, access)

    def close(self) -> None:
        """Close this process's descriptor; memory that is mapped stays."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class Lender:
    """Lends blocks to whoever makes what will be sent: it then lies where it is sent from.

    A block is closed when its vector is gone. It is lent once, and never changes after: a process
    may read an old one for as long as it likes.
    """

    def __init__(self) -> None:
        """Lend nothing yet."""
        self._blocks: dict[int, Block] = {}
        """By the address of their memory."""

    def lend(self, nbytes: int) -> memoryview:
        """Return the memory of a new block, of zeros."""
        block = Block.of_size(nbytes)
        memory = block.map(writable=True)
        view = memoryview(memory)[:nbytes]
        address = _address(view)
        self._blocks[address] = block
        weakref.finalize(memory, self._forget, address, block)
        return view

    def block_of(self, part: bytes | memoryview) -> Block | None:
        """Return the block that holds these bytes and nothing else, still the lender's to close."""
        block = self._blocks.get(_address(part))
        return block if block is not None and block.nbytes == len(part) else None

    def close(self) -> None:
        """Close all blocks; memory that is still read stays."""
        for address, block in list(self._blocks.items()):
            self._forget(address, block)

    def _forget(self, address: int, block: Block) -> None:
        block.close()
        if self._blocks.get(address) is block:  # or a new one lies there already
            del self._blocks[address]


def let_go(memory: mmap.mmap) -> bool:
    """Unmap the memory unless an array still reads it; return whether it was unmapped.

    Memory that could not be unmapped is, as soon as the last array that reads it is gone.
    """
    try:
        memory.close()
    except BufferError:
        return False
    return True


def _unnamed() -> int:
    """Return the descriptor of an empty file that no folder names."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("intramural")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
