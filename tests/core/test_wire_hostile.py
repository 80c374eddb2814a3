"""The wire under attack: whatever comes, it is a message or a WireError, and cheap."""

import io
import json
import pickle
import tracemalloc
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from intramural.core.errors import WireError
from intramural.core.layout import Layout
from intramural.core.letter import HEADER_BYTES_MAX
from intramural.core.messages import Evaluated, Hello, Refusal, Update, Welcome
from intramural.core.wire import decode_reply, decode_request, encode_vector
from tests.core.messages import (
    BODIES,
    LAYOUT,
    REQUESTS,
    VECTOR,
    WITH_VECTOR,
    array,
    good,
    raw,
    with_array,
)


def refused(records: RecordDict, message: str = ".", layout: Layout | None = LAYOUT) -> None:
    """Assert that neither end accepts the records, and that the message stays short."""
    for decode in (decode_reply, decode_request):
        with pytest.raises(WireError) as caught:
            decode(records, layout=layout)
        assert len(str(caught.value)) < 1000
    with pytest.raises(WireError, match=message):
        decode_reply(records, layout=layout)


class Exploit:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (pytest.fail, ("a payload was unpickled",))


def whole(kind: str, body: Any) -> dict[str, Any]:
    return {"version": 5, "kind": kind, "answers": None, "body": body}


def header(**changes: Any) -> str:
    return json.dumps(whole("Refusal", BODIES["Refusal"]) | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (header(version=1), "wire version 1, expected 5; install equal versions"),
        (header(version=-1), "wire version -1, "),
        (header(version=10**4000), "wire version 1000"),
        (header(version=True), "not a whole number"),
        (header(version=3.0), "not a whole number"),
        (header(version="3"), "not a whole number"),
        (header(version="v" * 100_000), "not a whole number"),
        (header(version=None), "not a whole number"),
        (header(kind="Goodbye"), "'Goodbye' does not belong here"),
        (header(kind="K" * 100_000), "does not belong here"),
        (header(kind=["Refusal"]), "kind is not text"),
        (header(kind="_Codec"), "does not belong here"),
        (header(more=1), "lacks version, kind, answers or body"),
        ('{"version": 5, "kind": "Refusal"}', "lacks version, kind, answers or body"),
        (header(body=[]), "wrong fields"),
        (header(body=None), "wrong fields"),
        ("", "not JSON"),
        ("{", "not JSON"),
        ("\x00\x80", "not JSON"),
        ("[1]", "lacks version"),
        ("null", "lacks version"),
        ("9" * 10_000, "not JSON"),  # Python refuses to read so long a number
        ("[" * 100_000, "not JSON"),
        ('{"a":' * 100_000, "not JSON"),
        (" " * (HEADER_BYTES_MAX + 1), "over the limit"),
    ],
)
def test_a_bad_header_is_refused(text: str, message: str) -> None:
    refused(raw(text), message)


@pytest.mark.parametrize("depth", [50, 200, 300, 400, 450, 480, 490, 600, 900, 950, 990, 2000])
@pytest.mark.parametrize("place", ["version", "kind", "body"])
def test_nested_json_is_refused_at_any_depth(place: str, depth: int) -> None:
    nested = "[" * depth + "]" * depth
    refused(raw(header(**{place: "HERE"}).replace('"HERE"', nested)))


@pytest.mark.parametrize("kind", BODIES)
def test_each_field_must_be_there_and_no_other(kind: str) -> None:
    for name in BODIES[kind]:
        body = {key: value for key, value in BODIES[kind].items() if key != name}
        text = json.dumps(whole(kind, body))
        refused(raw(text, vector=encode_vector(VECTOR) if kind in WITH_VECTOR else None))
    refused(good(kind, surprise=1))
    refused(good(kind, delta=[1.0]))
    refused(good(kind, vector=[1.0]))


@pytest.mark.parametrize("kind", BODIES)
def test_the_other_ends_messages_are_refused(kind: str) -> None:
    decode = decode_reply if kind in REQUESTS else decode_request
    with pytest.raises(WireError, match=f"{kind!r} does not belong here"):
        decode(good(kind), layout=LAYOUT)


