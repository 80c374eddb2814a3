"""The wire: core messages to and from Flower's records, strictly, versioned, without pickle.

A message is one JSON header (Flower `ConfigRecord` "intramural", key "header") and at most one flat
vector (`ArrayRecord` "vector", one array "flat" of little-endian float32). One vector travels, not
one array per tensor: no names to disagree about, one copy to make, one digest to check.
"""

import dataclasses
import json
import typing
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from intramural.core.canonical import canonical_json
from intramural.core.errors import WireError
from intramural.core.layout import Layout, Vector, wire_bytes
from intramural.core.messages import (
    Evaluated,
    EvaluateRequest,
    Hello,
    Refusal,
    Reply,
    Request,
    TrainRequest,
    Update,
    Welcome,
)
from intramural.core.metrics import Sums

WIRE_VERSION = 2
HEADER_BYTES_MAX = 1 << 20
HEADER, VECTOR, FLAT = "intramural", "vector", "flat"
STYPE = "intramural.f4"
"""Name of the array encoding: raw little-endian float32, no header of its own."""

_Short = Annotated[str, Field(max_length=2000)]
_Natural = Annotated[int, Field(ge=0, lt=2**63)]
_Counts = dict[
    Annotated[str, Field(max_length=100)], Annotated[list[_Natural], Field(max_length=10**6)]
]
_FIELD_TYPES: dict[Any, Any] = {
    str: _Short,
    str | None: _Short | None,
    int: _Natural,
    int | None: _Natural | None,
    Sums: _Counts,
}


@dataclass(frozen=True, kw_only=True)
class _Codec:
    """How one kind of message is written."""

    message: type[Any]
    header: type[BaseModel]
    vector: str | None
    """Name of the field that is the flat vector."""


def _codec(message: type[Any]) -> _Codec:
    hints = typing.get_type_hints(message)
    vectors = [name for name, hint in hints.items() if hint == Vector]
    fields = {n: (_FIELD_TYPES.get(h, h), ...) for n, h in hints.items() if n not in vectors}
    header = create_model(
        f"{message.__name__}Header",
        __config__=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False),
        **typing.cast(Any, fields),
    )
    return _Codec(message=message, header=header, vector=vectors[0] if vectors else None)


_REQUESTS = {kind.__name__: _codec(kind) for kind in (Hello, TrainRequest, EvaluateRequest)}
_REPLIES = {kind.__name__: _codec(kind) for kind in (Welcome, Update, Evaluated, Refusal)}


def encode_vector(vector: Vector) -> ArrayRecord:
    """Return a Flower record of the vector; one record can serve all messages of a round."""
    data = wire_bytes(vector)
    array = Array(dtype="float32", shape=(vector.size,), stype=STYPE, data=data)
    record = ArrayRecord()
    record[FLAT] = array  # item assignment: the constructor would copy the bytes
    return record


def encode(message: Request | Reply, *, vector: ArrayRecord | None = None) -> RecordDict:
    """Return the message as Flower records.

    Args:
        message: What to say.
        vector: The message's vector, already encoded by `encode_vector`, to share it between
            messages. The message's own vector is then not read.
    """
    kind = type(message).__name__
    codec = (_REQUESTS | _REPLIES)[kind]
    header = {
        f.name: getattr(message, f.name)
        for f in dataclasses.fields(message)
        if f.name != codec.vector
    }
    if isinstance(message, Evaluated):
        header["sums"] = {name: counts.tolist() for name, counts in message.sums.counts.items()}
    text = canonical_json({"version": WIRE_VERSION, "kind": kind, "body": header})
    records = RecordDict({HEADER: ConfigRecord({"header": text.decode()})})
    if codec.vector is not None:
        records[VECTOR] = vector or encode_vector(getattr(message, codec.vector))
    return records


def decode_request(records: RecordDict, *, layout: Layout | None = None) -> Request:
    """Read what the coordinator sent; see `decode_reply` for arguments and errors."""
    return typing.cast(Request, _decode(records, _REQUESTS, layout))


def decode_reply(records: RecordDict, *, layout: Layout | None = None) -> Reply:
    """Read what a site sent.

    Args:
        records: The message's content; hostile until read.
        layout: What the vector must fit. Without it a message with a vector is refused.

    Raises:
        WireError: Another version, an unknown kind, unknown or missing fields, a vector of another
            layout, type or size. Sizes are checked before anything is allocated.
    """
    return typing.cast(Reply, _decode(records, _REPLIES, layout))


def _decode(records: RecordDict, codecs: dict[str, _Codec], layout: Layout | None) -> Any:
    kind, body = _read_header(records)
    codec = codecs.get(kind)
    if codec is None:
        raise WireError(f"message of kind {kind[:40]!r} does not belong here; check versions")
    try:
        header = codec.header.model_validate(body)
    except ValidationError as error:
        keys = sorted({".".join(map(str, e["loc"]))[:80] for e in error.errors()})
        raise WireError(f"{kind} header has wrong fields {keys}; check versions") from None
    fields = {name: getattr(header, name) for name in codec.header.model_fields}
    if "sums" in fields:
        counts = fields["sums"].items()
        fields["sums"] = Sums(counts={n: np.array(c, dtype=np.int64) for n, c in counts})
    if codec.vector is not None:
        fields[codec.vector] = _read_vector(records, layout, claimed=fields["layout"])
    expected = {HEADER, VECTOR} if codec.vector is not None else {HEADER}
    if set(records) != expected:
        raise WireError(f"{kind} carries other records than {sorted(expected)}")
    return codec.message(**fields)


def _read_header(records: RecordDict) -> tuple[str, Any]:
    config = records.config_records.get(HEADER)
    text = config.get("header") if config is not None and set(config) == {"header"} else None
    if not isinstance(text, str):
        raise WireError("message has no header; the peer does not speak Intramural")
    if len(text) > HEADER_BYTES_MAX:
        raise WireError(f"header of {len(text)} bytes is over the limit of {HEADER_BYTES_MAX}")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise WireError("header is not JSON") from None
    if not isinstance(header, dict) or set(header) != {"version", "kind", "body"}:
        raise WireError("header lacks version, kind or body")
    version, kind = header["version"], header["kind"]
    if type(version) is not int or not isinstance(kind, str):
        raise WireError("header's version is not a whole number, or its kind is not text")
    if version != WIRE_VERSION:
        raise WireError(
            f"wire version {str(version)[:20]}, expected {WIRE_VERSION}; install equal versions"
        )
    return kind, header["body"]


def _read_vector(records: RecordDict, layout: Layout | None, *, claimed: str) -> Vector:
    if layout is None:
        raise WireError("a vector came where none was expected")
    if claimed != layout.digest:
        raise WireError(
            f"vector of layout {claimed[:19]}, expected {layout.digest[:19]}: the peers' models "
            "differ; compare base model digests and the [exchange] section"
        )
    record = records.array_records.get(VECTOR)
    if record is None or set(record) != {FLAT}:
        raise WireError("vector is missing, or more than one came")
    array = record[FLAT]
    if (array.dtype, array.stype) != ("float32", STYPE):
        raise WireError("vector is not little-endian float32")
    if tuple(array.shape) != (layout.size,) or len(array.data) != layout.nbytes:
        raise WireError(f"vector has another size than the layout's {layout.size} elements")
    return np.frombuffer(array.data, dtype="<f4")


def payload_bytes(records: RecordDict) -> int:
    """Return the size of a message's content: header and vector, without Flower's framing."""
    sizes = [record.count_bytes() for record in records.values()]
    return sum(sizes)
