"""A world around the RoundMachine: carries its effects out in memory and watches its promises."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil
from typing import TypeGuard

from intramural.server import machine
from intramural.server.machine import Event, Phase, Rules, State

ASKING = (Phase.TRAIN, Phase.EVALUATE, Phase.TEST)
OVER = (Phase.DONE, Phase.FAILED)
SITES = tuple("abcdefg")
DEADLINE_S = 10.0


def share_of(share: float, count: int) -> int:
    """Return the share of a count, rounded up, without a float's rounding in between."""
    return ceil(Fraction(str(share)) * count)


@dataclass
class World:
    """One run's machine, and everything it did."""

    rules: Rules
    state: State = field(default_factory=State)
    now_s: float = 0.0
    events: list[Event] = field(default_factory=list)
    """Every event since the start, crashes left out."""
    effects: list[machine.Effect] = field(default_factory=list)
    commits: list[int] = field(default_factory=list)
    marks: list[tuple[int, int, int]] = field(default_factory=list)
    """After each commit: rounds committed, and the numbers of events and effects so far."""
    fold: set[str] = field(default_factory=set)
    """Sites whose answer was folded in since the phase began."""
    excused: set[str] = field(default_factory=set)
    """Sites whose refusal was excused since the phase began."""
    failures: int = 0
    """Attempts at the round that its excused sites could not have saved."""
    aggregated: int = 0
    """Round whose aggregate waits to be committed; 0: none."""

    def feed(self, event: Event) -> tuple[machine.Effect, ...]:
        """Give the machine an event and carry out what it asks for."""
        before = self.state
        self.state, effects = machine.step(self.rules, before, event)
        self.events.append(event)
        self.effects.extend(effects)
        if before.phase in OVER:
            assert self.state == before
            assert effects == ()
        if _is_excused(event, before):
            self.excused.add(event.site)
        for effect in effects:
            self._carry_out(effect, before, event)
        if effects and isinstance(effects[-1], machine.Commit):
            assert self.state == State(committed=self.commits[-1])
            self.marks.append((self.commits[-1], len(self.events), len(self.effects)))
        return effects

    def crash(self) -> None:
        """Forget all but what is committed."""
        self.state = State(committed=len(self.commits))
        self._begin_phase()
        self.aggregated = self.failures = 0

    def _begin_phase(self) -> None:
        self.fold, self.excused = set(), set()

    def _carry_out(self, effect: machine.Effect, before: State, event: Event) -> None:
        match effect:
            case machine.Choose():
                assert isinstance(event, machine.Sites)
                assert self.rules.sites_min <= effect.size <= len(effect.eligible)
                assert effect.size >= share_of(self.rules.share, len(effect.eligible))
                rng = random.Random(effect.round)
                cohort = frozenset(rng.sample(sorted(effect.eligible), effect.size))
                self.state = machine.chosen(self.rules, self.state, cohort, event.now_s)
                self._begin_phase()
            case machine.Count(site=site):
                assert isinstance(event, machine.Answer)
                asked = (before.phase, before.round, before.attempt)
                assert (event.phase, event.round, event.attempt) == asked
                assert event.good
                assert site == event.site
                assert site in before.cohort
                assert site not in self.fold
                self.fold.add(site)
            case machine.Aggregate():
                assert len(self.fold) >= max(1, share_of(self.rules.quorum, len(before.cohort)))
                assert not self.aggregated
                self.aggregated = effect.round
            case machine.Evaluate():
                assert effect.split == ("test" if self.state.phase is Phase.TEST else "validation")
                assert effect.split == "test" or effect.sites == self.fold
                self._begin_phase()
            case machine.Commit():
                assert effect.round == self.aggregated == len(self.commits) + 1
                self.commits.append(effect.round)
                self.aggregated = self.failures = 0
            case machine.Discard():
                assert not self.aggregated
                self._give_up(before)
            case machine.Finish(failed=None):
                assert self.commits == list(range(1, self.rules.rounds + 1))

    def _give_up(self, before: State) -> None:
        """Check that a round is tried again, and not without end, by sites that may be mended."""
        needed = max(1, share_of(self.rules.quorum, len(before.cohort)))
        assert len(self.fold) < needed
        assert not self.fold & self.excused
        if len(self.fold | self.excused) < needed:
            self.failures += 1
        if self.failures == self.rules.attempts_max:
            assert self.state.phase is Phase.FAILED
        else:
            assert self.state == State(
                committed=before.committed, attempt=before.attempt + 1, failures=self.failures
            )
        self._begin_phase()


def _is_excused(event: Event, state: State) -> TypeGuard[machine.Answer]:
    """Return whether an event is the first answer of a site that was asked, and is excused."""
    if not isinstance(event, machine.Answer) or event.good or not event.excused:
        return False
    asked = (state.phase, state.round, state.attempt)
    is_asked = event.site in state.cohort - state.answered
    return is_asked and (event.phase, event.round, event.attempt) == asked


def random_rules(rng: random.Random) -> Rules:
    """Return rules of one to three rounds."""
    return Rules(
        rounds=rng.randint(1, 3),
        sites_min=rng.randint(1, 3),
        share=rng.choice((0.3, 0.55, 1.0)),
        quorum=rng.choice((0.2, 0.5, 0.55, 0.8, 1.0)),
        deadline_s=DEADLINE_S,
        evaluate_every=rng.randint(0, 2),
        attempts_max=rng.randint(1, 3),
    )


def random_event(world: World, rng: random.Random) -> Event:
    """Return an event that may be of this phase, late, doubled, or from somebody never asked."""
    state, dice = world.state, rng.random()
    world.now_s += rng.choice((0.0, 0.1, 1.0, 11.0))
    if state.phase is Phase.WAIT and dice < 0.7:
        eligible = sorted(rng.sample(SITES, rng.randint(0, len(SITES))))
        return machine.Sites(eligible=eligible, now_s=world.now_s)
    if dice < 0.2:
        return machine.Tick(now_s=world.now_s)
    open_ = sorted(state.cohort - state.answered)
    phase, round_, attempt = state.phase, state.round, state.attempt
    site = rng.choice(open_) if open_ and dice < 0.8 else rng.choice(SITES)
    if dice > 0.95:
        phase = rng.choice(ASKING)
    elif dice > 0.9:
        round_ += rng.choice((-1, 1))
    elif dice > 0.85:
        attempt += rng.choice((-1, 1))
    good, excused = rng.random() < 0.8, rng.random() < 0.5
    return machine.Answer(
        site=site, phase=phase, round=round_, attempt=attempt, good=good, excused=excused
    )


def calm_events(world: World) -> Iterator[Event]:
    """Yield what happens when all sites are there and answer well, until the run is over."""
    while world.state.phase not in OVER:
        state = world.state
        if state.phase is Phase.WAIT:
            yield machine.Sites(eligible=sorted(SITES), now_s=world.now_s)
            continue
        for site in sorted(state.cohort - state.answered):
            yield machine.Answer(
                site=site, phase=state.phase, round=state.round, attempt=state.attempt, good=True
            )
        yield machine.Tick(now_s=world.now_s)