@pytest.mark.parametrize(
    ("kind", "field", "values"),
    [
        ("Update", "round", [True, -1, 2**63, 1.0, "1", None, [1]]),
        ("Update", "weight", [True, -1, 2**63, 5.0, "5"]),
        ("Update", "loss", [True, "0.5", [0.5], 10**400]),
        ("Update", "seconds", [False, "1"]),
        ("Update", "steps", [False, "1", 1.5, -1]),
        ("Update", "ledger_entries", [True, -1, 2**63, 3.0, "3", [3]]),
        ("Update", "ledger_head", [1, "x" * 2001, ["sha256:0"]]),
        ("Update", "seeded", [0, 1, "true", None]),
        ("Update", "site", [1, None, "x" * 2001, ["a"], {"a": 1}]),
        ("Update", "layout", [1, "", "sha256:" + "0" * 64, LAYOUT.digest.upper(), None]),
        ("Evaluated", "split", ["dev", "", 1, None]),
        ("Evaluated", "round", [-1, True]),
        (
            "Evaluated",
            "sums",
            [
                [],
                {"a": 1},
                {"a": [1.0]},
                {"a": [True]},
                {"a": [-1]},
                {"a": [2**63]},
                {"a": [[1]]},
                {"a": ["1"]},
                {"a": None},
                {"a" * 101: [1]},
            ],
        ),
        ("Refusal", "detail", [1, "x" * 2001]),
        ("Welcome", "base", [None, 3, b"".decode() * 3 + "x" * 2001]),
    ],
)
def test_a_field_of_another_type_or_range_is_refused(
    kind: str, field: str, values: list[Any]
) -> None:
    for value in values:
        refused(good(kind, **{field: value}))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_a_loss_that_is_not_finite_is_refused(number: str) -> None:
    text = json.dumps(whole("Update", BODIES["Update"]))
    text = text.replace('"loss": 0.5', f'"loss": {number}')
    refused(raw(text, vector=encode_vector(VECTOR)), "loss")


@pytest.mark.parametrize("detail", ["\ud800", "ok \udfff"])
def test_text_that_is_no_unicode_is_refused(detail: str) -> None:
    refused(good("Refusal", detail=detail))
    refused(good("Evaluated", sums={detail: [1]}))
    refused(good("Refusal", **{detail: "x"}))


NPY = io.BytesIO()
np.save(NPY, VECTOR)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (array(dtype="float64"), "not little-endian float32"),
        (array(dtype="object", data=pickle.dumps(Exploit())), "not little-endian float32"),
        (array(dtype="<f4"), "not little-endian float32"),
        (array(stype="numpy.ndarray", data=NPY.getvalue()), "not little-endian float32"),
        (array(stype=""), "not little-endian float32"),
        (array(data=pickle.dumps(Exploit())), "another size"),
        (array(shape=(6,)), "another size"),
        (array(shape=(8,)), "another size"),
        (array(shape=(7, 1)), "another size"),
        (array(shape=(1, 7)), "another size"),
        (array(shape=()), "another size"),
        (array(shape=(-7,)), "another size"),
        (array(data=VECTOR.tobytes()[:-1]), "another size"),
        (array(data=VECTOR.tobytes() + b"\0"), "another size"),
        (array(data=b""), "another size"),
        (array(shape=(2**40,)), "another size"),
        (array(shape=(2**40,), data=VECTOR.tobytes() * 1000), "another size"),
        (array(shape=(2**62, 2**62)), "another size"),
    ],
)
def test_a_vector_of_another_type_or_size_is_refused(changed: Array, message: str) -> None:
    refused(with_array(changed), message)


