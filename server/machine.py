"""RoundMachine: what the coordinator does next, as a pure function of state and event.

No Flower, clock, disk or randomness is in here: events bring times and names, effects ask for
things to be done. So a resumed run decides as the first one did, and ten thousand orders of events
can be tried in seconds.

Phases of one round:  WAIT -> TRAIN -> (EVALUATE) -> next round; after the last: TEST -> DONE.
A round is committed when its evaluation has closed; until then a crash repeats the round whole.

With a buffer (FedBuff, Nguyen et al. 2022, Algorithm 1, https://arxiv.org/abs/2106.06639) TRAIN
ends when so many updates have counted. Sites still at work go on; what they bring counts in a
later round, unless it is too late. Whoever has answered is asked again in the next round.
"""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from math import ceil

from intramural.server.moves import (
    Aggregate,
    Answer,
    Choose,
    Commit,
    Count,
    Discard,
    Effect,
    Evaluate,
    Event,
    Expired,
    Finish,
    Flight,
    Hold,
    Ignore,
    Lack,
    Outcome,
    Phase,
    Rules,
    Sites,
    State,
    Tick,
    Wait,
)

__all__ = [
    "Aggregate", "Answer", "Choose", "Commit", "Count", "Discard", "Effect", "Evaluate", "Event",
    "Expired", "Finish", "Flight", "Hold", "Ignore", "Lack", "Outcome", "Phase", "Rules", "Sites",
    "State", "Tick", "Wait", "chosen", "share_of", "step",
]  # fmt: skip
NOBODY: frozenset[str] = frozenset()


def step(rules: Rules, state: State, event: Event) -> Outcome:
    """Return the next state and what to do, in order."""
    if state.phase in (Phase.DONE, Phase.FAILED):
        return state, ()
    match event:
        case Sites() if state.phase is Phase.WAIT:
            return _open(rules, state, event)
        case Answer() if rules.buffer and event.phase is Phase.TRAIN:
            return _landed(rules, state, event)
        case Answer():
            return _answer(state, event)
        case Tick() if state.phase is Phase.TRAIN and rules.buffer:
            return _close_if_full(rules, state, event)
        case Tick() if state.phase is not Phase.WAIT:
            return _close_if_due(rules, state, event.now_s)
    return state, ()


def _open(rules: Rules, state: State, event: Sites) -> Outcome:
    if state.committed >= rules.rounds:  # resumed after the last commit
        return _test(rules, state, event.eligible, event.now_s)
    count = len(event.eligible)
    silent = state.flights if state.attempt > 1 else frozenset()
    if count < rules.sites_min and not silent:
        reason = f"round {state.round} waits: {count} of {rules.sites_min} sites are ready"
        return state, (Wait(reason=reason),)
    size = max(rules.sites_min, share_of(rules.share, count))
    if not rules.buffer:
        return state, (Choose(round=state.round, eligible=event.eligible, size=size),)
    idle = [site for site in event.eligible if site not in _busy(state)]
    # the silent hold no place; where too few are there, all that is left is to listen to them
    places = size - len(state.flights - silent) if count >= rules.sites_min else 0
    size = min(len(idle), max(0, places))
    assert size or state.flights, "the buffer is at most sites_min, and so somebody is left to ask"
    return state, (Choose(round=state.round, eligible=idle, size=size),)


def _busy(state: State) -> set[str]:
    """Return who cannot be asked: those at work, and those whose update is in the round."""
    return {flight.site for flight in state.flights} | state.counted


@lru_cache(maxsize=256)
def share_of(share: float, count: int) -> int:
    """Return the share of a count, rounded up; of 0.55 as written, not of the float beside it."""
    return ceil(Fraction(str(share)) * count)


def chosen(rules: Rules, state: State, cohort: frozenset[str], now_s: float) -> State:
    """Return the state after a cohort was drawn: training has begun."""
    assert state.phase is Phase.WAIT, state.phase
    if rules.buffer:
        until_s = now_s + rules.deadline_s
        asked = {Flight(site=site, round=state.round, until_s=until_s) for site in cohort}
        return replace(state, phase=Phase.TRAIN, excused=NOBODY, flights=state.flights.union(asked))
    assert len(cohort) >= rules.sites_min
    return _collect(rules, state, Phase.TRAIN, cohort, now_s)


def _collect(
    rules: Rules, state: State, phase: Phase, cohort: frozenset[str], now_s: float
) -> State:
    return replace(
        state,
        phase=phase,
        cohort=cohort,
        answered=NOBODY,
        counted=NOBODY,
        excused=NOBODY,
        deadline_s=now_s + rules.deadline_s,
    )


