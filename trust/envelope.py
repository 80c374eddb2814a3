"""Envelope: bytes, what they are, and who signed them (DSSE 1.0).

The protocol is https://github.com/secure-systems-lab/dsse: the signature covers the payload's very
bytes and their type, so that nothing has to be parsed before it is verified, and a signature on one
type is worth nothing on another.
"""

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Annotated, Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from intramural.core.errors import TrustError
from intramural.trust.keys import key_id, public_bytes

MANIFEST_TYPE = "application/vnd.intramural.manifest+json"
"""Payload type of a run's manifest, signed by the coordinator."""
ENVELOPE_BYTES_MAX = 16 << 20
"""Longest envelope read; a roster of some thousand sites takes one megabyte."""
SIGNATURE_BYTES = 64


class _Signature(BaseModel):
    """One signature, and a hint at its key."""

    model_config = ConfigDict(extra="forbid", strict=True)

    keyid: str
    sig: str


class _Envelope(BaseModel):
    """The envelope's fields, as DSSE names them."""

    model_config = ConfigDict(extra="forbid", strict=True)

    payload: str
    payload_type: Annotated[str, Field(alias="payloadType")]
    signatures: Annotated[list[_Signature], Field(min_length=1, max_length=1)]


def pae(payload_type: str, payload: bytes) -> bytes:
    """Return DSSE's pre-authentication encoding: the bytes that are signed.

    Source: https://github.com/secure-systems-lab/dsse/blob/master/protocol.md, PAE.
    """
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def sign(payload_type: str, payload: bytes, key: Ed25519PrivateKey) -> dict[str, Any]:
    """Return `payload` in an envelope, as a JSON value.

    Args:
        payload_type: What the payload is, such as 'application/vnd.intramural.roster+json'.
        payload: The bytes; by our custom canonical JSON.
        key: The signer's.
    """
    signature = key.sign(pae(payload_type, payload))
    return {
        "payload": to_base64(payload),
        "payloadType": payload_type,
        "signatures": [{"keyid": key_id(public_bytes(key)), "sig": to_base64(signature)}],
    }


def open_envelope(
    envelope: Mapping[str, Any] | str | bytes, *, payload_type: str, key: bytes
) -> bytes:
    """Return the payload of an envelope whose signature is good.

    Args:
        envelope: The envelope, or its JSON text; hostile until verified.
        payload_type: What the payload must be.
        key: The public key, 32 raw bytes, of the one who must have signed it.

    Raises:
        TrustError: The envelope is malformed, holds something else, or is not signed by that key.

    Guarantees:
        The owner of `key` signed exactly these bytes as exactly this type, unless Ed25519 or the
        owner's key is broken. When and how often is not said: a payload that can grow old
        carries a version of its own.
    """
    value = parse_json(envelope) if isinstance(envelope, str | bytes) else envelope
    try:
        found = _Envelope.model_validate(value)
    except (ValidationError, RecursionError):
        raise TrustError("envelope has other fields than DSSE's; ask for it again") from None
    if found.payload_type != payload_type:
        raise TrustError(
            f"envelope holds {found.payload_type[:80]!r} where {payload_type!r} belongs; "
            "ask for the right one"
        )
    signature = found.signatures[0]
    if signature.keyid != key_id(key):
        raise TrustError(
            f"envelope is signed by {signature.keyid[:40]!r}, not by {key_id(key)!r}; "
            "ask the signer which key is theirs"
        )
    payload = from_base64(found.payload, what="envelope's payload")
    check_signature(
        from_base64(signature.sig, what="envelope's signature"),
        pae(payload_type, payload),
        key=key,
        what="envelope",
    )
    return payload


def check_signature(signature: bytes, signed: bytes, *, key: bytes, what: str) -> None:
    """Verify an Ed25519 signature.

    Raises:
        TrustError: It is not `key`'s over `signed`, or `key` is no key.
    """
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, signed)
    except (InvalidSignature, ValueError):
        raise TrustError(
            f"{what} has a signature that does not verify: it was altered, or another key signed "
            "it; ask for it again"
        ) from None


def to_base64(content: bytes) -> str:
    """Return standard base64."""
    return base64.b64encode(content).decode()


def from_base64(text: str, *, what: str) -> bytes:
    """Read standard base64; a second spelling of the same bytes is refused.

    Raises:
        TrustError: `text` is not what `to_base64` writes; `what` names it.
    """
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise TrustError(f"{what} is not base64; ask for it again") from None
    if to_base64(content) != text:
        raise TrustError(f"{what} is not base64 as we write it; ask for it again")
    return content


def parse_json(text: str | bytes) -> Any:
    """Read JSON that a stranger wrote.

    Raises:
        TrustError: It is too long, not UTF-8, not JSON, too deep, or names a key twice: two
            readers could then see two contents under one signature.
    """
    if len(text) > ENVELOPE_BYTES_MAX:
        raise TrustError(f"JSON is longer than {ENVELOPE_BYTES_MAX} bytes; ask for the right file")
    try:
        plain = text if isinstance(text, str) else text.decode()
        return json.loads(plain, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        raise TrustError("not JSON, or a key stands twice in it; ask for it again") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError
    return table


def _no_constant(name: str) -> Any:
    raise ValueError(name)
