"""A world around the machine with a buffer: a second bookkeeping of who is at work and what counts.

The machine's flights are compared with it after every event.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from intramural.server import machine
from intramural.server.machine import Answer, Event, Phase, Rules, Sites, State, Tick
from tests.server.world import OVER, SITES, share_of

DEADLINE_S = 30.0
Trip = tuple[str, int, int]
"""A site, the round it started from, and which of its trips this is."""


@dataclass
class Buffered:
    """One run's machine with a buffer, and everything it did."""

    rules: Rules
    state: State = field(default_factory=State)
    now_s: float = 0.0
    live: dict[str, Trip] = field(default_factory=dict)
    """Who is at work."""
    until: dict[str, float] = field(default_factory=dict)
    saved: dict[str, Trip] = field(default_factory=dict)
    """`live` as it was at the last commit."""
    saved_flights: frozenset[machine.Flight] = frozenset()
    fold: list[Trip] = field(default_factory=list)
    held: list[tuple[Trip, Answer]] = field(default_factory=list)
    kept: set[Trip] = field(default_factory=set)
    """Trips at work that have brought an update, which is held."""
    silent: set[Trip] = field(default_factory=set)
    """Trips at work that let their deadline pass in this round, whose places others were given."""
    fate: dict[Trip, str] = field(default_factory=dict)
    """What became of each trip: 'counted', 'bad', 'expired', 'late' or 'crashed'."""
    counted: list[tuple[int, Trip]] = field(default_factory=list)
    """Rounds committed with the trips in them."""
    trips: Counter[str] = field(default_factory=Counter)
    asked: Counter[tuple[str, int, int]] = field(default_factory=Counter)
    """How often a site was asked in a round's attempt since the last crash."""
    effects: list[machine.Effect] = field(default_factory=list)
    commits: list[int] = field(default_factory=list)
    failures: int = 0
    replaced: int = 0
    """How often others were asked because all at work were silent."""
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def feed(self, event: Event) -> None:
        """Give the machine an event, carry out what it asks for, and compare."""
        before = self.state
        self.state, effects = machine.step(self.rules, before, event)
        self.effects.extend(effects)
        if isinstance(event, Answer) and event.phase is Phase.TRAIN and before.phase not in OVER:
            self._answered(event, before, effects)
        for effect in effects:
            self._carry_out(effect, before, event)
        mine = {(trip[0], trip[1], self.until[trip[0]]) for trip in self.live.values()}
        assert {(f.site, f.round, f.until_s) for f in self.state.flights} == mine
        assert len(self.state.flights) == len(self.live), "one flight a site"
        assert self.state.held == {trip[0] for trip in self.kept}
        if self.state.phase is Phase.TRAIN:
            assert self.state.counted == {trip[0] for trip in self.fold}
        if self.state.phase is Phase.TRAIN and before.phase is Phase.WAIT:
            held, self.held = self.held, []
            for _, answer in held:
                self.feed(answer)
                self.feed(Tick(now_s=self.now_s))

    def crash(self) -> None:
        """Forget all but what a checkpoint holds."""
        self.state = State(committed=len(self.commits), flights=self.saved_flights)
        for trip in [*self.live.values(), *self.fold]:
            if trip not in self.saved.values():
                self.fate[trip] = "crashed"
        for trip in self.saved.values():
            self.fate.pop(trip, None)  # what it brought was not committed: it is asked again
        self.live, self.fold, self.held = dict(self.saved), [], []
        self.kept.clear()
        self.silent.clear()
        self.until = {f.site: f.until_s for f in self.saved_flights}
        self.asked.clear()
        self.failures = 0

    def _answered(self, event: Answer, before: State, effects: tuple[machine.Effect, ...]) -> None:
        trip = self.live.get(event.site)
        if trip is None or trip[1] != event.round:
            reason = "stale" if event.round < before.round else "not-asked"
            assert effects == (machine.Ignore(site=event.site, reason=reason),)
            assert self.state == before
            return
        collects = before.phase is Phase.TRAIN and len(self.fold) < self.rules.buffer
        if not event.good:
            assert effects == ()
            self._end(trip, "bad")
        elif collects:
            assert effects == (machine.Count(site=event.site),)
            assert 0 <= before.round - trip[1] <= self.rules.staleness_max
            self.fold.append(trip)
            self._end(trip, "counted")
        else:
            assert effects == (machine.Hold(site=event.site),)
            assert self.state == replace(before, held=before.held | {event.site})
            self.held.append((trip, event))
            self.kept.add(trip)

    def _end(self, trip: Trip, fate: str) -> None:
        assert trip not in self.fate, "a trip ends once"
        self.fate[trip] = fate
        self.kept.discard(trip)
        self.silent.discard(trip)
        del self.live[trip[0]]

    def _carry_out(self, effect: machine.Effect, before: State, event: Event) -> None:
        rules = self.rules
        match effect:
            case machine.Choose():
                assert isinstance(event, Sites)
                in_fold = {trip[0] for trip in self.fold}
                idle = [s for s in event.eligible if s not in self.live and s not in in_fold]
                at_once = max(rules.sites_min, share_of(rules.share, len(event.eligible)))
                assert list(effect.eligible) == idle
                places = at_once - len(set(self.live.values()) - self.silent)
                if len(event.eligible) < rules.sites_min:
                    assert self.silent, "below sites.min a round waits"
                    places = 0
                assert effect.size == min(len(idle), max(0, places))
                self._depart(self.rng.sample(idle, effect.size), event.now_s)
            case machine.Expired(site=site):
                assert isinstance(event, Tick)
                assert before.phase is Phase.TRAIN, "while a round is evaluated nobody is heard"
                assert event.now_s >= self.until[site]
                trip = self.live[site]
                assert trip not in self.kept, "who has answered is not silent"
                self._end(trip, "expired")
            case machine.Aggregate():
                assert len(self.fold) == rules.buffer == len({trip[0] for trip in self.fold})
                silent = [s for s, trip in self.live.items() if trip not in self.kept]
                assert all(self.until[site] > self.now_s for site in silent)
            case machine.Evaluate(split="validation"):
                assert effect.sites == {trip[0] for trip in self.fold}
            case machine.Commit():
                assert isinstance(event, Tick)
                self._commit(effect.round)
            case machine.Lack():
                self._lacked(before, event)
                assert self.state.phase is Phase.WAIT
                assert self.state.attempt == before.attempt + 1
            case machine.Discard():
                self._lacked(before, event)
                assert self.failures == rules.attempts_max
                assert self.state.phase is Phase.FAILED

    def _depart(self, sites: list[str], now_s: float) -> None:
        state = self.state
        self.state = machine.chosen(self.rules, state, frozenset(sites), now_s)
        for site in sites:
            self.trips[site] += 1
            self.live[site] = (site, state.round, self.trips[site])
            self.until[site] = now_s + DEADLINE_S
            self.asked[site, state.round, state.attempt] += 1
            assert self.asked[site, state.round, state.attempt] == 1

    def _commit(self, round_: int) -> None:
        assert round_ == len(self.commits) + 1
        self.commits.append(round_)
        self.counted += [(round_, trip) for trip in self.fold]
        self.fold, self.failures = [], 0
        self.silent.clear()
        for trip in list(self.live.values()):
            if round_ + 1 - trip[1] > self.rules.staleness_max:
                self._end(trip, "late")
        self.saved, self.saved_flights = dict(self.live), self.state.flights

    def _lacked(self, before: State, event: Event) -> None:
        assert isinstance(event, Tick)
        assert all(self.until[site] <= event.now_s for site in self.live)
        assert len(self.fold) < self.rules.buffer
        if self.live:
            in_fold = {trip[0] for trip in self.fold}
            assert set(event.ready) - self.live.keys() - in_fold, "nobody could be asked"
            self.silent = set(self.live.values())
            self.replaced += 1
        else:
            self.failures += len(self.fold) + len(before.excused) < self.rules.buffer


