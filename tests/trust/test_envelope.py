"""Envelope: DSSE to the letter, and nothing but what was signed ever comes out."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from intramural.core.canonical import canonical_json
from intramural.core.errors import TrustError
from intramural.trust.envelope import ENVELOPE_BYTES_MAX, open_envelope, pae, parse_json, sign
from intramural.trust.keys import public_bytes
from tests.trust.members import openssl, signing_key

KIND = "application/vnd.intramural.test+json"
KEY, OTHER = signing_key("coordinator"), signing_key("other")
PUBLIC = public_bytes(KEY)


def opened(envelope: Any, *, kind: str = KIND, key: bytes = PUBLIC) -> bytes:
    return open_envelope(envelope, payload_type=kind, key=key)


def test_pae_is_that_of_the_protocol() -> None:
    # https://github.com/secure-systems-lab/dsse/blob/master/protocol.md, test vectors
    expected = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert pae("http://example.com/HelloWorld", b"hello world") == expected


def test_pae_counts_bytes_and_not_characters() -> None:
    assert pae("é", "ü€".encode()) == b"DSSEv1 2 \xc3\xa9 5 \xc3\xbc\xe2\x82\xac"
    assert pae("", b"") == b"DSSEv1 0  0 "


@given(st.text(max_size=9), st.binary(max_size=9), st.text(max_size=9), st.binary(max_size=9))
def test_pae_of_two_things_differs(kind: str, body: bytes, kind2: str, body2: bytes) -> None:
    assert (pae(kind, body) == pae(kind2, body2)) == ((kind, body) == (kind2, body2))


def test_an_envelope_has_dsses_fields_and_a_signature_that_others_verify(tmp_path: Path) -> None:
    envelope = sign(KIND, b'{"a":1}', KEY)
    assert set(envelope) == {"payload", "payloadType", "signatures"}
    assert base64.b64decode(envelope["payload"]) == b'{"a":1}'
    assert envelope["payloadType"] == KIND
    (signature,) = envelope["signatures"]
    raw = base64.b64decode(signature["sig"])
    signed = b'DSSEv1 %d %b 7 {"a":1}' % (len(KIND), KIND.encode())
    Ed25519PublicKey.from_public_bytes(PUBLIC).verify(raw, signed)
    (tmp_path / "signed").write_bytes(signed)
    (tmp_path / "sig").write_bytes(raw)
    pem = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "pem").write_bytes(pem)
    words = ("pkeyutl", "-verify", "-pubin", "-inkey", tmp_path / "pem", "-rawin", "-in")
    openssl(*words, tmp_path / "signed", "-sigfile", tmp_path / "sig")
    (tmp_path / "signed").write_bytes(signed + b" ")
    openssl(*words, tmp_path / "signed", "-sigfile", tmp_path / "sig", fails=True)


@given(st.binary(max_size=300), st.text(max_size=40))
def test_what_was_signed_comes_out(payload: bytes, kind: str) -> None:
    envelope = sign(kind, payload, KEY)
    for form in (envelope, json.dumps(envelope), json.dumps(envelope, indent=2).encode()):
        assert opened(form, kind=kind) == payload


def test_one_bit_anywhere_is_noticed() -> None:
    text = canonical_json(sign(KIND, b'{"round":1}', KEY))
    assert opened(text) == b'{"round":1}'
    for place in range(len(text)):
        for bit in range(8):
            flipped = bytearray(text)
            flipped[place] ^= 1 << bit
            with pytest.raises(TrustError):
                opened(bytes(flipped))


def test_another_key_and_another_type_are_refused() -> None:
    envelope = sign(KIND, b"{}", KEY)
    with pytest.raises(TrustError, match=r"signed by 'ed25519:.*', not by 'ed25519:"):
        opened(envelope, key=public_bytes(OTHER))
    with pytest.raises(TrustError, match=f"holds '{KIND.replace('+', '.')}' where 'text' belongs"):
        opened(envelope, kind="text")
    # the hint at the key is not signed: one that lies does not help
    lying = envelope | {"signatures": [sign(KIND, b"{}", OTHER)["signatures"][0]]}
    lying["signatures"][0]["keyid"] = envelope["signatures"][0]["keyid"]
    with pytest.raises(TrustError, match="does not verify"):
        opened(lying)
    # nor can one type's signature pass for another's
    moved = envelope | {"payloadType": "text"}
    with pytest.raises(TrustError, match="does not verify"):
        opened(moved, kind="text")


def test_a_key_that_is_none_verifies_nothing() -> None:
    envelope = sign(KIND, b"{}", KEY)
    for key in (b"", PUBLIC[:-1], PUBLIC + b"x"):
        with pytest.raises(TrustError):
            opened(envelope, key=key)


def changed(**fields: Any) -> dict[str, Any]:
    return sign(KIND, b"{}", KEY) | fields


def signatures(**fields: Any) -> list[Any]:
    return [sign(KIND, b"{}", KEY)["signatures"][0] | fields]


@pytest.mark.parametrize(
    "envelope",
    [
        {},
        [],
        None,
        "",
        "null",
        7,
        changed(extra=1),
        changed(payload=None),
        changed(payload=b"e30="),
        changed(payload="e30"),
        changed(payload="e31="),  # the same bytes, spelt with a stray bit
        changed(payload="e3 0="),
        changed(payload="e30=\n"),
        changed(payload="é30="),
        changed(payload="\ud800"),
        changed(signatures=[]),
        changed(signatures=signatures() * 2),
        changed(signatures=signatures(extra=1)),
        changed(signatures=signatures(sig="")),
        changed(signatures=signatures(sig="AAAA")),
        changed(signatures=signatures(sig=base64.b64encode(bytes(64)).decode())),
        changed(signatures=signatures(keyid=1)),
        changed(signatures=[signatures()]),
        {k: v for k, v in changed().items() if k != "payloadType"},
    ],
)
def test_what_is_no_envelope_is_refused(envelope: Any) -> None:
    with pytest.raises(TrustError):
        opened(envelope)


def test_url_safe_base64_is_another_spelling_and_refused() -> None:
    payload = b"\xfb\xff"  # '+/8=' or '-_8='
    envelope = sign(KIND, payload, KEY)
    assert envelope["payload"] == "+/8="
    with pytest.raises(TrustError, match="payload is not base64"):
        opened(envelope | {"payload": "-_8="})


@pytest.mark.parametrize(
    "text",
    [
        '{"a":1,"a":1}',
        '{"a":{"b":1,"b":2}}',
        "[NaN]",
        "[Infinity]",
        "[-Infinity]",
        "[" * 100_000,
        '{"a":' * 100_000,
        "",
        "{",
        b"\xff",
        "[1" + "0" * 5000 + "]",
        " " * (ENVELOPE_BYTES_MAX + 1),
    ],
)
def test_json_that_two_readers_could_read_differently_is_refused(text: str | bytes) -> None:
    with pytest.raises(TrustError, match=r"not JSON|longer than"):
        parse_json(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["payload", "payloadType", "signatures", "sig", "keyid", "x"]), inner
        )
    ),
    max_leaves=8,
)


@given(JSON | st.text(max_size=50) | st.binary(max_size=50))
def test_only_a_typed_error_escapes(envelope: Any) -> None:
    with pytest.raises(TrustError):
        opened(envelope)


@given(
    st.sampled_from(["payload", "payloadType", "signatures"]), JSON, st.sampled_from(["", "sig"])
)
def test_only_a_typed_error_escapes_from_what_is_nearly_one(
    field: str, value: Any, inner: str
) -> None:
    envelope = sign(KIND, b"{}", KEY)
    if inner:
        envelope["signatures"][0]["sig"] = value
    else:
        envelope[field] = value
    with pytest.raises(TrustError):
        opened(envelope)


def test_the_oracle_itself_refuses() -> None:
    with pytest.raises(InvalidSignature):
        Ed25519PublicKey.from_public_bytes(PUBLIC).verify(bytes(64), b"")
