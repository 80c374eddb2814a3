"""Presence: when a simulated site is connected, as a function of the simulated time alone."""

from bisect import bisect_right
from collections.abc import Iterator
from functools import reduce
from itertools import chain, count, repeat
from math import inf

import numpy as np

from intramural.simulations.scenario import Group

HOUR_S = 3600.0
DAY_H = 24.0
Span = tuple[float, float]
"""From and until, in simulated seconds; the end is outside."""


class Presence:
    """One site's times of connection; they do not depend on what is asked, or in which order."""

    def __init__(
        self, group: Group, *, offset_h: float, start_hour: float, rng: np.random.Generator
    ) -> None:
        """Read hours and coming and going from a site's group.

        Args:
            group: Says `hours`, and the mean times of being there and away.
            offset_h: How far the site's clock is ahead of the coordinator's, in hours.
            start_hour: Hour of the coordinator's day at simulated second 0.
            rng: Draws the times of coming and going; nobody else may use it.
        """
        streams: list[Iterator[Span]] = []
        if group.hours is not None:
            streams.append(_open_hours(group.hours, start_hour + offset_h))
        if group.on_hours is not None and group.off_hours is not None:
            streams.append(_bouts(rng, on_h=group.on_hours, off_h=group.off_hours))
        always = chain([(-inf, inf)], repeat((inf, inf)))
        self._coming = reduce(_both, streams) if streams else always
        self._starts: list[float] = []
        self._spans: list[Span] = []

    def is_here(self, at_s: float) -> bool:
        """Return whether the site is connected at a time."""
        span = self._last_begun(at_s)
        return span is not None and at_s < span[1]

    def next_change(self, after_s: float) -> float:
        """Return when the site comes or goes next, later than `after_s`; infinity: never."""
        span = self._last_begun(after_s)
        if span is not None and after_s < span[1]:
            return span[1]
        return self._starts[bisect_right(self._starts, after_s)]

    def _last_begun(self, at_s: float) -> Span | None:
        while not self._spans or self._starts[-1] <= at_s:
            span = next(self._coming)
            self._spans.append(span)
            self._starts.append(span[0])
        place = bisect_right(self._starts, at_s)
        return self._spans[place - 1] if place else None


def _open_hours(hours: tuple[float, float], start_hour: float) -> Iterator[Span]:
    """Yield each day's span; the first may be over before second 0."""
    opens, closes = hours
    length_h = (closes - opens) % DAY_H
    for day in count(-3):  # offsets reach two days back, and a span may end the next morning
        begin_s = (day * DAY_H + opens - start_hour) * HOUR_S
        yield begin_s, begin_s + length_h * HOUR_S


def _bouts(rng: np.random.Generator, *, on_h: float, off_h: float) -> Iterator[Span]:
    """Yield times of being there, from second 0, at which the long-run share is there."""
    now_s = 0.0
    if rng.random() >= on_h / (on_h + off_h):
        now_s += float(rng.exponential(off_h)) * HOUR_S
    while True:
        end_s = now_s + float(rng.exponential(on_h)) * HOUR_S
        yield now_s, end_s
        now_s = end_s + float(rng.exponential(off_h)) * HOUR_S


def _both(left: Iterator[Span], right: Iterator[Span]) -> Iterator[Span]:
    """Yield what two streams of spans, each in order, have in common."""
    one, two = next(left), next(right)
    while True:
        begin, end = max(one[0], two[0]), min(one[1], two[1])
        if begin < end:
            yield begin, end
        if one[1] <= two[1]:
            one = next(left)
        else:
            two = next(right)
