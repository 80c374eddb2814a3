"""What is sent is written once, where it is sent from, and nothing that is read is changed."""

import gc
import os
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from intramural.core.layout import lent_by, wire_bytes, written, written_to_send
from intramural.core.wire import encode_vector
from intramural.simulations.broadcast import Block, Lender, put_together, take_apart
from intramural.simulations.pool_blocks import Slot
from intramural.simulations.pool_worker import Freed, Slots


def free(slots: Slots, *numbers: int) -> None:
    for number in numbers:
        slots.freed.put(Freed(slot=number, fresh=False))


def put(slots: Slots, value: float) -> tuple[int | None, int | None]:
    return slots.put(*take_apart(content(written(3, filled(value)))))


def content(vector: np.ndarray) -> RecordDict:
    found = RecordDict({"intramural": ConfigRecord({"header": "x"})})
    found["vector"] = encode_vector(vector)
    return found


def filled(value: float) -> Any:
    def write(out: np.ndarray) -> None:
        out[:] = value

    return write


def address(data: bytes | memoryview) -> int:
    return np.frombuffer(data, np.uint8).ctypes.data


def read(descriptor: int, reply: RecordDict) -> list[float]:
    """Return what another process finds in a slot."""
    form, _ = take_apart(reply)
    with Block(descriptor, form.nbytes).map() as memory, memoryview(memory) as view:
        array: Any = cast(Any, put_together(form, view))["vector"]["flat"]
        values: list[float] = np.frombuffer(array.data, "<f4").tolist()
        del array
        return values


def test_a_reply_s_vector_is_written_to_its_slot_and_not_copied() -> None:
    slots = Slots()
    with lent_by(slots.lend):
        vector = written_to_send(3, filled(2.0))
    assert not vector.flags.writeable
    data = wire_bytes(vector)
    assert isinstance(data, memoryview)
    reply = content(vector)
    form, parts = take_apart(reply)
    assert address(parts[0]) == address(data) == vector.ctypes.data
    slot, descriptor = slots.put(form, parts)
    assert slot == 0
    assert descriptor is not None
    assert read(descriptor, reply) == [2.0, 2.0, 2.0]
    free(slots, 0)
    with lent_by(slots.lend):
        again = written_to_send(3, filled(5.0))
    assert again.ctypes.data == vector.ctypes.data  # the pool freed the slot: it is used again
    assert slots.put(*take_apart(content(again))) == (0, None)
    assert read(descriptor, content(again)) == [5.0, 5.0, 5.0]


def test_a_second_block_is_made_only_while_the_first_is_read() -> None:
    slots = Slots()
    first = put(slots, 1.0)
    second = put(slots, 2.0)  # nobody has freed the first
    assert (first[0], second[0]) == (0, 1)
    assert None not in (first[1], second[1])
    free(slots, 1)
    assert put(slots, 3.0) == (1, None)
    late = Slots()
    assert put(late, 1.0)[0] == 0
    with lent_by(late.lend):  # freed while the next is trained, in time for its vector
        free(late, 0)
        vector = written_to_send(3, filled(4.0))
    assert late.put(*take_apart(content(vector))) == (0, None)


def test_a_slot_that_was_lent_and_not_sent_goes_to_the_next_reply() -> None:
    slots, vector = Slots(), written(3, filled(7.0))
    assert isinstance(wire_bytes(vector), bytes)
    with lent_by(slots.lend):
        written_to_send(3, filled(1.0))  # and then it is not sent
    slot, descriptor = slots.put(*take_apart(content(vector)))  # made elsewhere: it is copied
    assert slot == 0
    assert descriptor is not None
    assert read(descriptor, content(vector)) == [7.0] * 3


