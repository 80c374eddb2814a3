"""Counters: what each peer did at a gate, for people and for machines."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

CONNECTED_S = 45.0
"""A peer heard from within this is connected: a SuperNode's heartbeat comes every 30 s at most."""


@dataclass(kw_only=True)
class Tally:
    """Counts of one peer."""

    requests: int = 0
    """Requests that were let through to what lies behind the gate."""
    bytes_up: int = 0
    """Of request bodies, from the peer."""
    bytes_down: int = 0
    """Of answer bodies, to the peer."""
    refusals: Counter[str] = field(default_factory=Counter)
    """Requests that were not, by reason."""
    last_seen: datetime | None = None
    """When the last request that was let through began."""


class Counters:
    """Tallies by peer; requests of nobody we know are under the empty name."""

    def __init__(self, *, now: Callable[[], datetime]) -> None:
        """Begin at nothing."""
        self._now = now
        self.peers: dict[str, Tally] = {}

    def of(self, peer: str) -> Tally:
        """Return the peer's tally."""
        return self.peers.setdefault(peer, Tally())

    def passed(self, peer: str) -> None:
        """Count a request that is let through."""
        tally = self.of(peer)
        tally.requests += 1
        tally.last_seen = self._now()

    def denied(self, peer: str, reason: str) -> None:
        """Count a request that is not."""
        self.of(peer).refusals[reason] += 1

    def snapshot(self) -> dict[str, Any]:
        """Return all tallies as JSON has them."""
        now = self._now()
        return {name: _as_json(self.peers[name], now) for name in sorted(self.peers)}


def _as_json(tally: Tally, now: datetime) -> dict[str, Any]:
    seen = tally.last_seen
    return {
        "connected": seen is not None and (now - seen).total_seconds() <= CONNECTED_S,
        "last_seen": None if seen is None else seen.isoformat(timespec="milliseconds"),
        "requests": tally.requests,
        "bytes_up": tally.bytes_up,
        "bytes_down": tally.bytes_down,
        "refusals": dict(sorted(tally.refusals.items())),
    }
