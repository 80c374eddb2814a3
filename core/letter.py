"""Letter: a message written down, and read back strictly: a JSON header and at most one vector.

`wire.py` puts letters into Flower's records; a site's resident worker is handed them as they are.
Versioned, without pickle. One flat vector travels, not one array per tensor: no names to disagree
about, one copy to make, one digest to check.
"""

import json
import typing
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from intramural.core.canonical import canonical_json, digest_bytes
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

WIRE_VERSION = 5
HEADER_BYTES_MAX = 1 << 20

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
class Letter:
    """A message as it travels; hostile until read."""

    header: str
    """Canonical JSON: version, kind, body, and for a reply the digest of what it answers."""
    vector: bytes | None = field(default=None, repr=False)
    """Little-endian float32, without a header of its own; None: no vector."""
    seal: str | None = None
    """The sender's signature over header and vector; see `trust/seal.py`."""

    @property
    def digest(self) -> str:
        """Digest of the header; a reply names the request it answers by it."""
        return digest_bytes(self.header.encode())


@dataclass(frozen=True, kw_only=True)
class _Codec:
    """How one kind of message is written."""

    message: type[Any]
    header: type[BaseModel]
    fields: tuple[str, ...]
    """Names of the fields in the header."""
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
    return _Codec(
        message=message,
        header=header,
        fields=tuple(fields),
        vector=vectors[0] if vectors else None,
    )


_REQUESTS = {kind.__name__: _codec(kind) for kind in (Hello, TrainRequest, EvaluateRequest)}
_REPLIES = {kind.__name__: _codec(kind) for kind in (Welcome, Update, Evaluated, Refusal)}
_CODECS = _REQUESTS | _REPLIES


def write_letter(message: Request | Reply, *, answers: str | None = None) -> Letter:
    """Return the message as a letter, its vector without a copy where memory allows.

    Args:
        message: What to say.
        answers: For a reply, the digest of the request's letter.
    """
    kind = type(message).__name__
    codec = _CODECS[kind]
    body = {name: getattr(message, name) for name in codec.fields}
    if isinstance(message, Evaluated):
        body["sums"] = {name: counts.tolist() for name, counts in message.sums.counts.items()}
    header = {"version": WIRE_VERSION, "kind": kind, "answers": answers, "body": body}
    vector = None if codec.vector is None else wire_bytes(getattr(message, codec.vector))
    return Letter(header=canonical_json(header).decode(), vector=vector)


def read_request(letter: Letter, *, layout: Layout | None = None) -> Request:
    """Read what the coordinator sent; see `read_reply` for arguments and errors."""
    return typing.cast(Request, _read(letter, _REQUESTS, layout, answers=None))


def read_reply(
    letter: Letter, *, layout: Layout | None = None, answers: str | None = None
) -> Reply:
    """Read what a site sent.

    Args:
        letter: Hostile until read.
        layout: What the vector must fit. Without it a letter with a vector is refused.
        answers: Digest of the request that the reply must answer; None: it is not compared.

    Raises:
        WireError: Another version, an unknown kind, unknown or missing fields, a vector of another
            layout or size, or an answer to something else. Sizes are checked before anything is
            allocated.
    """
    return typing.cast(Reply, _read(letter, _REPLIES, layout, answers=answers))


def _read(
    letter: Letter, codecs: dict[str, _Codec], layout: Layout | None, *, answers: str | None
) -> Any:
    table = _header(letter.header)
    kind = table["kind"]
    codec = codecs.get(kind)
    if codec is None:
        raise WireError(f"message of kind {kind[:40]!r} does not belong here; check versions")
    if answers is not None and table["answers"] != answers:
        raise WireError(f"{kind} answers another request than this one")
    try:
        body = codec.header.model_validate(table["body"])
    except ValidationError as error:
        keys = sorted({".".join(map(str, e["loc"]))[:80] for e in error.errors()})
        raise WireError(f"{kind} header has wrong fields {keys}; check versions") from None
    fields = {name: getattr(body, name) for name in codec.fields}
    if "sums" in fields:
        counts = fields["sums"].items()
        fields["sums"] = Sums(counts={n: np.array(c, dtype=np.int64) for n, c in counts})
    if codec.vector is not None:
        fields[codec.vector] = _vector(letter.vector, layout, claimed=fields["layout"])
    elif letter.vector is not None:
        raise WireError(f"{kind} carries other records than its header")
    return codec.message(**fields)


def _header(text: str) -> dict[str, Any]:
    if len(text) > HEADER_BYTES_MAX:
        raise WireError(f"header of {len(text)} bytes is over the limit of {HEADER_BYTES_MAX}")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise WireError("header is not JSON") from None
    if not isinstance(header, dict) or set(header) != {"version", "kind", "answers", "body"}:
        raise WireError("header lacks version, kind, answers or body")
    version, kind, answers = header["version"], header["kind"], header["answers"]
    if type(version) is not int or not isinstance(kind, str):
        raise WireError("header's version is not a whole number, or its kind is not text")
    if version != WIRE_VERSION:
        raise WireError(
            f"wire version {str(version)[:20]}, expected {WIRE_VERSION}; install equal versions"
        )
    if not isinstance(answers, str | None):
        raise WireError("header's answers is neither a digest nor null")
    return header


def _vector(data: bytes | None, layout: Layout | None, *, claimed: str) -> Vector:
    if layout is None:
        raise WireError("a vector came where none was expected")
    if claimed != layout.digest:
        raise WireError(
            f"vector of layout {claimed[:19]}, expected {layout.digest[:19]}: the peers' models "
            "differ; compare base model digests and the [exchange] section"
        )
    if data is None:
        raise WireError("vector is missing, or more than one came")
    if len(data) != layout.nbytes:
        raise WireError(f"vector has another size than the layout's {layout.size} elements")
    return np.frombuffer(data, dtype="<f4")
