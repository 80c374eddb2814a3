"""Frames: what was sent comes back to the bit, and nothing is allocated for what is too long."""

import json
import tracemalloc
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from intramural.client.frames import (
    ENVELOPE_BYTES_MAX,
    FRAME_BYTES_MAX,
    SEAL_BYTES_MAX,
    frames_of,
    read_letter,
    read_opening,
    read_vector,
)
from intramural.core.errors import WireError
from intramural.core.letter import HEADER_BYTES_MAX, Letter

MIB = 1 << 20


def opening(**changes: Any) -> bytes:
    table: dict[str, Any] = {
        "manifest": None,
        "header": "{}",
        "seal": None,
        "vector_bytes": 8,
        "vector_meta": {"dtype": "<f4"},
    }
    return json.dumps(table | changes).encode()


def read(frames: Iterable[bytes], most: int = 100) -> Letter:
    return read_letter(frames, vector_bytes_max=most)


@pytest.mark.parametrize("vector", [None, b"", b"\1\2\3\4", bytes(4 * MIB), bytes(4 * MIB + 4)])
def test_a_letter_comes_back_to_the_bit(vector: bytes | None) -> None:
    letter = Letter(header='{"a":"é\\u0000\\"\n"}', vector=vector, seal="s")
    frames = list(frames_of(letter, manifest='{"payload":"x"}'))
    assert max(map(len, frames)) <= FRAME_BYTES_MAX
    assert len(frames) == 1 + -(-len(vector or b"") // FRAME_BYTES_MAX)
    iterator = iter(frames)
    first = read_opening(iterator, vector_bytes_max=5 * MIB)
    assert (first.manifest, first.header, first.seal) == ('{"payload":"x"}', letter.header, "s")
    assert read_vector(iterator, first) == vector
    assert read(frames, 5 * MIB) == letter


def test_the_first_frame_is_what_the_contract_says() -> None:
    letter = Letter(header="{}", vector=bytes(8), seal="s")
    first, second = frames_of(letter, manifest="m")
    assert json.loads(first) == {
        "manifest": "m",
        "header": "{}",
        "seal": "s",
        "vector_bytes": 8,
        "vector_meta": {"dtype": "<f4"},
    }
    assert second == bytes(8)
    (alone,) = frames_of(Letter(header="{}"))
    assert json.loads(alone) == {
        "manifest": None,
        "header": "{}",
        "seal": None,
        "vector_bytes": None,
        "vector_meta": {},
    }


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([], "not JSON"),
        ([b""], "not JSON"),
        ([b"\xff\xfe"], "not JSON"),
        ([b"[" * 100_000], "not JSON"),
        ([b"[]"], "other keys"),
        ([b"{}"], "other keys"),
        ([opening(more=1)], "other keys"),
        ([opening(header=None)], "header is not text"),
        ([opening(header=1)], "header is not text"),
        ([opening(manifest=[])], "manifest is not text"),
        ([opening(seal=True)], "seal is not text"),
        ([opening(header="\ud800")], "header is not Unicode"),
        ([opening(vector_bytes="8")], "vector_bytes is no size"),
        ([opening(vector_bytes=False)], "vector_bytes is no size"),
        ([opening(vector_bytes=8.0)], "vector_bytes is no size"),
        ([opening(vector_bytes=-4)], "vector_bytes is no size"),
        ([opening(vector_bytes=7)], "vector_bytes is no size"),
        ([opening(vector_meta={})], "vector_meta"),
        ([opening(vector_meta={"dtype": "<f8"})], "vector_meta"),
        ([opening(vector_bytes=None)], "vector_meta"),
        ([opening(vector_bytes=104)], "104 bytes is over the site's 100"),
        ([opening(), bytes(4)], "ends after 4 of 8"),
        ([opening(), b"", bytes(8)], "ends after 0 of 8"),
        ([opening(), bytes(12)], "more than the 8 bytes"),
        ([opening(), bytes(8), b""], "more frames"),
        ([opening(vector_bytes=0), b"x"], "more frames"),
        ([opening(vector_bytes=None, vector_meta={}), bytes(8)], "more frames"),
        ([b" " * (FRAME_BYTES_MAX + 1)], "frame of"),
        ([opening(seal="x" * (SEAL_BYTES_MAX + 1))], "seal of 4097 bytes"),
        ([opening(manifest="x" * (ENVELOPE_BYTES_MAX + 1))], "envelope of"),
        ([opening(header="é" * (HEADER_BYTES_MAX // 2) + "x")], "header of"),
    ],
)
def test_what_is_no_letter_is_refused(frames: list[bytes], words: str) -> None:
    with pytest.raises(WireError, match=words):
        read(frames)


def test_texts_at_their_limits_fit_into_one_frame() -> None:
    longest = Letter(header="x" * HEADER_BYTES_MAX, seal="x" * SEAL_BYTES_MAX)
    assert read(frames_of(longest, manifest="x" * ENVELOPE_BYTES_MAX)) == longest


@pytest.mark.parametrize(
    ("letter", "manifest"),
    [
        (Letter(header="x" * (HEADER_BYTES_MAX + 1)), ""),
        (Letter(header="", seal="x" * (SEAL_BYTES_MAX + 1)), ""),
        (Letter(header=""), "x" * (ENVELOPE_BYTES_MAX + 1)),
        (Letter(header="\x01" * HEADER_BYTES_MAX), ""),  # JSON takes six bytes for each
    ],
)
def test_what_is_too_long_is_not_sent(letter: Letter, manifest: str) -> None:
    with pytest.raises(WireError, match="over"):
        frames_of(letter, manifest=manifest)


def peak_of(frames: Iterator[bytes], most: int) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            read(frames, most)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_promise_over_the_bound_allocates_nothing() -> None:
    assert peak_of(iter([opening(vector_bytes=1 << 40)]), 1 << 30) < MIB


def test_a_vector_is_held_once_and_its_frames_one_at_a_time() -> None:
    def chunks() -> Iterator[bytes]:
        yield opening(vector_bytes=64 * MIB)
        for _ in range(16):
            yield bytes(4 * MIB)

    tracemalloc.start()
    letter = read(chunks(), 64 * MIB)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert letter.vector is not None
    assert len(letter.vector) == 64 * MIB
    assert peak < (64 + 4 * 2 + 1) * MIB  # the vector, and two frames
