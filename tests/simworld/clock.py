"""Clock: simulated seconds, and what is due in them; nobody waits for real."""

import itertools
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from heapq import heappop, heappush

Act = Callable[[], None]
EPOCH = datetime(2026, 1, 5, 9, 0, tzinfo=UTC)
"""What a right wall clock shows at the beginning."""
IDLE_S_MAX = 60.0
"""Longest sleep of a coordinator to which nothing happens; a loaded machine oversleeps too."""


class Clock:
    """The monotonic time of all hosts."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.events = 0
        """Acts done so far."""
        self._due: list[tuple[float, int, Act]] = []
        self._order = itertools.count()
        self._idle_s = 0.0

    def monotonic(self) -> float:
        """Stand in for `time.monotonic`."""
        return self.now_s

    def after(self, delay_s: float, act: Act) -> None:
        """Do something once the time has come; what is due together is done in this order."""
        heappush(self._due, (self.now_s + max(0.0, delay_s), next(self._order), act))

    def at(self, when_s: float, act: Act) -> None:
        """Do something at a time; now, if it is over."""
        self.after(when_s - self.now_s, act)

    def advance(self, until_s: float) -> None:
        """Let time pass and do what is due in it."""
        while self._due and self._due[0][0] <= until_s:
            when_s, _, act = heappop(self._due)
            self.now_s = max(self.now_s, when_s)
            self.events += 1
            self._idle_s = 0.0
            act()
        self.now_s = max(self.now_s, until_s)

    def sleep(self, pause_s: float) -> None:
        """Sleep a pause, and longer while nothing happens: up to the next act, or `IDLE_S_MAX`."""
        self._idle_s = min(max(pause_s, 2 * self._idle_s), IDLE_S_MAX)
        next_s = self._due[0][0] if self._due else self.now_s + IDLE_S_MAX
        until_s = max(self.now_s + pause_s, min(next_s, self.now_s + self._idle_s))
        self.advance(until_s)


class WallClock:
    """One host's calendar: skewed, and set by hand now and then."""

    def __init__(self, clock: Clock, *, skew_s: float = 0.0) -> None:
        self._clock = clock
        self.skew_s = skew_s

    def now(self) -> datetime:
        """Stand in for `utc_now`."""
        return EPOCH + timedelta(seconds=self._clock.now_s + self.skew_s)

    def time(self) -> float:
        """Stand in for `time.time`."""
        return self.now().timestamp()