def test_a_claim_of_a_huge_array_allocates_nothing() -> None:
    huge = with_array(array(shape=(2**40,)))
    tracemalloc.start()
    with pytest.raises(WireError):
        decode_reply(huge, layout=LAYOUT)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_vector_that_is_missing_doubled_renamed_or_unexpected_is_refused() -> None:
    missing = good("Update")
    del missing["vector"]
    refused(missing, "missing, or more than one")

    doubled = good("Update")
    doubled.array_records["vector"]["more"] = array()
    refused(doubled, "missing, or more than one")

    refused(with_array(array(), name="other"), "missing, or more than one")

    empty = good("Update")
    empty["vector"] = ArrayRecord()
    refused(empty, "missing, or more than one")

    wrong_record = good("Update")
    wrong_record["vector"] = ConfigRecord({"flat": VECTOR.tobytes()})
    refused(wrong_record, "missing, or more than one")

    unexpected = good("Refusal")
    unexpected["vector"] = encode_vector(VECTOR)
    refused(unexpected, "other records")


def test_another_layout_is_refused_with_what_to_compare() -> None:
    other = Layout((("a", (2, 2)), ("c", (3,))))
    refused(good("Update"), "the peers' models differ; compare", layout=other)
    refused(good("Update"), "none was expected", layout=None)


@pytest.mark.parametrize("record", [ArrayRecord(), MetricRecord({"a": 1}), ConfigRecord({})])
def test_another_record_beside_is_refused(
    record: ArrayRecord | MetricRecord | ConfigRecord,
) -> None:
    records = good("Update")
    records["extra"] = record
    refused(records, "other records")


@pytest.mark.parametrize(
    "config",
    [
        ConfigRecord({}),
        ConfigRecord({"header": b"{}"}),
        ConfigRecord({"header": 1}),
        ConfigRecord({"header": header(), "more": 1}),
        ConfigRecord({"Header": header()}),
    ],
)
def test_a_message_without_our_header_is_refused(config: ConfigRecord) -> None:
    refused(RecordDict({"intramural": config}), "does not speak Intramural")
    refused(RecordDict({"config": config}), "does not speak Intramural")
    refused(RecordDict(), "does not speak Intramural")
    refused(RecordDict({"intramural": MetricRecord({"header": 1})}), "does not speak")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["a", LAYOUT.digest, "test", "Update", "Hello"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8) | st.sampled_from(["round"]), inner, max_size=3)
    ),
    max_leaves=6,
)
bodies = st.sampled_from(sorted(BODIES)).flatmap(
    lambda kind: st.tuples(
        st.just(kind),
        st.fixed_dictionaries({}, optional=dict.fromkeys(BODIES[kind], json_values)),
        json_values,
    )
)


def message_or_wire_error(records: RecordDict, layout: Layout | None) -> None:
    kinds = (Hello, Welcome, Update, Evaluated, Refusal)
    for decode in (decode_request, decode_reply):
        try:
            message = decode(records, layout=layout)
        except WireError:
            continue
        assert isinstance(message, kinds) or type(message).__name__ in REQUESTS


@given(bodies, st.booleans(), st.sampled_from([None, LAYOUT]))
@settings(max_examples=400)
def test_changed_fields_give_a_message_or_a_wire_error(
    body: tuple[str, dict[str, Any], Any], vector: bool, layout: Layout | None
) -> None:
    kind, changes, extra = body
    table = whole(kind, BODIES[kind] | changes)
    shared = encode_vector(VECTOR) if vector else None
    message_or_wire_error(raw(json.dumps(table), vector=shared), layout)
    table["body"] = extra
    message_or_wire_error(raw(json.dumps(table), vector=shared), layout)


@given(st.text(max_size=200) | json_values.map(json.dumps), st.booleans())
@settings(max_examples=300)
def test_any_header_gives_a_message_or_a_wire_error(text: str, vector: bool) -> None:
    records = raw(text, vector=encode_vector(VECTOR) if vector else None)
    message_or_wire_error(records, LAYOUT)


@given(
    st.sampled_from(["float32", "object", "", "<f4"]),
    st.lists(st.integers(-(2**63), 2**63), max_size=3) | st.just([7]),
    st.sampled_from(["intramural.f4", "numpy.ndarray", ""]),
    st.binary(max_size=64) | st.binary(min_size=28, max_size=28),
)
def test_any_array_gives_a_message_or_a_wire_error(
    dtype: str, shape: list[int], stype: str, data: bytes
) -> None:
    changed = array(dtype=dtype, shape=tuple(shape), stype=stype, data=data)
    message_or_wire_error(with_array(changed), LAYOUT)
