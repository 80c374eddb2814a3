"""Document: a JSON file that people carry and may read, with a signature beside its fields.

An envelope hides its payload from the eye; what leaves a site, or comes to it, should be legible to
whoever sends it. The signature is DSSE's, over the canonical JSON of all other fields.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import AfterValidator, BaseModel, ValidationError

from intramural.core.canonical import canonical_json
from intramural.core.errors import TrustError
from intramural.trust.envelope import (
    ENVELOPE_BYTES_MAX,
    check_signature,
    from_base64,
    pae,
    parse_json,
    to_base64,
)
from intramural.trust.keys import PUBLIC_BYTES

SIGNATURE = "signature"
Model = TypeVar("Model", bound=BaseModel)


def _is_public_key(text: str) -> str:
    try:
        size = len(from_base64(text, what="public key"))
    except TrustError as error:
        raise ValueError(str(error)) from None
    if size != PUBLIC_BYTES:
        raise ValueError("is not a public key")
    return text


PublicKey = Annotated[str, AfterValidator(_is_public_key)]
"""An Ed25519 public key: 32 bytes in base64."""


def sign_document(
    document_type: str, fields: Mapping[str, Any], key: Ed25519PrivateKey
) -> dict[str, Any]:
    """Return the fields with a signature over them, and over what they are, beside them."""
    signature = key.sign(pae(document_type, canonical_json(dict(fields))))
    return {**fields, SIGNATURE: to_base64(signature)}


def check_document(document_type: str, document: Mapping[str, Any], *, key: bytes) -> None:
    """Verify what `sign_document` signed.

    Raises:
        TrustError: A field was altered, or another key signed.
    """
    fields = {name: value for name, value in document.items() if name != SIGNATURE}
    try:
        signed = pae(document_type, canonical_json(fields))
        signature = from_base64(document[SIGNATURE], what="signature")
    except (ValueError, RecursionError, KeyError, TypeError):  # JSON says 1e999, and we cannot
        raise TrustError("holds what cannot have been signed; ask for it again") from None
    check_signature(signature, signed, key=key, what="file")


def read_document(path: Path, model: type[Model]) -> tuple[Model, dict[str, Any]]:
    """Read a document; its signature is checked by whoever knows the key.

    Returns:
        The document, and its fields as they stand in the file: these were signed, and a model
        may take `true` for 1.

    Raises:
        TrustError: It cannot be read, is too long, is not JSON, or has other fields.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(ENVELOPE_BYTES_MAX + 1)
    except OSError as error:
        raise TrustError(f"cannot read: {error.strerror}; check the path") from error
    try:
        fields = parse_json(content)
        return model.model_validate(fields), fields
    except (ValidationError, RecursionError) as error:
        problems = error.errors() if isinstance(error, ValidationError) else []
        keys = sorted({".".join(map(str, p["loc"]))[:60] or "(file)" for p in problems})
        raise TrustError(f"wrong in {keys}; check versions, or ask for it again") from None


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Put a file's name before the message of whatever is wrong with it."""
    try:
        yield
    except TrustError as error:
        raise TrustError(f"{path}: {error}") from error
