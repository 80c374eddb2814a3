"""Composer: what a growing list of events costs, told without composing all of it anew."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from intramural.privacy.accountant import (
    RECORD_INTERVAL,
    Event,
    Groups,
    Relation,
    add_gaussians,
    compose_sampled,
    epsilon_at,
    epsilon_pld,
    groups_of,
    is_huge,
)

BELOW_MAX: Final = 0.01
"""Share by which a figure that rests on a file may be below one composed of the events in wide
bins, which is rarely more than 0.3 % high. Further below, the file is left aside; where epsilon is
far below 1 that may happen to a sound file, and costs time alone."""
ROUNDING: Final = 1e-6
"""Share by which it may be above, for wide bins never tell less than narrow ones."""
KEPT: Final = 2
"""Compositions kept for a relation: one of a few megabytes each."""


@dataclass(frozen=True, kw_only=True)
class Composed:
    """The privacy-loss distribution of sampled steps together."""

    groups: Groups
    """Mechanisms in order, all sampled, and the steps of each."""
    distribution: Any
    is_read: bool = False
    """It rests on a file, and not on events alone."""


class Composer:
    """Tells what events cost, as `epsilon_pld` does, building upon what it composed before.

    Steps of a known mechanism, and a new mechanism, are composed with what stands. Unsampled
    steps are one Gaussian, which is composed last and anew.

    Guarantees:
        As `epsilon_pld`, and the same figure up to its rounding and the tails it cuts, which raise
        delta by less than 1e-14 each time that something is added. A composition that
        `take` was given counts only for events that hold all its steps, and only while the figure
        is at most `BELOW_MAX` below one composed of the events alone, and not above it: else it is
        forgotten. So a forged file can lower what is told by that much, and nothing should be
        decided by it.
    """

    def __init__(
        self, *, interval: float = RECORD_INTERVAL, guard: "Composer | None" = None
    ) -> None:
        """Start with nothing composed.

        Args:
            interval: Width of a privacy-loss bin, in epsilon; wider is faster and never lower.
            guard: Composes the events alone, in wide bins; needed for `take`.
        """
        self._interval = interval
        self._guard = guard
        self._sampled: dict[Relation, list[Composed]] = {}
        self._whole: dict[Relation, tuple[Composed | None, Groups, Any]] = {}

    def __call__(self, events: Sequence[Event], *, delta: float, relation: Relation) -> float:
        """Return epsilon at `delta`."""
        if not events or is_huge(events, delta):
            return epsilon_pld(events, delta=delta, relation=relation, interval=self._interval)
        groups = groups_of(events)
        sampled = self._compose(_sampled_of(groups), relation)
        epsilon = epsilon_at(self._with_gaussians(sampled, groups, relation), delta)
        if sampled is not None and sampled.is_read:
            assert self._guard is not None
            wide = self._guard(events, delta=delta, relation=relation)
            if not (1 - BELOW_MAX) * wide <= epsilon <= wide * (1 + ROUNDING):  # a NaN is not
                self._forget(relation)
                return self(events, delta=delta, relation=relation)
        return epsilon

    def take(self, relation: Relation, composed: Composed) -> None:
        """Build upon a composition from elsewhere."""
        assert self._guard is not None
        assert composed.is_read
        self._sampled.setdefault(relation, []).insert(0, composed)

    def composed(self, events: Sequence[Event], relation: Relation) -> Composed | None:
        """Return what was composed of exactly these events' sampled steps, if it was."""
        return self._find(_sampled_of(groups_of(events)), relation)

    def _find(self, groups: Groups, relation: Relation) -> Composed | None:
        stands = self._sampled.get(relation, [])
        return next((one for one in stands if one.groups == groups), None)

    def _compose(self, groups: Groups, relation: Relation) -> Composed | None:
        """Return all sampled steps together, building upon what stands."""
        if not groups:
            return None
        found = self._find(groups, relation)
        if found is None:
            found = self._extend(groups, relation)
            stands = self._sampled.setdefault(relation, [])
            self._sampled[relation] = [found, *stands][:KEPT]
        return found

    def _extend(self, groups: Groups, relation: Relation) -> Composed:
        wanted = dict(groups)
        bases = [
            one
            for one in self._sampled.get(relation, [])
            if all(steps <= wanted.get(mechanism, 0) for mechanism, steps in one.groups)
        ]
        if not bases:
            whole = compose_sampled(groups, relation, self._interval)
            return Composed(groups=groups, distribution=whole)
        base = max(bases, key=lambda one: sum(steps for _, steps in one.groups))
        there = dict(base.groups)
        new = tuple((m, steps - there.get(m, 0)) for m, steps in groups if steps > there.get(m, 0))
        more = compose_sampled(new, relation, self._interval)
        return Composed(
            groups=groups, distribution=base.distribution.compose(more), is_read=base.is_read
        )

    def _with_gaussians(self, sampled: Composed | None, groups: Groups, relation: Relation) -> Any:
        """Return the distribution of all steps; the last one asked for is kept."""
        known = self._whole.get(relation)
        if known is None or known[0] is not sampled or known[1] != groups:
            before = None if sampled is None else sampled.distribution
            whole = add_gaussians(before, groups, relation, self._interval)
            known = self._whole[relation] = (sampled, groups, whole)
        return known[2]

    def _forget(self, relation: Relation) -> None:
        """Leave aside what rests on a file."""
        stands = self._sampled.get(relation, [])
        self._sampled[relation] = [one for one in stands if not one.is_read]


def _sampled_of(groups: Groups) -> Groups:
    return tuple(group for group in groups if group[0][0] < 1)
