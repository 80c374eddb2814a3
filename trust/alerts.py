"""Alerts: what a gate tells its operator, without letting a peer flood the log."""

from collections import deque
from collections.abc import Callable
from datetime import datetime
from typing import Any

AGAIN_S = 60.0
"""An alert of one kind about one peer is told once in this time; the others are counted."""
KEPT = 20
"""Of the last alerts, for the status file."""

Sink = Callable[[dict[str, Any]], None]
Clock = Callable[[], datetime]


class Alerts:
    """Hands alerts on: the first of a kind about a peer at once, repetitions as a number."""

    def __init__(self, sink: Sink, *, now: Clock) -> None:
        """Begin with none told.

        Args:
            sink: Takes one alert, ready for JSON: time, alert, peer, times, and facts of its kind.
            now: The time.
        """
        self._sink, self.now = sink, now
        self._told: dict[tuple[str, str], datetime] = {}
        self._held: dict[tuple[str, str], int] = {}
        self.recent: deque[dict[str, Any]] = deque(maxlen=KEPT)
        """The last alerts told, oldest first."""

    def tell(self, alert: str, peer: str = "", *, always: bool = False, **facts: Any) -> None:
        """Tell of something, unless the same was told of the same peer a moment ago.

        Args:
            alert: What happened, in a word or two with dashes.
            peer: About whom; empty: about the gate.
            always: Tell it each time; for what a peer cannot bring about at will.
            facts: More, ready for JSON.
        """
        key, now = (alert, peer), self.now()
        last = self._told.get(key)
        times = self._held.pop(key, 0) + 1
        if last is not None and not always and abs((now - last).total_seconds()) < AGAIN_S:
            self._held[key] = times
            return
        self._told[key] = now
        told: dict[str, Any] = {"time": now.isoformat(timespec="milliseconds")}
        told |= {"alert": alert, "peer": peer, "times": times, **facts}
        self.recent.append(told)
        self._sink(told)
