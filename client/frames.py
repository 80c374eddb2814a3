"""Frames: a letter as it passes the worker's socket, in pieces whose sizes are checked first.

The first frame is a JSON object: `manifest` (the envelope's text; null in an answer), `header`,
`seal`, `vector_bytes` (null: no vector) and `vector_meta`. The vector follows, at most 4 MiB a
frame. Imports neither flwr nor torch.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from intramural.core.errors import WireError
from intramural.core.letter import HEADER_BYTES_MAX, Letter

METHOD = "/intramural.Worker/Answer"
SERVICE = "intramural.Worker"
FRAME_BYTES_MAX = 4 << 20
"""Also the most that gRPC takes in one message, on either side."""
ENVELOPE_BYTES_MAX = 1 << 20
SEAL_BYTES_MAX = 4096
FLOAT32 = {"dtype": "<f4"}
"""What `vector_meta` says of a vector; of none it is empty."""
ITEM_BYTES = 4
KEYS = {"manifest", "header", "seal", "vector_bytes", "vector_meta"}


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What a first frame says, its sizes checked."""

    manifest: str | None = field(repr=False)
    header: str = field(repr=False)
    seal: str | None
    vector_bytes: int | None


def frames_of(letter: Letter, *, manifest: str | None = None) -> Iterator[bytes]:
    """Return a letter's frames; a part too long is refused at once, not at the first frame.

    Args:
        letter: What to send; of its vector one frame at a time is copied.
        manifest: For a question, the manifest in its envelope.

    Raises:
        WireError: Header, seal or envelope is over its limit.
    """
    _check_texts(manifest, letter.header, letter.seal)
    vector = letter.vector
    opening = {
        "manifest": manifest,
        "header": letter.header,
        "seal": letter.seal,
        "vector_bytes": None if vector is None else len(vector),
        "vector_meta": {} if vector is None else FLOAT32,
    }
    first = json.dumps(opening, ensure_ascii=False).encode()
    if len(first) > FRAME_BYTES_MAX:
        raise WireError(f"letter's texts take {len(first)} bytes, over {FRAME_BYTES_MAX}")
    return itertools.chain((first,), _chunks(vector or b""))


def _chunks(vector: bytes) -> Iterator[bytes]:
    view = memoryview(vector)
    for start in range(0, len(view), FRAME_BYTES_MAX):
        yield bytes(view[start : start + FRAME_BYTES_MAX])


def read_opening(frames: Iterator[bytes], *, vector_bytes_max: int) -> Opening:
    """Read a letter's first frame; `read_vector` reads the others.

    Raises:
        WireError: It is malformed, or promises more than is taken.
    """
    frame = next(frames, b"")
    if len(frame) > FRAME_BYTES_MAX:
        raise WireError(f"frame of {len(frame)} bytes is over {FRAME_BYTES_MAX}")
    try:
        table = json.loads(frame)
    except (ValueError, RecursionError):
        raise WireError("first frame is not JSON; install equal versions") from None
    if not isinstance(table, dict) or set(table) != KEYS:
        raise WireError("first frame has other keys than a letter's; install equal versions")
    opening = Opening(
        manifest=_text(table, "manifest"),
        header=_text(table, "header") or "",
        seal=_text(table, "seal"),
        vector_bytes=_vector_bytes(table, vector_bytes_max),
    )
    _check_texts(opening.manifest, opening.header, opening.seal)
    return opening


def read_vector(frames: Iterator[bytes], opening: Opening) -> bytes | None:
    """Read the vector that the opening promised, into memory that is claimed as it comes.

    Raises:
        WireError: More came, or less.
    """
    size = opening.vector_bytes
    vector = None if size is None else _filled(frames, size)
    if next(frames, None) is not None:
        raise WireError("more frames came than the first one promised")
    return vector


def read_letter(frames: Iterable[bytes], *, vector_bytes_max: int) -> Letter:
    """Read an answer whole; see `read_opening` and `read_vector` for the errors."""
    iterator = iter(frames)
    opening = read_opening(iterator, vector_bytes_max=vector_bytes_max)
    return Letter(header=opening.header, vector=read_vector(iterator, opening), seal=opening.seal)


def _filled(frames: Iterator[bytes], size: int) -> bytes:
    # BytesIO hands its bytes out without a copy, and zeros take no memory until written over
    buffer = BytesIO(bytes(size))
    at = 0
    with buffer.getbuffer() as view:
        while at < size:
            frame = next(frames, b"")
            if not frame:
                raise WireError(f"vector ends after {at} of {size} bytes")
            if len(frame) > min(size - at, FRAME_BYTES_MAX):
                raise WireError(f"vector has more than the {size} bytes that were promised")
            view[at : at + len(frame)] = frame
            at += len(frame)
    return buffer.getvalue()


def _text(table: dict[str, Any], name: str) -> str | None:
    value = table[name]
    if value is None and name != "header":
        return None
    if not isinstance(value, str):
        raise WireError(f"first frame's {name} is not text; install equal versions")
    return value


def _vector_bytes(table: dict[str, Any], most: int) -> int | None:
    size = table["vector_bytes"]
    if table["vector_meta"] != ({} if size is None else FLOAT32):
        raise WireError("first frame's vector_meta is not a float32 vector's")
    if size is None:
        return None
    if type(size) is not int or size < 0 or size % ITEM_BYTES:
        raise WireError("first frame's vector_bytes is no size of a float32 vector")
    if size > most:
        raise WireError(f"vector of {size} bytes is over the site's {most}")
    return size


def _check_texts(manifest: str | None, header: str, seal: str | None) -> None:
    limits = (
        ("manifest's envelope", manifest or "", ENVELOPE_BYTES_MAX),
        ("header", header, HEADER_BYTES_MAX),
        ("seal", seal or "", SEAL_BYTES_MAX),
    )
    for name, text, most in limits:
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise WireError(f"{name} is not Unicode text") from None
        if size > most:
            raise WireError(f"{name} of {size} bytes is over {most}")
