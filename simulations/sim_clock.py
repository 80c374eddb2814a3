"""SimClock: seconds that pass because the coordinator sleeps; nobody waits for real."""

from collections.abc import Callable
from heapq import heappop, heappush
from math import inf

IDLE_S_MAX = 60.0
"""Longest leap while nothing is due: what only the coordinator counts is late by this at most."""


class SimClock:
    """A clock that leaps from one thing that is due to the next."""

    def __init__(self, now_s: float = 0.0) -> None:
        """Begin at `now_s` seconds; a resumed run begins where its last round was committed."""
        self.now_s = now_s
        self._alarms: list[float] = []
        self._sources: list[Callable[[float], float]] = []

    def monotonic(self) -> float:
        """Stand in for `time.monotonic`."""
        return self.now_s

    def alarm(self, at_s: float) -> None:
        """Note that something is due at a time: no sleep leaps over it."""
        heappush(self._alarms, at_s)

    @property
    def pending(self) -> list[float]:
        """Times after now at which something is due, each once, in order."""
        return sorted({at_s for at_s in self._alarms if at_s > self.now_s})

    def follow(self, source: Callable[[float], float]) -> None:
        """Ask `source` for the first thing that is due after a time, before each sleep."""
        self._sources.append(source)

    def sleep(self, pause_s: float) -> None:
        """Stand in for `time.sleep`: leap to what is due next, be it before or after the pause.

        A real coordinator looks again after each pause, and so finds a reply up to a pause late;
        this one finds it at its very time.
        """
        while self._alarms and self._alarms[0] <= self.now_s:
            heappop(self._alarms)
        due_s = self._alarms[0] if self._alarms else inf
        due_s = min([due_s, *(source(self.now_s) for source in self._sources)])
        self.now_s = min(due_s, self.now_s + max(pause_s, IDLE_S_MAX))
