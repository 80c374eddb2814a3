"""Seal: a signature on one message of a round, by the coordinator or by one site.

The header is canonical JSON that names run, round, manifest and kind, so that a seal fits no other
message; the vector is signed by its digest, so that gigabytes are read once and copied never.
"""

import hashlib
from collections.abc import Callable
from typing import Annotated

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from intramural.core.canonical import canonical_json
from intramural.core.errors import TrustError
from intramural.trust.envelope import check_signature, from_base64, to_base64
from intramural.trust.keys import key_id, public_bytes

CONTEXT = b"intramural-seal-v1"
COORDINATOR = "coordinator"
SEAL_CHARACTERS_MAX = 1000

Sealer = Callable[[bytes, memoryview | bytes | None], str]
"""Takes a header's and a vector's bytes and returns the seal's text."""


class _Seal(BaseModel):
    """What a seal's text holds."""

    model_config = ConfigDict(extra="forbid", strict=True)

    key: Annotated[str, StringConstraints(max_length=40)]
    role: Annotated[str, StringConstraints(max_length=100)]
    signature: Annotated[str, StringConstraints(max_length=100)]


def site_role(name: str) -> str:
    """Return the role in which a site seals."""
    return f"site:{name}"


def signed_bytes(role: str, header: bytes, vector: memoryview | bytes | None) -> bytes:
    """Return what a seal signs: each part with its length, as DSSE does.

    A message without a vector has an empty last part; one with an empty vector has 32 bytes there.
    """
    parts = (
        CONTEXT,
        role.encode(),
        hashlib.sha256(header).digest(),
        b"" if vector is None else hashlib.sha256(vector).digest(),
    )
    return b" ".join(b"%d %b" % (len(part), part) for part in parts)


def sealer(role: str, key: Ed25519PrivateKey) -> Sealer:
    """Return a function that seals messages.

    Args:
        role: 'coordinator', or 'site:NAME' as `site_role` makes it.
        key: The role's signing key.
    """
    name = key_id(public_bytes(key))

    def seal(header: bytes, vector: memoryview | bytes | None) -> str:
        signature = to_base64(key.sign(signed_bytes(role, header, vector)))
        return canonical_json({"key": name, "role": role, "signature": signature}).decode()

    return seal


def check_seal(
    seal: str | None,
    header: bytes,
    vector: memoryview | bytes | None,
    *,
    role: str,
    public: bytes,
) -> None:
    """Verify a message's seal.

    Args:
        seal: The seal's text; None when the message has none.
        header: The header's bytes as they came, not written anew.
        vector: The vector's bytes as they came; None when there is no vector.
        role: Who must have sealed it.
        public: That role's public key, 32 raw bytes.

    Raises:
        TrustError: There is no seal, it is malformed, of another role or key, or over another
            header or vector.

    Guarantees:
        The owner of `public` sealed exactly this header with exactly this vector, in this role.
        A seal does not tell a message from its own repetition: whoever reads the header compares
        its run and round with what is due.
    """
    if seal is None:
        raise TrustError(f"message has no seal of {role!r}; join the federation on both ends")
    if len(seal) > SEAL_CHARACTERS_MAX:
        raise TrustError(f"seal is longer than {SEAL_CHARACTERS_MAX} characters; check versions")
    try:
        found = _Seal.model_validate_json(seal)
    except ValidationError:
        raise TrustError("seal is malformed; check that both ends have equal versions") from None
    if canonical_json(found.model_dump()).decode() != seal:
        raise TrustError("seal is not canonical JSON; check that both ends have equal versions")
    if found.role != role:
        raise TrustError(f"seal is of {found.role!r}, expected {role!r}; check who sent it")
    if found.key != key_id(public):
        raise TrustError(
            f"seal of {role!r} is by key {found.key!r}, expected {key_id(public)!r}; after a "
            "rotation, join again with the new kit"
        )
    signature = from_base64(found.signature, what="seal's signature")
    check_signature(
        signature, signed_bytes(role, header, vector), key=public, what=f"seal of {role!r}"
    )
