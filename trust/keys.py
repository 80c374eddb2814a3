"""Keys: made, written so that their owner alone reads them, and told to people as fingerprints.

Two kinds: Ed25519 keys sign envelopes, rosters and messages; EC P-256 keys stand behind the
certificates of TLS, which Ed25519 does not fit in every library.
"""

import base64
import hashlib
import os
import stat
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as generate_ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from intramural.core.canonical import digest_bytes
from intramural.core.errors import TrustError
from intramural.core.files import make_folder, sync_folder, write_atomic

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
KEY_FILE_BYTES_MAX = 1 << 16
PASSPHRASE = "INTRAMURAL_PASSPHRASE"
"""Environment variable that holds the passphrase of the keys, for who is not asked."""
PASSPHRASE_CHARACTERS_MIN = 15
"""PKCS8 stretches a passphrase by 2048 rounds only, so that length has to do it."""
PUBLIC_BYTES = 32
FINGERPRINT_GROUPS, GROUP_DIGITS = 8, 5

PrivateKey = Ed25519PrivateKey | EllipticCurvePrivateKey


def new_signing_key() -> Ed25519PrivateKey:
    """Return a new key for signatures, from the system's random generator."""
    return Ed25519PrivateKey.generate()


def new_tls_key() -> EllipticCurvePrivateKey:
    """Return a new key for a certificate, from the system's random generator."""
    return generate_ec(SECP256R1())


def private_folder(folder: Path) -> None:
    """Make a folder that its owner alone can open; one that is there is closed to others.

    Raises:
        TrustError: The folder cannot be made or closed.
    """
    try:
        make_folder(folder.parent)
        folder.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)
        folder.chmod(PRIVATE_FOLDER)
        sync_folder(folder.parent)
    except OSError as error:
        raise TrustError(
            f"{folder}: cannot make: {error.strerror}; name a folder of your own"
        ) from error


def write_key(path: Path, key: PrivateKey, *, passphrase: str | None = None) -> None:
    """Write a private key as PKCS8 PEM, readable by its owner alone.

    Args:
        path: The file; one that is there is never overwritten.
        key: What to write.
        passphrase: Encrypts the file; None: the file's permissions alone protect it.

    Raises:
        TrustError: The file is there, the passphrase is short, or the disk refuses.

    Guarantees:
        No byte of the key is ever in a file that others can read: the file is created with mode
        0600 under a name of its own and linked to its place when whole. A crash leaves the whole
        key or none.
    """
    if passphrase is not None and len(passphrase) < PASSPHRASE_CHARACTERS_MIN:
        raise TrustError(
            f"passphrase for {path} is shorter than {PASSPHRASE_CHARACTERS_MIN} characters; "
            "take five words drawn by chance"
        )
    content = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, _encryption(passphrase))
    beside = path.with_name(f".{path.name}.partial")
    try:
        beside.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with open(os.open(beside, flags, PRIVATE_FILE), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(beside, path)  # a rename would overwrite
        sync_folder(path.parent)
    except FileExistsError:
        raise TrustError(
            f"{path}: is there already, and a key is never overwritten; move it away"
        ) from None
    except OSError as error:
        raise TrustError(f"{path}: cannot write: {error.strerror}; mend that") from error
    finally:
        beside.unlink(missing_ok=True)


def _encryption(passphrase: str | None) -> KeySerializationEncryption:
    if passphrase is None:
        return NoEncryption()
    return BestAvailableEncryption(passphrase.encode())


def read_signing_key(path: Path, *, passphrase: str | None = None) -> Ed25519PrivateKey:
    """Read an Ed25519 key.

    Args:
        path: A PEM file.
        passphrase: Needed when the file is encrypted, and not looked at otherwise.

    Raises:
        TrustError: The file is missing, holds no such key, is encrypted and the passphrase is
            missing or wrong, or is not encrypted and readable by others.
    """
    key = _read_key(path, passphrase)
    if not isinstance(key, Ed25519PrivateKey):
        raise TrustError(f"{path}: is not an Ed25519 key; restore signing.key")
    return key


def read_tls_key(path: Path, *, passphrase: str | None = None) -> EllipticCurvePrivateKey:
    """Read an EC P-256 key; see `read_signing_key` for arguments and errors."""
    key = _read_key(path, passphrase)
    if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP256R1):
        raise TrustError(f"{path}: is not an EC P-256 key; restore it from your copy")
    return key


