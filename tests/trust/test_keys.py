"""Keys: no key in a file that others can read, and fingerprints that two people can compare."""

import errno
import os
import resource
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from intramural.core.errors import TrustError
from intramural.trust.keys import (
    fingerprint,
    key_id,
    new_signing_key,
    new_tls_key,
    private_folder,
    public_bytes,
    read_public,
    read_signing_key,
    read_tls_key,
    same_fingerprint,
    tls_key_digest,
    write_key,
    write_public,
)
from tests.trust.members import openssl, signing_key

PASSPHRASE = "correct horse battery staple"
# RFC 8032, 7.1, test 1
SECRET = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
PUBLIC = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
# SHA-256 of b"abc" (FIPS 180-2) is ba7816bf 8f01cfea 414140de 5dae2223 b00361a3 96177a9c b410ff61
# f20015ad; in decimal the words end with these five digits
ABC = "32319 60650 95486 93091 11619 21116 12833 91821"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_public_bytes_are_those_of_rfc_8032() -> None:
    key = Ed25519PrivateKey.from_private_bytes(SECRET)
    assert public_bytes(key) == public_bytes(key.public_key()) == PUBLIC


def test_fingerprint_and_key_id_are_of_the_sha256() -> None:
    assert fingerprint(b"abc") == ABC
    assert key_id(b"abc") == "ed25519:ba7816bf8f01cfea"


@pytest.mark.parametrize("told", [ABC, ABC.replace(" ", ""), f" {ABC.replace(' ', '-')}\t"])
def test_a_fingerprint_may_be_typed_with_other_spaces(told: str) -> None:
    assert same_fingerprint(b"abc", told)


@pytest.mark.parametrize(
    "told", ["", ABC[:11], ABC[:-1], ABC + " 1", ABC.replace("3", "4", 1), ABC.replace("3", "३")]
)
def test_a_fingerprint_that_is_not_all_of_it_differs(told: str) -> None:
    assert not same_fingerprint(b"abc", told)


def test_new_keys_differ_and_are_of_the_kinds() -> None:
    assert public_bytes(new_signing_key()) != public_bytes(new_signing_key())
    assert tls_key_digest(new_tls_key()) != tls_key_digest(new_tls_key())
    assert new_tls_key().curve.name == "secp256r1"


def test_a_key_is_never_in_a_file_that_others_can_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.extend(mode(p) for p in tmp_path.iterdir()))
    before = os.umask(0)  # the worst there is
    try:
        write_key(tmp_path / "signing.key", new_signing_key())
    finally:
        os.umask(before)
    assert seen
    assert set(seen) == {0o600}
    assert [p.name for p in tmp_path.iterdir()] == ["signing.key"]
    assert mode(tmp_path / "signing.key") == 0o600


def test_a_key_reads_back(tmp_path: Path) -> None:
    signing, tls = new_signing_key(), new_tls_key()
    write_key(tmp_path / "a", signing)
    write_key(tmp_path / "b", tls, passphrase=PASSPHRASE)
    assert public_bytes(read_signing_key(tmp_path / "a")) == public_bytes(signing)
    # a passphrase in the environment does not stand in the way of a key without
    assert public_bytes(read_signing_key(tmp_path / "a", passphrase="x")) == public_bytes(signing)
    assert tls_key_digest(read_tls_key(tmp_path / "b", passphrase=PASSPHRASE)) == tls_key_digest(
        tls
    )


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "signing.key"
    write_key(path, new_signing_key())
    content = path.read_bytes()
    with pytest.raises(TrustError, match=r"signing\.key: is there already.*move it away"):
        write_key(path, new_signing_key())
    assert path.read_bytes() == content
    assert len(list(tmp_path.iterdir())) == 1


def test_a_link_that_leads_nowhere_is_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "signing.key"
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TrustError, match="is there already"):
        write_key(path, new_signing_key())
    assert not (tmp_path / "elsewhere").exists()


def test_what_a_crash_left_is_written_anew(tmp_path: Path) -> None:
    (tmp_path / ".tls.key.partial").write_text("half a key")
    write_key(tmp_path / "tls.key", new_tls_key())
    read_tls_key(tmp_path / "tls.key")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_leaves_no_half_key(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        with pytest.raises(TrustError, match=r"tls\.key: cannot write: File too large"):
            write_key(tmp_path / "tls.key", new_tls_key())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o777])