def _answer(state: State, event: Answer) -> Outcome:
    asked = (state.phase, state.round, state.attempt)
    if (event.phase, event.round, event.attempt) != asked:
        return state, (Ignore(site=event.site, reason="stale"),)
    if event.site not in state.cohort:
        return state, (Ignore(site=event.site, reason="not-asked"),)
    if event.site in state.answered:
        return state, (Ignore(site=event.site, reason="duplicate"),)
    site = {event.site}
    answered, counted, excused = state.answered | site, state.counted, state.excused
    if not event.good:
        excused = excused | site if event.excused else excused
        return replace(state, answered=answered, excused=excused), ()
    after = replace(state, answered=answered, counted=counted | site)
    return after, (Count(site=event.site),)


def _landed(rules: Rules, state: State, event: Answer) -> Outcome:
    """Take in the answer of a flight, which belongs to no attempt: its arrays are the same."""
    asked = (event.site, event.round)
    flight = next((f for f in state.flights if (f.site, f.round) == asked), None)
    if flight is None:  # it was given up as too late, or is answered already
        reason = "stale" if event.round < state.round else "not-asked"
        return state, (Ignore(site=event.site, reason=reason),)
    collects = state.phase is Phase.TRAIN and len(state.counted) < rules.buffer
    if event.good and not collects:
        return replace(state, held=state.held | {event.site}), (Hold(site=event.site),)
    after = replace(state, flights=state.flights - {flight}, held=state.held - {event.site})
    if not event.good:
        excused = {event.site} if event.excused and collects else set()
        return replace(after, excused=after.excused | excused), ()
    return replace(after, counted=after.counted | {event.site}), (Count(site=event.site),)


def _close_if_full(rules: Rules, state: State, event: Tick) -> Outcome:
    """Close the training once the buffer is full; when nobody is waited for, have others asked.

    Whoever let the deadline pass goes on: however late it is, what is under way is worth more than
    a new start. But it may be silent for good, and the round shall not hang on that.
    """
    if len(state.counted) == rules.buffer:
        return _trained(rules, state, event.now_s)
    if any(event.now_s < flight.until_s for flight in state.flights):
        return state, ()
    is_ready = len(event.ready) >= rules.sites_min
    others = is_ready and any(site not in _busy(state) for site in event.ready)
    if others or not state.flights:
        return _retry(rules, state, rules.buffer)
    return state, ()


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
    # with a buffer who is silent may answer yet, and there are only so many who can fall silent
    is_failure = not state.flights and len(state.counted) + len(state.excused) < needed
    failures = state.failures + is_failure
    if failures >= rules.attempts_max:
        failed = replace(state, phase=Phase.FAILED, failures=failures)
        return failed, (discard, Finish(failed=reason))
    again = State(committed=state.committed, attempt=state.attempt + 1, failures=failures)
    if rules.buffer:  # what has counted stays: nobody shall train it twice
        lack = Lack(round=state.round, reason=reason)
        kept = replace(again, counted=state.counted, flights=state.flights, held=state.held)
        return kept, (lack,)
    return again, (discard,)


def _trained(rules: Rules, state: State, now_s: float) -> Outcome:
    """Close the training of a round; with a buffer, wait no longer for who let its deadline pass.

    Here alone, and once all that has come was offered: while a round is evaluated, updates are left
    in the post, and who has answered would look silent, and have trained for nothing.
    """
    silent = {f for f in state.flights if now_s >= f.until_s and f.site not in state.held}
    expired = [Expired(site=site) for site in sorted(flight.site for flight in silent)]
    closing: tuple[Effect, ...] = (*expired, Aggregate(round=state.round))
    kept = replace(state, trained=state.counted, flights=state.flights - silent)
    due = rules.evaluate_every and (
        state.round % rules.evaluate_every == 0 or state.round == rules.rounds
    )
    if not due:
        after, effects = _committed(rules, kept)
        return after, (*closing, *effects)
    evaluate = Evaluate(round=state.round, split="validation", sites=state.counted)
    after = _collect(rules, kept, Phase.EVALUATE, state.counted, now_s)
    return after, (*closing, evaluate)


def _committed(rules: Rules, state: State) -> Outcome:
    done = state.committed + 1
    # in the next round, done + 1, an update is late by done + 1 - round
    fresh = frozenset(f for f in state.flights if done + 1 - f.round <= rules.staleness_max)
    held = state.held & {flight.site for flight in fresh}
    return State(committed=done, flights=fresh, held=held), (Commit(round=done),)


def _test(rules: Rules, state: State, eligible: Sequence[str], now_s: float) -> Outcome:
    if not rules.evaluate_every or not eligible:
        return replace(state, phase=Phase.DONE), (Finish(),)
    sites = frozenset(eligible)
    after = _collect(rules, state, Phase.TEST, sites, now_s)
    return after, (Evaluate(round=state.committed, split="test", sites=sites),)
