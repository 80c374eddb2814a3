"""Seals of the coordinator: what it signs, and by whose key a reply must be signed."""

from dataclasses import replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from intramural.core.errors import TrustError
from intramural.core.letter import Letter
from intramural.trust.keys import public_bytes
from intramural.trust.roster import Roster, load_roster
from intramural.trust.seal import COORDINATOR, check_seal, sealer, site_role


class CoordinatorSeals:
    """Seals requests, and checks replies against the roster as it stands at that moment."""

    def __init__(self, key: Ed25519PrivateKey, roster: Path) -> None:
        """Sign with `key`, which also signed the roster in the file.

        Raises:
            TrustError: The roster cannot be read.
        """
        self._seal = sealer(COORDINATOR, key)
        self._public = public_bytes(key)
        self._path = roster
        self._read_at = -1
        self._version = 0
        self._roster = self._current()

    def seal(self, letter: Letter) -> Letter:
        """Return the letter, signed by the coordinator."""
        return replace(letter, seal=self._seal(letter.header.encode(), letter.vector))

    def check(self, letter: Letter, *, site: str) -> None:
        """Do nothing if the letter is signed by this site's key, as enrolled.

        Raises:
            TrustError: It is not, or the site is unknown or revoked.
        """
        key = self._current().signing_key_of(site)
        if key is None:
            raise TrustError(f"site {site[:63]!r} is not enrolled, or was revoked; enrol it")
        check_seal(
            letter.seal, letter.header.encode(), letter.vector, role=site_role(site), public=key
        )

    def _current(self) -> Roster:
        """Return the roster, read anew when its file changed: a revocation holds at once."""
        changed = self._path.stat().st_mtime_ns
        if changed != self._read_at:
            self._roster = load_roster(self._path, key=self._public, version_min=self._version)
            self._version, self._read_at = self._roster.version, changed
        return self._roster
