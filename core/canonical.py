"""Canonical JSON and digests: two machines that mean the same write the same bytes."""

import hashlib
import json
from concurrent.futures import Executor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from intramural.core.threads import thread_pool

CHUNK_BYTES = 1 << 20
PIECE_BYTES = 1 << 23
"""Bytes of a vector that are hashed at once; the digests of larger ones depend on it."""
HASHERS_MAX = 4
"""Threads that hash a vector's pieces."""
_ENCODER = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
)


def canonical_json(value: Any) -> bytes:
    """Return `value` as JSON with sorted keys, no spaces, UTF-8.

    Raises:
        ValueError: `value` holds a NaN or an infinity, which JSON cannot say.
    """
    return _ENCODER.encode(value).encode()


def digest_bytes(content: bytes | memoryview) -> str:
    """Return `sha256:` and the hexadecimal SHA-256 of `content`."""
    return "sha256:" + hashlib.sha256(content).hexdigest()


def digest_json(value: Any) -> str:
    """Return the digest of the canonical JSON of `value`."""
    return digest_bytes(canonical_json(value))


def digest_vector(vector: NDArray[np.float32]) -> str:
    """Return the digest of a float32 vector's little-endian bytes.

    Of more than `PIECE_BYTES` it is that of the pieces' digests, 32 bytes each, one after the
    other: pieces are hashed on several processors at once.
    """
    content = np.ascontiguousarray(vector, dtype="<f4").data.cast("B")
    if len(content) <= PIECE_BYTES:
        return digest_bytes(content)
    pieces = [content[at : at + PIECE_BYTES] for at in range(0, len(content), PIECE_BYTES)]
    return digest_bytes(b"".join(_hashers().map(_sha256, pieces)))


def _sha256(content: memoryview) -> bytes:
    return hashlib.sha256(content).digest()


@cache
def _hashers() -> Executor:
    return thread_pool(HASHERS_MAX, name="digest")


def digest_file(path: Path) -> str:
    """Return the digest of a file's content, read in chunks."""
    hasher = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            hasher.update(chunk)
    return "sha256:" + hasher.hexdigest()
