"""Enrolment at a site: its keys, its request, and the kit that makes it a member.

Private keys are made here and never leave. New keys wait in `trust/next/` until the kit that was
issued for them is joined with; the old ones serve until then.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from intramural.client.starter import site_toml
from intramural.core.config import check_config, read_table
from intramural.core.errors import ConfigError, TrustError
from intramural.core.files import Held, exclusive, sync_folder, write_atomic
from intramural.core.site import SiteIdentity
from intramural.trust.certificates import tls_key_of
from intramural.trust.keys import (
    new_signing_key,
    new_tls_key,
    private_folder,
    public_bytes,
    read_signing_key,
    read_tls_key,
    tls_key_digest,
    write_key,
)
from intramural.trust.kit import Kit, SiteRequest, make_request, read_kit, read_request

TLS_KEY, SIGNING_KEY = "tls.key", "signing.key"


@dataclass(frozen=True, kw_only=True)
class SiteFolder:
    """Where everything of a site's membership lies."""

    root: Path
    """The folder of site.toml."""

    @property
    def trust(self) -> Path:
        """Keys, request, and what came with the kit."""
        return self.root / "trust"

    @property
    def next(self) -> Path:
        """Keys and request that no kit was joined with yet, after `client rotate`."""
        return self.trust / "next"

    @property
    def kit(self) -> Path:
        """The kit; written last, so that it is there once all the rest is."""
        return self.trust / "kit.json"

    @property
    def certificate(self) -> Path:
        """The site's certificate."""
        return self.trust / "tls.pem"

    @property
    def authority(self) -> Path:
        """The federation's authority."""
        return self.trust / "authority.pem"

    @property
    def tls_key(self) -> Path:
        """Of the site's certificate."""
        return self.trust / TLS_KEY

    @property
    def signing_key(self) -> Path:
        """Seals the site's messages."""
        return self.trust / SIGNING_KEY

    @property
    def restart(self) -> Path:
        """Made by whoever wants the SuperNode to be started anew; see `Child.restart`."""
        return self.root / "state" / "supernode.restart"


def init_site(folder: Path, *, name: str, passphrase: str | None = None) -> SiteRequest:
    """Make a site's keys and its request, and a site.toml to edit if there is none.

    Called again it keeps the keys and writes the request anew.

    Args:
        folder: Where site.toml lies, or will.
        name: The site's name.
        passphrase: Encrypts both keys; None: their permissions alone protect them.

    Returns:
        The request, as written to trust/request.json.

    Raises:
        ConfigError: The name is none, or site.toml has another one.
        TrustError: The folder is another site's, or a key cannot be read or written.
    """
    check_config({"name": name}, SiteIdentity, source="client init")
    place = SiteFolder(root=folder)
    settings = folder / "site.toml"
    if settings.exists():
        found = read_table(settings).get("site")
        if not isinstance(found, dict) or found.get("name") != name:
            raise ConfigError(f"{settings}: site.name: is not {name!r}; use one name in both")
    with _held(place):
        request = place.trust / "request.json"
        if request.exists() and (old := read_request(request).site) != name:
            raise TrustError(f"{request}: is of site {old!r}; name another folder")
        made = _make_request(place.trust, name, passphrase)
        if not settings.exists():
            write_atomic(settings, site_toml(name).encode())
    return made


def rotate_site(folder: Path, *, passphrase: str | None = None) -> SiteRequest:
    """Make new keys beside a member's old ones, and a request for them.

    Called again before the new kit came it keeps the new keys.

    Args:
        folder: Where site.toml lies.
        passphrase: Encrypts both keys.

    Returns:
        The request, as written to trust/next/request.json.

    Raises:
        TrustError: The site has no keys yet, or one cannot be read or written.
    """
    place = SiteFolder(root=folder)
    request = place.trust / "request.json"
    if not request.exists():
        raise TrustError(f"{request}: is not there; run `intramural client init` first")
    with _held(place):
        return _make_request(place.next, read_request(request).site, passphrase)


def _make_request(folder: Path, name: str, passphrase: str | None) -> SiteRequest:
    private_folder(folder)
    tls_path, signing_path = folder / TLS_KEY, folder / SIGNING_KEY
    if not tls_path.exists():
        write_key(tls_path, new_tls_key(), passphrase=passphrase)
    if not signing_path.exists():
        write_key(signing_path, new_signing_key(), passphrase=passphrase)
    request = make_request(
        name,
        signing_key=read_signing_key(signing_path, passphrase=passphrase),
        tls_key=read_tls_key(tls_path, passphrase=passphrase),
    )
    write_atomic(folder / "request.json", _text(request))
    return request


def _text(document: SiteRequest | Kit) -> bytes:
    return (document.model_dump_json(indent=2) + "\n").encode()