def random_rules(rng: random.Random) -> Rules:
    """Return rules of one to four rounds with a buffer."""
    sites_min = rng.randint(1, 4)
    return Rules(
        rounds=rng.randint(1, 4),
        sites_min=sites_min,
        share=rng.choice((0.3, 0.55, 1.0)),
        quorum=rng.choice((0.2, 0.5, 1.0)),
        deadline_s=DEADLINE_S,
        evaluate_every=rng.randint(0, 2),
        attempts_max=rng.randint(1, 3),
        buffer=rng.randint(1, sites_min),
        staleness_max=rng.randint(0, 3),
    )


def random_event(world: Buffered, rng: random.Random) -> Event:
    """Return an event that may be due, late, doubled, or from somebody never asked."""
    state, dice = world.state, rng.random()
    world.now_s += rng.choice((0.0, 0.1, 1.0, 11.0, DEADLINE_S))
    if state.phase is Phase.WAIT and dice < 0.6:
        eligible = sorted(rng.sample(SITES, rng.randint(0, len(SITES))))
        return Sites(eligible=eligible, now_s=world.now_s)
    if dice < 0.25:
        ready = sorted(rng.sample(SITES, rng.randint(0, len(SITES))))
        return Tick(now_s=world.now_s, ready=ready if rng.random() < 0.5 else ())
    good, excused = rng.random() < 0.8, rng.random() < 0.5
    site, phase, round_ = rng.choice(SITES), Phase.TRAIN, state.round
    if dice < 0.85 and (at_work := sorted(world.live)):
        site = rng.choice(at_work)
        round_ = world.live[site][1]
    elif dice < 0.9:
        round_ += rng.choice((-2, -1, 1))
    if state.phase in (Phase.EVALUATE, Phase.TEST) and rng.random() < 0.6:
        phase, round_ = state.phase, state.round
        site = rng.choice(sorted(state.cohort))
    return Answer(
        site=site, phase=phase, round=round_, attempt=state.attempt, good=good, excused=excused
    )


def calm_events(world: Buffered) -> Iterator[Event]:
    """Yield what happens when all sites are there and answer well, until the run is over."""
    while (state := world.state).phase not in OVER:
        if state.phase is Phase.WAIT:
            yield Sites(eligible=sorted(SITES), now_s=world.now_s)
        elif state.phase is Phase.TRAIN and world.live:
            site, round_, _ = world.live[min(world.live)]
            yield Answer(site=site, phase=Phase.TRAIN, round=round_, attempt=1, good=True)
        elif state.phase is not Phase.TRAIN:
            for site in sorted(state.cohort - state.answered):
                yield Answer(
                    site=site,
                    phase=state.phase,
                    round=state.round,
                    attempt=state.attempt,
                    good=True,
                )
        yield Tick(now_s=world.now_s)