def test_memory_that_somebody_still_reads_is_left_to_him() -> None:
    slots = Slots()
    with lent_by(slots.lend):
        kept = written_to_send(3, filled(1.0))
    slot, first = slots.put(*take_apart(content(kept)))
    assert slot == 0
    slots.freed.put(Freed(slot=0, fresh=True))
    with lent_by(slots.lend):
        other = written_to_send(3, filled(2.0))
    slot, second = slots.put(*take_apart(content(other)))
    assert slot == 0
    assert kept.tolist() == [1.0] * 3
    assert second is not None
    assert first is not None
    assert other.tolist() == [2.0] * 3


def test_a_slot_grows_to_the_largest_reply_and_slots_are_apart() -> None:
    slots = Slots()
    small, large = written(3, filled(1.0)), written(300, filled(2.0))
    assert slots.put(*take_apart(content(small)))[1] is not None
    _, beside = slots.put(*take_apart(content(small)))
    free(slots, 0)
    slot, grown = slots.put(*take_apart(content(large)))
    assert slot == 0
    assert beside is not None
    assert grown is not None
    assert read(grown, content(large)) == [2.0] * 300
    assert read(beside, content(small)) == [1.0] * 3
    free(slots, 0)
    assert slots.put(*take_apart(content(small))) == (0, None)


def test_a_reply_without_arrays_takes_no_slot() -> None:
    slots = Slots()
    for _ in range(3):
        assert slots.put(*take_apart(RecordDict())) == (None, None)
    assert put(slots, 1.0)[0] == 0


def test_without_a_lender_a_reply_lies_in_bytes_of_its_own() -> None:
    vector = written_to_send(3, filled(4.0))
    assert isinstance(wire_bytes(vector), bytes)
    with lent_by(lambda nbytes: None):
        assert isinstance(wire_bytes(written_to_send(3, filled(4.0))), bytes)


def test_a_slot_that_is_read_when_it_is_let_go_waits_once() -> None:
    for is_read_longer in (False, True):
        slot, memory = Slot(0, is_free=False), Block.of_size(12).map()
        reader = memoryview(memory)
        slot.let_go(memory)
        assert not slot.is_free
        slot.look_again()
        assert not slot.is_free
        if not is_read_longer:
            reader.release()
        slot.settle()
        assert (slot.is_free, slot.fresh) == (True, is_read_longer)
        assert memory.closed is not is_read_longer
        reader.release()


def test_a_slot_that_is_read_no_more_is_free_when_it_is_looked_at() -> None:
    slot, memory = Slot(0, is_free=False), Block.of_size(12).map()
    reader = memoryview(memory)
    slot.let_go(memory)
    reader.release()
    slot.look_again()
    assert (slot.is_free, slot.fresh) == (True, False)
    assert memory.closed
    slot.is_free = False  # a worker writes there again
    slot.look_again()
    slot.settle()
    assert not slot.is_free


def test_a_slot_that_nobody_reads_is_free_at_once() -> None:
    slot = Slot(0, is_free=False)
    slot.let_go(Block.of_size(12).map())
    assert (slot.is_free, slot.fresh, slot.is_read) == (True, False, False)
    busy = Slot(1, is_free=False)
    busy.settle()  # a worker is about to write there
    assert not busy.is_free


def test_a_lent_vector_lies_in_the_block_that_is_sent_and_its_end_closes_that() -> None:
    lender = Lender()
    with lent_by(lender.lend):
        vector, other = written_to_send(3, filled(2.0)), written_to_send(3, filled(3.0))
    form, parts = take_apart(content(vector))
    block = lender.block_of(parts[0])
    assert block is not None
    assert read(block.descriptor, content(vector)) == [2.0] * 3
    assert lender.block_of(parts[0][:4]) is None  # a part of it
    assert lender.block_of(wire_bytes(written(3, filled(2.0)))) is None
    descriptor = block.descriptor
    del vector, parts, form
    gc.collect()
    assert block.descriptor == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    kept = lender.block_of(wire_bytes(other))
    lender.close()
    assert kept is not None
    assert kept.descriptor == -1
    assert other.tolist() == [3.0] * 3
