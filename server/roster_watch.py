"""RosterWatch: which site a certificate lets in, as roster.json says at this moment."""

import os
from pathlib import Path

from intramural.core.errors import TrustError
from intramural.trust.alerts import Alerts
from intramural.trust.keys import read_public
from intramural.trust.roster import Roster, load_roster


class RosterWatch:
    """Reads the roster anew whenever its file changed.

    Guarantees:
        A site is let in from the first request after its enrolment stands in roster.json, and not
        any more from the first after its revocation does. A roster that does not verify, or is
        older than one seen before, changes nothing but is told to the operator.
    """

    def __init__(self, path: Path, *, public: Path, alerts: Alerts) -> None:
        """Read the roster.

        Args:
            path: roster.json.
            public: File of the key that verifies it.
            alerts: Told when a later roster cannot be used.

        Raises:
            TrustError: One of the two cannot be read, or the roster does not verify.
        """
        self._path, self._alerts = path, alerts
        self._key = read_public(public)
        self._looks = _looks(path)
        self._roster: Roster = load_roster(path, key=self._key)

    def site_of(self, digest: str) -> str | None:
        """Return the site of a certificate's digest; None: unknown or revoked."""
        looks = _looks(self._path)
        if looks != self._looks:
            self._looks = looks
            try:
                self._roster = load_roster(
                    self._path, key=self._key, version_min=self._roster.version
                )
            except TrustError as error:
                self._alerts.tell("roster-unusable", why=str(error))
        return self._roster.site_of_certificate(digest)


def _looks(path: Path) -> tuple[int, ...]:
    """Return what changes when a file is replaced."""
    try:
        stat = os.stat(path)
    except OSError:
        return ()
    return (stat.st_ino, stat.st_size, stat.st_mtime_ns)
