"""Canonical JSON is one byte string a value; digests are SHA-256 of exactly those bytes."""

import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intramural.core.canonical import (
    CHUNK_BYTES,
    canonical_json,
    digest_bytes,
    digest_file,
    digest_json,
    digest_vector,
)

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=12,
)


def sha256(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def test_keys_are_sorted_spaces_left_out_and_text_kept_as_it_is() -> None:
    assert canonical_json({"b": [1, 2.5, None], "a": {"é": True}}) == (
        b'{"a":{"\xc3\xa9":true},"b":[1,2.5,null]}'
    )


@given(values)
def test_reading_it_back_gives_the_value_and_the_same_bytes(value: Any) -> None:
    content = canonical_json(value)
    assert json.loads(content) == value
    assert canonical_json(json.loads(content)) == content


@given(st.dictionaries(st.text("abc", max_size=3), st.integers(), max_size=6))
def test_the_order_of_keys_changes_nothing(table: dict[str, int]) -> None:
    assert canonical_json(dict(reversed(table.items()))) == canonical_json(table)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_say_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": [bad]})


def test_digest_of_nothing_is_the_published_one() -> None:
    # FIPS 180-4 example: SHA-256 of the empty string.
    expected = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert digest_bytes(b"") == expected
    assert digest_bytes(memoryview(b"")) == expected


def test_digest_of_json_is_that_of_its_canonical_bytes() -> None:
    assert digest_json({"b": 1, "a": 2}) == sha256(b'{"a":2,"b":1}')


def test_digest_of_a_vector_is_that_of_its_little_endian_floats() -> None:
    numbers = [1.0, -2.5, 3.25]
    expected = sha256(struct.pack("<3f", *numbers))
    vector = np.array(numbers, dtype=np.float32)
    assert digest_vector(vector) == expected
    assert digest_vector(vector.astype(">f4")) == expected
    strided = np.repeat(vector, 2)[::2]
    assert not strided.flags.c_contiguous
    assert digest_vector(strided) == expected


@pytest.mark.parametrize("more", [0, 1, 2**21, 2**21 + 1, 2**22])
def test_digest_of_a_large_vector_is_that_of_the_digests_of_its_eight_mib_pieces(more: int) -> None:
    vector = np.arange(2**21 + more, dtype=np.float32)  # 8 MiB, and four bytes for each one more
    content = vector.tobytes()
    if not more:
        assert digest_vector(vector) == sha256(content)
        return
    pieces = [content[:8388608], content[8388608:16777216], content[16777216:]]
    digests = b"".join(hashlib.sha256(piece).digest() for piece in pieces if piece)
    assert digest_vector(vector) == sha256(digests)


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_digest_of_a_file_is_that_of_its_bytes_over_chunk_edges(tmp_path: Path, size: int) -> None:
    path = tmp_path / "weights"
    content = bytes(i % 251 for i in range(size))
    path.write_bytes(content)
    assert digest_file(path) == sha256(content)
