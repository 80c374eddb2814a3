"""Pool blocks: shared memory as the pool sees it: what it sends in one, and where replies lie."""

import mmap
import os
from dataclasses import dataclass

from intramural.simulations.broadcast import Block, Form, let_go, write


class Parcel:
    """Bytes that messages share: in shared memory from the first that is sent to the last reply."""

    def __init__(
        self, number: int, form: Form, parts: list[bytes], *, lent: Block | None = None
    ) -> None:
        """Hold an outgoing content's arrays; `number` tells parcels apart.

        `lent`: the block that they lie in already, which is another's to close.
        """
        self.number = number
        self._form = form
        self._parts = parts
        self._lent = lent
        self._block: Block | None = None
        self.users = 0
        """Messages that have no reply yet."""

    def block(self) -> Block:
        """Return the bytes in shared memory; they are copied there once, if at all."""
        if self._lent is not None:
            return self._lent
        if self._block is None:
            self._block = Block.of_size(self._form.nbytes)
            with self._block.map(writable=True) as memory, memoryview(memory) as view:
                write(self._form, self._parts, view)
        return self._block

    def leave(self) -> None:
        """Note that one of the messages needs it no more."""
        self.users -= 1
        if not self.users and self._block is not None:
            self._block.close()
            self._block = None


@dataclass
class Slot:
    """A worker's block for a reply's arrays, as the pool sees it."""

    number: int
    block: Block | None = None
    is_free: bool = True
    is_told: bool = True
    """Whether the worker knows that it is free."""
    fresh: bool = False
    """The worker shall make a new block for its next arrays: somebody still reads this one."""
    _read: mmap.mmap | None = None
    """Memory that somebody may read for a little longer."""

    def fill(self, descriptor: int | None) -> mmap.mmap:
        """Return the memory of a reply that came here; the descriptor is that of a new block."""
        self.is_free = self.is_told = False
        if descriptor is not None:
            if self.block is not None:
                self.block.close()
            self.block = Block(descriptor, os.fstat(descriptor).st_size)
        assert self.block is not None
        return self.block.map()

    @property
    def is_read(self) -> bool:
        """Whether somebody was done with the reply, and its memory was still read then."""
        return self._read is not None

    def let_go(self, memory: mmap.mmap) -> None:
        """Free the slot, unless its memory is still read: a sum may take two replies at once."""
        if let_go(memory):
            self.is_free = True
        else:
            self._read = memory

    def look_again(self) -> None:
        """Free the slot if its memory is not read any more."""
        if self._read is not None and let_go(self._read):
            self._read, self.is_free = None, True

    def settle(self) -> None:
        """Free the slot now; memory that is still read is left to whoever reads it."""
        memory, self._read = self._read, None
        if memory is not None:
            self.is_free = True
            self.fresh = not let_go(memory)
