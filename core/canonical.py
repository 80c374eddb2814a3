"""Canonical JSON and digests: two machines that mean the same write the same bytes."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK_BYTES = 1 << 20
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
    """Return the digest of a float32 vector's little-endian bytes."""
    return digest_bytes(np.ascontiguousarray(vector, dtype="<f4").data.cast("B"))


def digest_file(path: Path) -> str:
    """Return the digest of a file's content, read in chunks."""
    hasher = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            hasher.update(chunk)
    return "sha256:" + hasher.hexdigest()
