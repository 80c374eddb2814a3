"""Endings: which certificates at a gate end soon, told before they do."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from intramural.trust.alerts import Alerts
from intramural.trust.certificates import ends_of, read_certificate

DAYS_WARN = 30
"""Days before a certificate's end at which people are told."""
AGAIN = timedelta(days=1)
"""An end that comes is told of so often."""


class Endings:
    """Remembers when certificates end, and tells of those that do within `DAYS_WARN` days.

    A certificate that has ended lets nobody in: TLS refuses it, before anybody has a name.
    """

    def __init__(self, own: Mapping[str, Path], *, alerts: Alerts) -> None:
        """Watch a gate's own certificates.

        Args:
            own: Files in PEM, by what to call them.
            alerts: Told; also tells the time.

        Raises:
            TrustError: A file is no certificate.
        """
        self._alerts = alerts
        self._held: dict[str, tuple[bytes, datetime]] = {}
        self._told: dict[str, datetime] = {}
        for name, path in own.items():
            certificate = read_certificate(path.read_text(encoding="ascii"), what=name)
            self._held[name] = (b"", certificate.not_valid_after_utc)

    def watch(self, peer: str, certificate: bytes) -> None:
        """Watch the certificate that a peer used last.

        Args:
            peer: Whose; memory grows with the peers named.
            certificate: DER, verified.
        """
        held = self._held.get(peer)
        if held is None or held[0] != certificate:
            self._held[peer] = (certificate, ends_of(certificate))
            self._told.pop(peer, None)

    def look(self) -> dict[str, Any]:
        """Tell of what ends soon, once a day; return when each one ends, as JSON has it."""
        now = self._alerts.now()
        for name, (_, end) in self._held.items():
            soon = (end - now).days < DAYS_WARN
            if soon and (name not in self._told or now - self._told[name] >= AGAIN):
                self._told[name] = now
                days, day = max(0, (end - now).days), f"{end:%Y-%m-%d}"
                self._alerts.tell("certificate-ends", name, always=True, ends=day, days=days)
        return {name: end.isoformat() for name, (_, end) in sorted(self._held.items())}
