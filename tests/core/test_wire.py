"""The wire: what is said arrives bit for bit, and has the documented form."""

import json
import struct
from typing import Any, get_args

import numpy as np
import pytest
from flwr.app import RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from intramural.core.layout import Layout, Vector
from intramural.core.messages import (
    Evaluated,
    EvaluateRequest,
    Hello,
    Refusal,
    Reply,
    Request,
    Split,
    TrainRequest,
    Update,
    Welcome,
)
from intramural.core.metrics import Sums
from intramural.core.wire import decode_reply, decode_request, encode, encode_vector, payload_bytes
from tests.core.messages import BODIES, LAYOUT, REQUESTS, VECTOR, WITH_VECTOR, good

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
natural = st.integers(0, 2**63 - 1)
numbers = st.floats(allow_nan=False, allow_infinity=False)
splits = st.sampled_from(get_args(Split))
vectors = arrays(np.float32, (LAYOUT.size,), elements=st.floats(width=32))
sums = st.dictionaries(text, st.lists(natural, max_size=5), max_size=4).map(
    lambda counts: Sums(counts={n: np.array(c, dtype=np.int64) for n, c in counts.items()})
)
layout = st.just(LAYOUT.digest)
ledger: dict[str, Any] = {
    "ledger_entries": st.none() | natural,
    "ledger_head": st.none() | text,
}

requests = st.one_of(
    st.builds(Hello, manifest=text),
    st.builds(TrainRequest, manifest=text, round=natural, layout=layout, vector=vectors),
    st.builds(
        EvaluateRequest, manifest=text, round=natural, layout=layout, split=splits, vector=vectors
    ),
)
replies = st.one_of(
    st.builds(Welcome, site=text, layout=text, base=text, version=text, **ledger),
    st.builds(
        Update,
        site=text,
        round=natural,
        layout=layout,
        weight=natural,
        loss=st.none() | numbers,
        seconds=st.none() | numbers,
        **ledger,
        seeded=st.booleans(),
        delta=vectors,
    ),
    st.builds(Evaluated, site=text, round=natural, split=splits, sums=sums, **ledger),
    st.builds(Refusal, site=text, reason=text, detail=text),
)


def plain(message: Request | Reply) -> dict[str, Any]:
    """Return the fields, with vectors as their bits (a NaN equals itself) and sums as lists."""
    fields = dict(vars(message))
    for name, value in fields.items():
        if isinstance(value, np.ndarray):
            fields[name] = value.view(np.uint32).tolist()
        if isinstance(value, Sums):
            fields[name] = {n: (c.dtype, c.tolist()) for n, c in value.counts.items()}
    return {"kind": type(message), **fields}


@given(requests)
def test_every_request_arrives_as_it_was_said(message: Request) -> None:
    assert plain(decode_request(encode(message), layout=LAYOUT)) == plain(message)


@given(replies)
def test_every_reply_arrives_as_it_was_said(message: Reply) -> None:
    assert plain(decode_reply(encode(message), layout=LAYOUT)) == plain(message)


@pytest.mark.parametrize("kind", BODIES)
def test_a_message_written_by_hand_is_read(kind: str) -> None:
    decode = decode_request if kind in REQUESTS else decode_reply
    message = decode(good(kind), layout=LAYOUT)
    assert type(message).__name__ == kind
    if kind in WITH_VECTOR:
        vector = getattr(message, "delta" if kind == "Update" else "vector")
        assert np.array_equal(vector, VECTOR)


def test_the_bytes_on_the_wire_are_those_documented() -> None:
    vector = np.array([1.0, -2.0], dtype=np.float32)
    small = Layout((("w", (2,)),))
    records = encode(TrainRequest(manifest="é", round=2, layout=small.digest, vector=vector))
    header = records.config_records["intramural"]["header"]
    body = {"manifest": "é", "run": "", "round": 2, "layout": small.digest}
    assert header == json.dumps(
        {"version": 5, "kind": "TrainRequest", "answers": None, "body": body},
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
    )
    array = records.array_records["vector"]["flat"]
    assert (array.dtype, array.shape, array.stype) == ("float32", (2,), "intramural.f4")
    assert array.data == struct.pack("<2f", 1.0, -2.0)
    assert set(records) == {"intramural", "vector"}


def test_one_encoded_vector_serves_many_messages_without_a_copy() -> None:
    shared = encode_vector(VECTOR)
    other = np.zeros(LAYOUT.size, dtype=np.float32)
    message = TrainRequest(manifest="m", round=1, layout=LAYOUT.digest, vector=other)
    first, second = encode(message, vector=shared), encode(message, vector=shared)
    arrays = [records.array_records["vector"]["flat"].data for records in (first, second)]
    assert arrays[0] is arrays[1]
    decoded = decode_request(first, layout=LAYOUT)
    assert isinstance(decoded, TrainRequest)
    assert np.array_equal(decoded.vector, VECTOR)


def test_a_vector_of_other_memory_order_is_written_in_little_endian_order() -> None:
    strided = np.repeat(VECTOR, 2)[::2]
    swapped: Vector = VECTOR.astype(">f4")
    for vector in (strided, swapped):
        assert encode_vector(vector)["flat"].data == struct.pack("<7f", *VECTOR)


def test_a_decoded_vector_cannot_be_written_to() -> None:
    # It is the message's own memory; a rule that changed it in place would change the message.
    message = decode_reply(good("Update"), layout=LAYOUT)
    assert isinstance(message, Update)
    with pytest.raises(ValueError, match="read-only"):
        message.delta[0] = 1


def test_payload_bytes_counts_header_and_vector() -> None:
    records = good("Update")
    header = records.config_records["intramural"]["header"]
    assert isinstance(header, str)
    least = len(header) + 4 * LAYOUT.size
    assert least <= payload_bytes(records) <= least + 100
    assert payload_bytes(RecordDict()) == 0


def test_no_flower_record_is_changed_by_reading() -> None:
    records = good("Update")
    before = json.dumps(records.config_records["intramural"]["header"])
    decode_reply(records, layout=LAYOUT)
    assert set(records) == {"intramural", "vector"}
    assert json.dumps(records.config_records["intramural"]["header"]) == before
