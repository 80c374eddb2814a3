"""Founding: a coordinator's folder with its own keys and certificates, and these renewed."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509 import Certificate

from intramural.core.config import load_config
from intramural.core.errors import ConfigError, TrustError
from intramural.core.files import write_atomic
from intramural.core.journal import utc_now
from intramural.server.folder import CoordinatorFolder
from intramural.server.register import Register, create_register, held, open_register
from intramural.server.settings import (
    COORDINATOR_FILE,
    Coordinator,
    CoordinatorConfig,
    load_coordinator,
)
from intramural.server.starter import coordinator_toml, federation_toml
from intramural.trust.certificates import (
    Authority,
    certificate_digest,
    issue_server_certificate,
    new_authority,
    read_certificate,
    tls_key_of,
    to_pem,
)
from intramural.trust.document import named
from intramural.trust.keys import (
    new_signing_key,
    new_tls_key,
    private_folder,
    public_bytes,
    read_signing_key,
    read_tls_key,
    tls_key_digest,
    write_key,
    write_public,
)

Clock = Callable[[], datetime]


def init_coordinator(
    folder: Path,
    settings: Coordinator,
    *,
    passphrase: str | None = None,
    now: Clock = utc_now,
) -> bytes:
    """Make a coordinator: keys, certificates, settings and an empty roster.

    Goes on where a crash left an earlier call; nothing that is there is overwritten.

    Args:
        folder: Where to.
        settings: What goes into coordinator.toml.
        passphrase: Encrypts the three keys; None: their permissions alone protect them.
        now: The clock.

    Returns:
        The coordinator's public signing key, whose fingerprint the sites compare.

    Raises:
        TrustError: There is a coordinator already, or a key cannot be written.
        ConfigError: A coordinator.toml that is there says something else.
    """
    place = CoordinatorFolder(root=folder)
    with held(place):
        if place.roster.exists():
            raise TrustError(
                f"{folder}: is a coordinator's already; name another folder, or edit its "
                "coordinator.toml"
            )
        return _found(place, settings, passphrase, now)


def _found(
    place: CoordinatorFolder, settings: Coordinator, passphrase: str | None, now: Clock
) -> bytes:
    private_folder(place.keys)
    _settle(place, settings)
    signing = _signing_key(place, passphrase)
    write_public(place.signing_public, public_bytes(signing))
    authority_key = _tls_key(place.authority_key, passphrase)
    tls_key = _tls_key(place.tls_key, passphrase)
    if place.authority.exists():
        authority = load_authority(place, passphrase)
    else:
        authority = new_authority(settings.name, authority_key, now=now())
        write_atomic(place.authority, to_pem(authority.certificate).encode())
    own = _write_certificate(place, authority, tls_key, settings, now())
    create_register(
        place,
        federation=settings.name,
        key=signing,
        now=now,
        authority=certificate_digest(authority.certificate),
        certificate=certificate_digest(own),
    )
    return public_bytes(signing)


def _settle(place: CoordinatorFolder, settings: Coordinator) -> None:
    path = place.root / COORDINATOR_FILE
    if not path.exists():
        write_atomic(path, coordinator_toml(settings).encode())
    elif load_config(path, CoordinatorConfig).coordinator != settings:
        raise ConfigError(f"{path}: says something else than the options; move it away")
    example = place.root / "federation.toml"
    if not example.exists():
        write_atomic(example, federation_toml(settings.name).encode())


def _signing_key(place: CoordinatorFolder, passphrase: str | None) -> Ed25519PrivateKey:
    if not place.signing_key.exists():
        write_key(place.signing_key, new_signing_key(), passphrase=passphrase)
    return read_signing_key(place.signing_key, passphrase=passphrase)


def _tls_key(path: Path, passphrase: str | None) -> EllipticCurvePrivateKey:
    if not path.exists():
        write_key(path, new_tls_key(), passphrase=passphrase)
    return read_tls_key(path, passphrase=passphrase)


def load_authority(place: CoordinatorFolder, passphrase: str | None) -> Authority:
    """Read the authority's certificate and key.

    Raises:
        TrustError: One of them cannot be read, or they do not belong together.
    """
    key = read_tls_key(place.authority_key, passphrase=passphrase)
    with named(place.authority):
        try:
            certificate = read_certificate(place.authority.read_text(encoding="ascii"))
        except (OSError, ValueError) as error:
            raise TrustError(f"cannot read: {error}; restore it") from error
        if tls_key_digest(tls_key_of(certificate)) != tls_key_digest(key):
            raise TrustError("is not keys/authority.key's certificate; restore both")
    return Authority(certificate=certificate, key=key)


def _write_certificate(
    place: CoordinatorFolder,
    authority: Authority,
    key: EllipticCurvePrivateKey,
    settings: Coordinator,
    now: datetime,
) -> Certificate:
    certificate = issue_server_certificate(
        authority, key.public_key(), federation=settings.name, host=settings.host, now=now
    )
    write_atomic(place.tls, to_pem(certificate).encode())
    return certificate


def renew_coordinator(
    folder: Path, *, passphrase: str | None = None, now: Clock = utc_now
) -> Certificate:
    """Issue the gate's certificate anew, for the host that coordinator.toml names now.

    Args:
        folder: The coordinator's folder.
        passphrase: Of its keys.
        now: The clock.

    Returns:
        The certificate; the gate takes it at its next start.

    Raises:
        TrustError: A key or the authority cannot be read, or the authority's time is over.
        ConfigError: coordinator.toml is wrong.
    """
    with open_register(folder, now=now, passphrase=passphrase) as register:
        place, settings = register.place, settings_of(register)
        authority = load_authority(place, passphrase)
        key = read_tls_key(place.tls_key, passphrase=passphrase)
        certificate = _write_certificate(place, authority, key, settings, now())
        digest = certificate_digest(certificate)
        register.journal.append("coordinator-renewed", certificate=digest, host=settings.host)
    return certificate


def settings_of(register: Register) -> Coordinator:
    """Return coordinator.toml, which must be of the roster's federation."""
    settings = load_coordinator(register.place.root)
    if settings.name != register.roster.federation:
        raise ConfigError(
            f"{register.place.root / COORDINATOR_FILE}: coordinator.name: is fixed as "
            f"{register.roster.federation!r}; set it back, or begin a new folder"
        )
    return settings