def _read_key(path: Path, passphrase: str | None) -> object:
    try:
        with open(path, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(KEY_FILE_BYTES_MAX)
    except OSError as error:
        raise TrustError(
            f"{path}: cannot read: {error.strerror}; restore it, or run init"
        ) from error
    encrypted = b"BEGIN ENCRYPTED PRIVATE KEY" in content
    if not encrypted and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise TrustError(
            f"{path}: mode {mode:04o} lets others at a key without passphrase; "
            f"run `chmod 600 {path}`, and make new keys if others were on this machine"
        )
    if encrypted and passphrase is None:
        raise TrustError(f"{path}: has a passphrase; give --passphrase, or set {PASSPHRASE}")
    try:
        return load_pem_private_key(content, passphrase.encode() if encrypted else None)  # type: ignore[union-attr]
    except (ValueError, TypeError, UnsupportedAlgorithm):
        what = "the passphrase is wrong, or the file is damaged" if encrypted else "is no key"
        raise TrustError(f"{path}: {what}; try again, or restore it from your copy") from None


def public_bytes(key: Ed25519PrivateKey | Ed25519PublicKey) -> bytes:
    """Return the 32 raw bytes of an Ed25519 key's public half."""
    public = key.public_key() if isinstance(key, Ed25519PrivateKey) else key
    return public.public_bytes(Encoding.Raw, PublicFormat.Raw)


def write_public(path: Path, public: bytes) -> None:
    """Write an Ed25519 public key as one line of base64, for those who must not read the other."""
    write_atomic(path, base64.b64encode(public) + b"\n")


def read_public(path: Path) -> bytes:
    """Read what `write_public` wrote.

    Raises:
        TrustError: The file is missing or holds something else.
    """
    try:
        public = base64.b64decode(path.read_bytes().removesuffix(b"\n"), validate=True)
    except OSError as error:
        raise TrustError(
            f"{path}: cannot read: {error.strerror}; restore it, or run init first"
        ) from error
    except ValueError:
        public = b""
    if len(public) != PUBLIC_BYTES:
        raise TrustError(f"{path}: is not a public key in base64; restore it")
    return public


def tls_key_digest(key: EllipticCurvePrivateKey | EllipticCurvePublicKey) -> str:
    """Return the digest of a TLS key's public half (its SubjectPublicKeyInfo)."""
    public = key.public_key() if isinstance(key, EllipticCurvePrivateKey) else key
    return digest_bytes(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def key_id(public: bytes) -> str:
    """Return a short name of a public key, for messages; it identifies and proves nothing."""
    return "ed25519:" + hashlib.sha256(public).hexdigest()[:16]


def fingerprint(public: bytes) -> str:
    """Return a public key as 8 groups of 5 digits, to read aloud.

    Each group is four bytes of the key's SHA-256, big-endian, modulo 100000.

    Guarantees:
        Whoever wants another key with the same 8 groups tries some 2^132 keys; with the same two
        groups, some 2^33, which takes hours. So compare all of them.
    """
    digest = hashlib.sha256(public).digest()
    words = [digest[at : at + 4] for at in range(0, 4 * FINGERPRINT_GROUPS, 4)]
    return " ".join(
        f"{int.from_bytes(word, 'big') % 10**GROUP_DIGITS:0{GROUP_DIGITS}d}" for word in words
    )


def same_fingerprint(public: bytes, told: str) -> bool:
    """Say whether `told`, as somebody typed it, is all of a key's fingerprint."""
    digits = "".join(character for character in told if character not in " \t-.,")
    return digits == fingerprint(public).replace(" ", "")
