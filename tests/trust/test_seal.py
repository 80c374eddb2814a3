"""Seal: one role's key, one header, one vector; nothing else passes."""

import base64
import hashlib
import json
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from intramural.core.canonical import canonical_json
from intramural.core.errors import TrustError
from intramural.trust.keys import key_id, public_bytes
from intramural.trust.seal import COORDINATOR, check_seal, sealer, site_role
from tests.trust.members import signing_key

KEY, OTHER = signing_key("st-elsewhere"), signing_key("other")
ROLE = site_role("st-elsewhere")
HEADER = canonical_json({"kind": "Update", "body": {"run": "1", "round": 3}})
VECTOR = np.arange(5, dtype="<f4").tobytes()
SEAL = sealer(ROLE, KEY)(HEADER, VECTOR)


def check(seal: Any = SEAL, **changes: Any) -> None:
    given: dict[str, Any] = {
        "header": HEADER,
        "vector": VECTOR,
        "role": ROLE,
        "public": public_bytes(KEY),
    }
    given |= changes
    check_seal(seal, given.pop("header"), given.pop("vector"), **given)


def test_a_seal_fits_what_it_was_made_for() -> None:
    check()
    check(vector=memoryview(VECTOR))
    assert sealer(ROLE, KEY)(HEADER, memoryview(VECTOR)) == SEAL
    check(sealer(ROLE, KEY)(HEADER, None), vector=None)
    role, public = COORDINATOR, public_bytes(OTHER)
    check(sealer(role, OTHER)(HEADER, b""), vector=b"", role=role, public=public)


def test_what_is_signed_is_what_the_docstring_says() -> None:
    parts = [
        b"intramural-seal-v1",
        b"site:st-elsewhere",
        hashlib.sha256(HEADER).digest(),
        hashlib.sha256(VECTOR).digest(),
    ]
    signed = b"18 %b 17 %b 32 %b 32 %b" % tuple(parts)
    found = json.loads(SEAL)
    assert found.keys() == {"key", "role", "signature"}
    assert (found["key"], found["role"]) == (key_id(public_bytes(KEY)), ROLE)
    signature = base64.b64decode(found["signature"])
    Ed25519PublicKey.from_public_bytes(public_bytes(KEY)).verify(signature, signed)
    without = json.loads(sealer(ROLE, KEY)(HEADER, None))["signature"]
    signed = b"18 %b 17 %b 32 %b 0 " % tuple(parts[:3])
    Ed25519PublicKey.from_public_bytes(public_bytes(KEY)).verify(base64.b64decode(without), signed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"role": site_role("other")}, "seal is of 'site:st-elsewhere', expected 'site:other'"),
        ({"role": COORDINATOR}, "expected 'coordinator'"),
        ({"public": public_bytes(OTHER)}, "by key 'ed25519:.*after a rotation, join again"),
        ({"header": HEADER.replace(b"3", b"4")}, "does not verify"),
        ({"header": HEADER + b" "}, "does not verify"),
        ({"header": b""}, "does not verify"),
        ({"vector": None}, "does not verify"),
        ({"vector": b""}, "does not verify"),
        ({"vector": VECTOR + b"\0"}, "does not verify"),
        ({"header": VECTOR, "vector": HEADER}, "does not verify"),
    ],
)
def test_a_seal_fits_nothing_else(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrustError, match=message):
        check(**changes)


def test_no_vector_and_an_empty_vector_are_two_messages() -> None:
    with pytest.raises(TrustError, match="does not verify"):
        check(sealer(ROLE, KEY)(HEADER, None), vector=b"")
    with pytest.raises(TrustError, match="does not verify"):
        check(sealer(ROLE, KEY)(HEADER, b""), vector=None)


def test_a_seal_under_another_roles_name_is_refused() -> None:
    # a site that enrolled as 'other' cannot speak as the coordinator, nor as another site
    seal = json.loads(sealer(site_role("other"), OTHER)(HEADER, VECTOR))
    for role in (COORDINATOR, ROLE):
        moved = canonical_json(seal | {"role": role}).decode()
        with pytest.raises(TrustError, match="does not verify"):
            check(moved, role=role, public=public_bytes(OTHER))


def test_a_key_hint_that_lies_does_not_help() -> None:
    seal = json.loads(sealer(ROLE, OTHER)(HEADER, VECTOR))
    lying = canonical_json(seal | {"key": key_id(public_bytes(KEY))}).decode()
    with pytest.raises(TrustError, match="does not verify"):
        check(lying)


def test_one_bit_anywhere_is_noticed() -> None:
    for place in range(len(SEAL)):
        for bit in range(7):
            flipped = bytearray(SEAL.encode())
            flipped[place] ^= 1 << bit
            with pytest.raises(TrustError):
                check(flipped.decode())
    for name, content in (("header", HEADER), ("vector", VECTOR)):
        for place in range(8 * len(content)):
            flipped = bytearray(content)
            flipped[place // 8] ^= 1 << place % 8
            with pytest.raises(TrustError, match="does not verify"):
                check(**{name: bytes(flipped)})


def spelt(**changes: Any) -> str:
    return canonical_json(json.loads(SEAL) | changes).decode()


@pytest.mark.parametrize(
    "seal",
    [
        "",
        "null",
        "[]",
        "{}",
        SEAL + " ",
        json.dumps(json.loads(SEAL)),  # with spaces
        SEAL.replace("site", "s\\u0069te"),
        spelt(extra=1),
        spelt(role=None),
        spelt(signature=""),
        spelt(signature="AAAA"),
        spelt(signature="x" * 2000),
        "[" * 500,
        "\ud800",
    ],
)
def test_what_is_no_seal_is_refused(seal: str) -> None:
    with pytest.raises(TrustError):
        check(seal)


def test_no_seal_is_refused() -> None:
    with pytest.raises(TrustError, match="message has no seal of 'site:st-elsewhere'"):
        check(None)


@given(st.text(max_size=60))
def test_only_a_typed_error_escapes(text: str) -> None:
    with pytest.raises(TrustError):
        check(text)