@contextmanager
def _held(place: SiteFolder) -> Iterator[None]:
    private_folder(place.trust)
    try:
        with exclusive(place.trust / ".lock"):
            yield
    except Held:
        raise ConfigError(f"{place.trust}: another command is at work there; try again") from None
    except OSError as error:
        raise ConfigError(
            f"{error.filename or place.trust}: {error.strerror}; mend that, and run again"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Joining:
    """A kit that fits a site, before it is installed."""

    kit: Kit
    keys: tuple[Path, Path]
    """Where the kit's TLS key and signing key lie: in trust/ or in trust/next/."""
    coordinator: Literal["new", "known", "changed"]
    """Whether the coordinator's key is that of the kit in use; 'new': no kit can be read."""


def examine_kit(
    folder: Path, kit_path: Path, *, now: datetime, passphrase: str | None = None
) -> Joining:
    """Read a kit and check that it is for this site and its keys; nothing is changed.

    Args:
        folder: Where site.toml lies.
        kit_path: The kit, as it came.
        now: Aware.
        passphrase: Of the site's keys.

    Returns:
        What `join` takes, after somebody compared the coordinator's fingerprint by voice.

    Raises:
        TrustError: The kit is malformed or altered, for another site or other keys, out of its
            time, or older than the kit in use.
    """
    place = SiteFolder(root=folder)
    request = place.trust / "request.json"
    if not request.exists():
        raise TrustError(f"{request}: is not there; run `intramural client init` first")
    kit, name = read_kit(kit_path), read_request(request).site
    kit.check_times(now)
    if kit.site != name:
        raise TrustError(
            f"{kit_path}: is of site {kit.site!r}, and this is {name!r}; ask for the right kit"
        )
    keys = _keys_of(place, kit, passphrase)
    try:
        before = read_kit(place.kit)
    except TrustError:  # none yet, or damaged: a person vouches for the coordinator anew
        return Joining(kit=kit, keys=keys, coordinator="new")
    if before.coordinator_key != kit.coordinator_key:
        return Joining(kit=kit, keys=keys, coordinator="changed")
    have, got = before.open_roster().version, kit.open_roster().version
    if got < have:
        raise TrustError(
            f"{kit_path}: is older than the kit in use, of roster version {got} before {have}; "
            "ask for a new one"
        )
    return Joining(kit=kit, keys=keys, coordinator="known")


def _keys_of(place: SiteFolder, kit: Kit, passphrase: str | None) -> tuple[Path, Path]:
    """Return where the two private keys lie whose public halves a kit names."""

    def tls(path: Path) -> str:
        return tls_key_digest(read_tls_key(path, passphrase=passphrase))

    def signing(path: Path) -> bytes:
        return public_bytes(read_signing_key(path, passphrase=passphrase))

    wanted = tls_key_digest(tls_key_of(kit.site_certificate()))
    return (
        _find(place, TLS_KEY, tls, wanted),
        _find(place, SIGNING_KEY, signing, kit.open_roster().signing_key_of(kit.site)),
    )


def _find(place: SiteFolder, name: str, read: Callable[[Path], object], wanted: object) -> Path:
    problem = TrustError(
        f"kit is for another key than {place.trust / name}; send trust/request.json, or after a "
        "rotation trust/next/request.json, to the coordinator for a new kit"
    )
    for path in (place.next / name, place.trust / name):
        if path.exists():
            try:
                if read(path) == wanted:
                    return path
            except TrustError as error:  # perhaps of the other keys, which had another passphrase
                problem = error
    raise problem


def join(folder: Path, joining: Joining) -> None:
    """Install a kit, and the keys it was issued for if they are new.

    Args:
        folder: Where site.toml lies.
        joining: What `examine_kit` found in it; the coordinator's fingerprint was compared.

    Raises:
        ConfigError: Another command holds the folder.

    Guarantees:
        Each file is replaced as a whole, the keys first and kit.json last. After a crash in
        between `check_site` refuses, and joining again with the same kit finishes the work.
    """
    place, kit = SiteFolder(root=folder), joining.kit
    with _held(place):
        for path in joining.keys:
            os.replace(path, place.trust / path.name)
        waiting = place.next / "request.json"
        if waiting.exists() and not any((place.next / n).exists() for n in (TLS_KEY, SIGNING_KEY)):
            os.replace(waiting, place.trust / waiting.name)
            place.next.rmdir()
        sync_folder(place.trust)
        write_atomic(place.certificate, kit.certificate.encode())
        write_atomic(place.authority, kit.authority.encode())
        write_atomic(place.kit, _text(kit))


def check_site(folder: Path, *, now: datetime, passphrase: str | None = None) -> Kit:
    """Return a member's kit, after a look at everything that stands beside it.

    Args:
        folder: Where site.toml lies.
        now: Aware.
        passphrase: Of the site's keys.

    Raises:
        TrustError: The site has not joined, a joining was not finished, a file was altered, or a
            certificate is out of its time.
    """
    place = SiteFolder(root=folder)
    if not place.kit.exists():
        raise TrustError(f"{place.kit}: is not there; run `intramural client join` with your kit")
    kit = read_kit(place.kit)
    kit.check_times(now)
    keys = _keys_of(place, kit, passphrase)
    files = {place.certificate: kit.certificate, place.authority: kit.authority}
    fits = all(path.is_file() and path.read_bytes() == pem.encode() for path, pem in files.items())
    if keys != (place.tls_key, place.signing_key) or not fits:
        raise TrustError(
            f"{place.trust}: the last joining was not finished; run `intramural client join` with "
            "the kit again"
        )
    return kit