def test_a_key_that_others_can_reach_is_refused_by_name(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "signing.key"
    write_key(path, new_signing_key())
    path.chmod(bits)
    with pytest.raises(TrustError, match=rf"{path}: mode {bits:04o} .*`chmod 600 {path}`"):
        read_signing_key(path)
    path.chmod(0o400)
    read_signing_key(path)


def test_a_key_with_a_passphrase_opens_with_it_alone(tmp_path: Path) -> None:
    path = tmp_path / "tls.key"
    write_key(path, new_tls_key(), passphrase=PASSPHRASE)
    path.chmod(0o644)  # what it protects itself, the mode need not
    read_tls_key(path, passphrase=PASSPHRASE)
    with pytest.raises(TrustError, match="has a passphrase; give --passphrase, or set INTRA"):
        read_tls_key(path)
    with pytest.raises(TrustError, match="passphrase is wrong, or the file is damaged"):
        read_tls_key(path, passphrase=PASSPHRASE + " ")


def test_openssl_reads_what_was_written(tmp_path: Path) -> None:
    write_key(tmp_path / "a", new_signing_key())
    write_key(tmp_path / "b", new_tls_key(), passphrase=PASSPHRASE)
    assert "ED25519" in openssl("pkey", "-in", tmp_path / "a", "-noout", "-text")
    words = ("pkey", "-in", tmp_path / "b", "-noout", "-text", "-passin")
    assert "prime256v1" in openssl(*words, f"pass:{PASSPHRASE}")
    openssl(*words, "pass:another", fails=True)


def test_a_short_passphrase_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(TrustError, match="shorter than 15 characters"):
        write_key(tmp_path / "tls.key", new_tls_key(), passphrase="x" * 14)
    assert list(tmp_path.iterdir()) == []
    write_key(tmp_path / "tls.key", new_tls_key(), passphrase="x" * 15)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    path.chmod(0o600)
    return path


def pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def test_other_kinds_of_keys_are_refused(tmp_path: Path) -> None:
    write_key(tmp_path / "signing.key", signing_key("a"))
    write_key(tmp_path / "tls.key", new_tls_key())
    p384 = written(tmp_path / "p384", pem(ec.generate_private_key(ec.SECP384R1())))
    rsa_ = written(tmp_path / "rsa", pem(rsa.generate_private_key(65537, 2048)))
    for path in (tmp_path / "tls.key", p384, rsa_):
        with pytest.raises(TrustError, match="is not an Ed25519 key"):
            read_signing_key(path)
    for path in (tmp_path / "signing.key", p384, rsa_):
        with pytest.raises(TrustError, match="is not an EC P-256 key"):
            read_tls_key(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\xff" * 100,
        b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n",
    ],
)
def test_what_is_no_key_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path / "signing.key", content)
    with pytest.raises(TrustError, match=rf"^{path}: .*restore it"):
        read_signing_key(path, passphrase=PASSPHRASE)


def test_a_missing_key_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TrustError, match="none: cannot read: No such file"):
        read_signing_key(tmp_path / "none")
    with pytest.raises(TrustError, match="cannot read: Is a directory"):
        read_tls_key(tmp_path)


def test_a_private_folder_is_closed_also_when_it_was_open(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        private_folder(tmp_path / "deep" / "keys")
    finally:
        os.umask(before)
    assert mode(tmp_path / "deep" / "keys") == 0o700
    (tmp_path / "open").mkdir(mode=0o755)
    private_folder(tmp_path / "open")
    assert mode(tmp_path / "open") == 0o700
    (tmp_path / "file").write_text("")
    with pytest.raises(TrustError, match=f"file: cannot make: {os.strerror(errno.EEXIST)}"):
        private_folder(tmp_path / "file")


def test_a_public_key_reads_back_and_nothing_else_does(tmp_path: Path) -> None:
    path = tmp_path / "signing.pub"
    write_public(path, PUBLIC)
    assert read_public(path) == PUBLIC
    for content in (b"", b"AAAA\n", path.read_bytes()[:-3], b"\xff" * 44, path.read_bytes() * 2):
        path.write_bytes(content)
        with pytest.raises(TrustError, match=r"signing\.pub: is not a public key"):
            read_public(path)
    with pytest.raises(TrustError, match="cannot read"):
        read_public(tmp_path / "none")
