"""The wire: letters to and from Flower's records, strictly.

A message is one `ConfigRecord` "intramural" (the letter's header and, when sealed, its seal) and at
most one `ArrayRecord` "vector" with one array "flat" of raw little-endian float32.
"""

from copy import copy

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from intramural.core.errors import WireError
from intramural.core.layout import Layout, Vector, wire_bytes
from intramural.core.letter import Letter, read_reply, read_request, write_letter
from intramural.core.messages import Reply, Request

RECORD, HEADER, SEAL, VECTOR, FLAT = "intramural", "header", "seal", "vector", "flat"
STYPE = "intramural.f4"
"""Name of the array encoding: raw little-endian float32, no header of its own."""
ITEM_BYTES = 4
_EMPTY = Array(dtype="float32", shape=(0,), stype=STYPE, data=b"")
"""Copied for each vector: the constructor takes no view of lent memory, and longer than a copy."""


def encode_vector(vector: Vector) -> ArrayRecord:
    """Return a Flower record of the vector; one record can serve all messages of a round."""
    return _vector_record(wire_bytes(vector))


def _vector_record(data: bytes) -> ArrayRecord:
    array = copy(_EMPTY)
    array.shape, array.data = (len(data) // ITEM_BYTES,), data
    record = ArrayRecord()
    record[FLAT] = array  # item assignment: the constructor would copy the bytes
    return record


def to_records(letter: Letter, *, vector: ArrayRecord | None = None) -> RecordDict:
    """Return a letter as Flower records.

    Args:
        letter: What travels.
        vector: The letter's vector, already encoded, to share it between messages.
    """
    fields: dict[str, str] = {HEADER: letter.header}
    if letter.seal is not None:
        fields[SEAL] = letter.seal
    records = RecordDict({RECORD: ConfigRecord({**fields})})
    if letter.vector is not None:
        records[VECTOR] = vector or _vector_record(letter.vector)
    return records


def to_letter(records: RecordDict) -> Letter:
    """Return the letter in Flower's records; nothing of it is read, copied or allocated.

    Raises:
        WireError: The records are not a letter's: others beside, or a vector of another type.
    """
    # Not by `config_records`: it makes a reference cycle, which keeps the vector from being freed.
    config = records.get(RECORD)
    fields = dict(config) if isinstance(config, ConfigRecord) else {}
    header = fields.get(HEADER) if set(fields) <= {HEADER, SEAL} else None
    seal = fields.get(SEAL)
    if not isinstance(header, str) or not isinstance(seal, str | None):
        raise WireError("message has no header; the peer does not speak Intramural")
    if not set(records) <= {RECORD, VECTOR}:
        raise WireError(f"message carries other records than {RECORD!r} and {VECTOR!r}")
    vector = _vector_bytes(records) if VECTOR in records else None
    return Letter(header=header, vector=vector, seal=seal)


def _vector_bytes(records: RecordDict) -> bytes:
    record = records[VECTOR]
    if not isinstance(record, ArrayRecord) or set(record) != {FLAT}:
        raise WireError("vector is missing, or more than one came")
    array = record[FLAT]
    if (array.dtype, array.stype) != ("float32", STYPE):
        raise WireError("vector is not little-endian float32")
    if tuple(array.shape) != (len(array.data) // ITEM_BYTES,) or len(array.data) % ITEM_BYTES:
        raise WireError("vector has another size than its shape says")
    return array.data


def encode(
    message: Request | Reply, *, answers: str | None = None, vector: ArrayRecord | None = None
) -> RecordDict:
    """Return the message as Flower records; see `write_letter` and `to_records`."""
    return to_records(write_letter(message, answers=answers), vector=vector)


def decode_request(records: RecordDict, *, layout: Layout | None = None) -> Request:
    """Read what the coordinator sent; see `to_letter` and `read_request` for the errors."""
    return read_request(to_letter(records), layout=layout)


def decode_reply(
    records: RecordDict, *, layout: Layout | None = None, answers: str | None = None
) -> Reply:
    """Read what a site sent; see `to_letter` and `read_reply` for arguments and errors."""
    return read_reply(to_letter(records), layout=layout, answers=answers)


def payload_bytes(records: RecordDict) -> int:
    """Return the size of a message's content: header and vector, without Flower's framing."""
    sizes = [record.count_bytes() for record in records.values()]
    return sum(sizes)
