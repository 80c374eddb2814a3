"""RoundMachine: what the coordinator does next, as a pure function of state and event.

No Flower, clock, disk or randomness is in here: events bring times and names, effects ask for
things to be done. So a resumed run decides as the first one did, and ten thousand orders of events
can be tried in seconds.

Phases of one round:  WAIT -> TRAIN -> (EVALUATE) -> next round; after the last: TEST -> DONE.
A round is committed when its evaluation has closed; until then a crash repeats the round whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction
from functools import lru_cache
from math import ceil

from intramural.core.messages import Split


class Phase(StrEnum):
    """Where a run stands."""

    WAIT = "wait"
    TRAIN = "train"
    EVALUATE = "evaluate"
    TEST = "test"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a run's machine goes by; fixed for the run."""

    rounds: int
    sites_min: int
    share: float = 1.0
    """Share of the eligible sites drawn for a cohort."""
    quorum: float = 1.0
    """Share of the cohort that closes a phase after the deadline."""
    deadline_s: float = 3600.0
    evaluate_every: int = 1
    """0: never."""
    attempts_max: int = 3
    """Times a round may fail before the run stops; see `State.failures`."""


@dataclass(frozen=True, kw_only=True)
class State:
    """Where a run stands; `committed` alone survives a crash."""

    committed: int = 0
    """Rounds committed."""
    phase: Phase = Phase.WAIT
    attempt: int = 1
    """Attempt at the current round, from 1; may exceed `attempts_max`, as not every one counts."""
    failures: int = 0
    """Attempts at it that would have missed their quorum even with the excused sites' answers."""
    cohort: frozenset[str] = frozenset()
    """Sites asked in this phase."""
    answered: frozenset[str] = frozenset()
    """Sites that answered in this phase, well or badly."""
    counted: frozenset[str] = frozenset()
    """Sites whose answer counts in this phase."""
    excused: frozenset[str] = frozenset()
    """Sites that answered badly in this phase, for a reason that is waited for."""
    trained: frozenset[str] = frozenset()
    """Sites whose update is in the current round's aggregate."""
    deadline_s: float = 0.0
    """Clock reading after which a quorum closes the phase."""

    @property
    def round(self) -> int:
        """The round being worked on, or the last one when all are done."""
        return self.committed + (self.phase not in (Phase.TEST, Phase.DONE))


