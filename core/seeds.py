"""One seed, many independent generators: one for each (use, round, site)."""

import hashlib

import numpy as np

from intramural.core.canonical import canonical_json


def derive_seed(seed: int, use: str, *path: int | str) -> int:
    """Return a 63-bit seed for one use, from SHA-256 of (seed, use, path).

    Different uses, rounds or sites give unrelated streams, and the same ones the same stream on
    every machine, in every engine, and after a resume. Not for privacy: noise and sampling under
    a privacy claim come from a cryptographic generator.
    """
    content = hashlib.sha256(canonical_json([seed, use, *path])).digest()
    return int.from_bytes(content[:8], "little") >> 1


def generator(seed: int, use: str, *path: int | str) -> np.random.Generator:
    """Return NumPy's default generator seeded by `derive_seed`."""
    return np.random.default_rng(derive_seed(seed, use, *path))