@dataclass(frozen=True, kw_only=True)
class Sites:
    """Event: these sites are connected and can take part; also tells the time."""

    eligible: Sequence[str]
    """In order of their names."""
    now_s: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Event: a site answered a request of some phase, attempt and round."""

    site: str
    phase: Phase
    round: int
    attempt: int
    good: bool
    """False: it refused, failed, or its answer was invalid."""
    excused: bool = False
    """It refused for a reason that its people can mend; says nothing of a good answer."""


@dataclass(frozen=True, kw_only=True)
class Tick:
    """Event: time has passed."""

    now_s: float


Event = Sites | Answer | Tick


@dataclass(frozen=True, kw_only=True)
class Choose:
    """Effect: draw a cohort of `size` and train; answer with `chosen`."""

    round: int
    eligible: Sequence[str]
    size: int


@dataclass(frozen=True, kw_only=True)
class Count:
    """Effect: fold this site's answer, just received, into the phase's result."""

    site: str


@dataclass(frozen=True, kw_only=True)
class Ignore:
    """Effect: drop this site's answer."""

    site: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """Effect: close the round's fold and make the new arrays."""

    round: int


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Effect: ask these sites to evaluate the current arrays."""

    round: int
    split: Split
    sites: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Commit:
    """Effect: make the round durable. The next round starts from here."""

    round: int


@dataclass(frozen=True, kw_only=True)
class Discard:
    """Effect: throw the round's fold away; the round is tried again."""

    round: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Wait:
    """Effect: show why nothing happens."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Finish:
    """Effect: the run is over."""

    failed: str | None = None


Effect = Choose | Count | Ignore | Aggregate | Evaluate | Commit | Discard | Wait | Finish
Outcome = tuple[State, tuple[Effect, ...]]


def step(rules: Rules, state: State, event: Event) -> Outcome:
    """Return the next state and what to do, in order."""
    if state.phase in (Phase.DONE, Phase.FAILED):
        return state, ()
    match event:
        case Sites() if state.phase is Phase.WAIT:
            return _open(rules, state, event)
        case Answer():
            return _answer(rules, state, event)
        case Tick() if state.phase is not Phase.WAIT:
            return _close_if_due(rules, state, event.now_s)
    return state, ()


def _open(rules: Rules, state: State, event: Sites) -> Outcome:
    if state.committed >= rules.rounds:  # resumed after the last commit
        return _test(rules, state, event.eligible, event.now_s)
    count = len(event.eligible)
    if count < rules.sites_min:
        reason = f"round {state.round} waits: {count} of {rules.sites_min} sites are ready"
        return state, (Wait(reason=reason),)
    size = max(rules.sites_min, share_of(rules.share, count))
    return state, (Choose(round=state.round, eligible=event.eligible, size=size),)


@lru_cache(maxsize=256)
def share_of(share: float, count: int) -> int:
    """Return the share of a count, rounded up; of 0.55 as written, not of the float beside it."""
    return ceil(Fraction(str(share)) * count)


def chosen(rules: Rules, state: State, cohort: frozenset[str], now_s: float) -> State:
    """Return the state after a cohort was drawn: training has begun."""
    assert state.phase is Phase.WAIT, state.phase
    assert len(cohort) >= rules.sites_min
    return _collect(rules, state, Phase.TRAIN, cohort, now_s)


def _collect(
    rules: Rules, state: State, phase: Phase, cohort: frozenset[str], now_s: float
) -> State:
    nobody: frozenset[str] = frozenset()
    deadline_s = now_s + rules.deadline_s
    return replace(
        state,
        phase=phase,
        cohort=cohort,
        answered=nobody,
        counted=nobody,
        excused=nobody,
        deadline_s=deadline_s,
    )


def _answer(rules: Rules, state: State, event: Answer) -> Outcome:
    asked = (state.phase, state.round, state.attempt)
    if (event.phase, event.round, event.attempt) != asked:
        return state, (Ignore(site=event.site, reason="stale"),)
    if event.site not in state.cohort:
        return state, (Ignore(site=event.site, reason="not-asked"),)
    if event.site in state.answered:
        return state, (Ignore(site=event.site, reason="duplicate"),)
    after = replace(state, answered=state.answered | {event.site})
    if not event.good:
        excused = {event.site} if event.excused else set()
        return replace(after, excused=after.excused | excused), ()
    return replace(after, counted=after.counted | {event.site}), (Count(site=event.site),)


def _close_if_due(rules: Rules, state: State, now_s: float) -> Outcome:
    needed = max(1, share_of(rules.quorum, len(state.cohort)))
    everyone = state.answered == state.cohort
    enough = len(state.counted) >= needed
    if not (everyone or (enough and now_s >= state.deadline_s)):
        return state, ()
    if state.phase is Phase.TRAIN:
        return _trained(rules, state, now_s) if enough else _retry(rules, state, needed)
    if state.phase is Phase.EVALUATE:
        return _committed(rules, state)
    return replace(state, phase=Phase.DONE), (Finish(),)


def _retry(rules: Rules, state: State, needed: int) -> Outcome:
    reason = f"round {state.round}: {len(state.counted)} good answers, {needed} needed"
    discard = Discard(round=state.round, reason=reason)
    is_failure = len(state.counted) + len(state.excused) < needed
    failures = state.failures + is_failure
    if failures >= rules.attempts_max:
        failed = replace(state, phase=Phase.FAILED, failures=failures)
        return failed, (discard, Finish(failed=reason))
    again = State(committed=state.committed, attempt=state.attempt + 1, failures=failures)
    return again, (discard,)


def _trained(rules: Rules, state: State, now_s: float) -> Outcome:
    aggregate = Aggregate(round=state.round)
    kept = replace(state, trained=state.counted)
    due = rules.evaluate_every and (
        state.round % rules.evaluate_every == 0 or state.round == rules.rounds
    )
    if not due:
        after, effects = _committed(rules, kept)
        return after, (aggregate, *effects)
    evaluate = Evaluate(round=state.round, split="validation", sites=state.counted)
    after = _collect(rules, kept, Phase.EVALUATE, state.counted, now_s)
    return after, (aggregate, evaluate)


def _committed(rules: Rules, state: State) -> Outcome:
    after = State(committed=state.committed + 1)
    return after, (Commit(round=after.committed),)


def _test(rules: Rules, state: State, eligible: Sequence[str], now_s: float) -> Outcome:
    if not rules.evaluate_every or not eligible:
        return replace(state, phase=Phase.DONE), (Finish(),)
    sites = frozenset(eligible)
    after = _collect(rules, state, Phase.TEST, sites, now_s)
    return after, (Evaluate(round=state.committed, split="test", sites=sites),)
