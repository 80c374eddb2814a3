"""The machine with a buffer: its promises under thousands of orders of events, and its corners."""

import random
from dataclasses import replace
from itertools import islice

import pytest

from intramural.server import machine
from intramural.server.machine import Answer, Flight, Phase, Rules, Sites, State, Tick
from tests.server.buffered import Buffered, calm_events, random_event, random_rules
from tests.server.world import OVER

WALKS = 4000
EVENTS_CALM_MAX = 400


def walk(seed: int) -> Buffered:
    """Run one random order of events with crashes, then a calm ending."""
    rng = random.Random(seed)
    world = Buffered(random_rules(rng), rng=rng)
    for _ in range(rng.randint(0, 60)):
        world.feed(random_event(world, rng))
        if rng.random() < 0.03:
            world.crash()
    for event in islice(calm_events(world), EVENTS_CALM_MAX):
        world.feed(event)
    return world


@pytest.mark.parametrize("batch", range(4))
def test_no_order_of_events_loses_an_update_or_counts_one_twice(batch: int) -> None:
    late = replaced = 0
    for seed in range(batch, WALKS, 4):
        try:
            world = walk(seed)
            check_end(world)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
        replaced += world.replaced
        late += sum(round_ > trip[1] for round_, trip in world.counted)
    assert late > 100  # updates from older rounds do count
    assert replaced > 20  # others are asked beside the silent


def check_end(world: Buffered) -> None:
    assert world.state.phase in OVER, "the run must end when all answers come"
    assert world.commits == list(range(1, len(world.commits) + 1))
    trips = [trip for _, trip in world.counted]
    assert len(trips) == len(set(trips)), "no update counts twice"
    sizes = [sum(r == round_ for r, _ in world.counted) for round_ in world.commits]
    assert sizes == [world.rules.buffer] * len(world.commits)
    kept = {trip for trip, fate in world.fate.items() if fate == "counted"}
    assert kept == {*trips, *world.fold}, "what counted is in a round"


def begun(rules: Rules, names: str = "abc") -> tuple[State, tuple[machine.Effect, ...]]:
    """Return the state when these sites have just been asked, at time 0."""
    state, effects = machine.step(rules, State(), Sites(eligible=sorted(names), now_s=0.0))
    (choose,) = effects
    assert isinstance(choose, machine.Choose)
    assert (list(choose.eligible), choose.size) == (sorted(names), len(names))
    return machine.chosen(rules, state, frozenset(names), 0.0), effects


def answered(
    rules: Rules, state: State, site: str, round_: int = 1, *, good: bool = True
) -> tuple[State, tuple[machine.Effect, ...]]:
    """Return what follows from an answer and a look at the clock, at time 1."""
    answer = Answer(site=site, phase=Phase.TRAIN, round=round_, attempt=1, good=good)
    state, first = machine.step(rules, state, answer)
    state, second = machine.step(rules, state, Tick(now_s=1.0))
    return state, (*first, *second)


RULES = Rules(rounds=9, sites_min=3, buffer=2, staleness_max=1, evaluate_every=0, deadline_s=10.0)


def test_a_full_buffer_closes_the_round_and_who_is_at_work_goes_on() -> None:
    state, _ = begun(RULES)
    state, effects = answered(RULES, state, "a")
    assert effects == (machine.Count(site="a"),)
    state, effects = answered(RULES, state, "b")
    assert effects[1:] == (machine.Aggregate(round=1), machine.Commit(round=1))
    assert state == State(committed=1, flights=frozenset({Flight(site="c", round=1, until_s=10)}))
    _, effects = machine.step(RULES, state, Sites(eligible=["a", "b", "c"], now_s=1.0))
    assert effects == (machine.Choose(round=2, eligible=["a", "b"], size=2),)


def test_an_update_of_an_older_round_counts_until_it_is_too_late() -> None:
    one = State(committed=1, flights=frozenset({Flight(site="c", round=1, until_s=10)}))
    state = machine.chosen(RULES, one, frozenset("ab"), 1.0)
    _, effects = answered(RULES, state, "c", round_=1)
    assert effects == (machine.Count(site="c"),)  # in round 2: late by 1, as is allowed
    for site in "ab":
        state, effects = answered(RULES, state, site, round_=2)
    assert effects[-1] == machine.Commit(round=2)
    assert state.flights == frozenset()  # in round 3 it would be late by 2
    state = machine.chosen(RULES, state, frozenset("abc"), 2.0)
    _, effects = answered(RULES, state, "c", round_=1)
    assert effects == (machine.Ignore(site="c", reason="stale"),)


def test_an_update_that_comes_while_a_round_is_evaluated_is_held_for_the_next() -> None:
    rules = Rules(rounds=9, sites_min=3, buffer=2, staleness_max=1)
    state, _ = begun(rules)
    for site in "ab":
        state, _ = answered(rules, state, site)
    assert state.phase is Phase.EVALUATE
    after, effects = answered(rules, state, "c")
    assert effects == (machine.Hold(site="c"),)
    assert after == replace(state, held=frozenset("c"))


def evaluated(rules: Rules, state: State, sites: str, now_s: float) -> State:
    """Return the state once these sites have evaluated, and the round is committed."""
    for site in sites:
        answer = Answer(site=site, phase=Phase.EVALUATE, round=state.round, attempt=1, good=True)
        state, _ = machine.step(rules, state, answer)
    state, effects = machine.step(rules, state, Tick(now_s=now_s))
    assert effects == (machine.Commit(round=state.committed),)  # and nobody expired
    return state


SLOWLY = replace(RULES, evaluate_every=1, quorum=0.5, staleness_max=5)
"""Rules of rounds that are evaluated; one of two evaluations is enough, after the deadline."""


def test_a_held_update_does_not_expire_however_long_the_evaluation_takes() -> None:
    state, _ = begun(SLOWLY)  # all are waited for until 10
    for site in "ab":
        state, _ = answered(SLOWLY, state, site)
    state, effects = answered(SLOWLY, state, "c")  # at 1, in time
    assert effects == (machine.Hold(site="c"),)
    state = evaluated(SLOWLY, state, "a", now_s=15.0)  # b is silent, until 1 + 10 at least
    assert state.held == frozenset("c")
    state = machine.chosen(SLOWLY, state, frozenset("ab"), 15.0)
    state, effects = answered(SLOWLY, state, "c", round_=1)
    assert effects == (machine.Count(site="c"),)
    assert (state.held, {flight.site for flight in state.flights}) == (frozenset(), {"a", "b"})


def test_a_held_update_that_another_full_buffer_keeps_waiting_does_not_expire() -> None:
    state, _ = begun(SLOWLY)
    for site in "ab":
        state, _ = answered(SLOWLY, state, site)
    state, _ = answered(SLOWLY, state, "c")
    state = evaluated(SLOWLY, state, "ab", now_s=15.0)
    state = machine.chosen(SLOWLY, state, frozenset("ab"), 15.0)
    for site in "abc":  # in the pull in which c is offered again, a and b fill the buffer
        answer = Answer(site=site, phase=Phase.TRAIN, round=1 + (site != "c"), attempt=1, good=True)
        state, _ = machine.step(SLOWLY, state, answer)
    state, effects = machine.step(SLOWLY, state, Tick(now_s=16.0))
    assert effects[0] == machine.Aggregate(round=2)
    assert {flight.site for flight in state.flights} == {"c"}


def test_a_flight_whose_deadline_passes_during_an_evaluation_is_still_waited_for() -> None:
    state, _ = begun(SLOWLY)
    for site in "ab":
        state, _ = answered(SLOWLY, state, site)
    # while a round is evaluated, what comes from c may be left in the post: c may have answered
    state = evaluated(SLOWLY, state, "a", now_s=15.0)
    state = machine.chosen(SLOWLY, state, frozenset("ab"), 15.0)
    _, effects = answered(SLOWLY, state, "c", round_=1)
    assert effects == (machine.Count(site="c"),)


def test_a_site_that_lets_its_deadline_pass_is_asked_anew_in_the_next_round() -> None:
    state, _ = begun(RULES)
    state, _ = answered(RULES, state, "a")
    for now_s in (9.9, 10.0, 1e9):
        assert machine.step(RULES, state, Tick(now_s=now_s)) == (state, ())
    answer = Answer(site="b", phase=Phase.TRAIN, round=1, attempt=1, good=True)
    state, _ = machine.step(RULES, state, answer)
    _, effects = machine.step(RULES, state, Tick(now_s=9.9))
    assert effects == (machine.Aggregate(round=1), machine.Commit(round=1))
    state, effects = machine.step(RULES, state, Tick(now_s=10.0))
    assert effects == (
        machine.Expired(site="c"),
        machine.Aggregate(round=1),
        machine.Commit(round=1),
    )
    assert state == State(committed=1)


def test_when_nobody_is_at_work_and_the_buffer_is_not_full_others_are_asked() -> None:
    state, _ = begun(RULES)
    state, _ = answered(RULES, state, "a")
    state, _ = answered(RULES, state, "b", good=False)
    state, effects = answered(RULES, state, "c", good=False)
    assert effects == (machine.Lack(round=1, reason="round 1: 1 good answers, 2 needed"),)
    assert state == State(attempt=2, failures=1, counted=frozenset("a"))
    _, effects = machine.step(RULES, state, Sites(eligible=["a", "b", "c"], now_s=11.0))
    assert effects == (machine.Choose(round=1, eligible=["b", "c"], size=2),)  # not a again


def test_when_all_at_work_let_their_deadline_pass_idle_sites_are_asked_beside_them() -> None:
    state, _ = begun(RULES)
    state, _ = answered(RULES, state, "a")
    for now_s, ready in ((9.9, "abcdef"), (10.0, "abc"), (10.0, "de")):
        tick = Tick(now_s=now_s, ready=list(ready))  # too early; nobody is idle; below sites.min
        assert machine.step(RULES, state, tick) == (state, ())
    state, (lack,) = machine.step(RULES, state, Tick(now_s=10.0, ready=list("abcdef")))
    assert isinstance(lack, machine.Lack)
    silent = frozenset(Flight(site=site, round=1, until_s=10.0) for site in "bc")
    # they may answer yet, and so it is no failure
    assert state == State(attempt=2, failures=0, counted=frozenset("a"), flights=silent)
    _, effects = machine.step(RULES, state, Sites(eligible=list("abcdef"), now_s=10.0))
    assert effects == (machine.Choose(round=1, eligible=list("def"), size=3),)
    state = machine.chosen(RULES, state, frozenset("def"), 10.0)
    assert machine.step(RULES, state, Tick(now_s=19.9, ready=list("abcdefg"))) == (state, ())
    _, effects = answered(RULES, state, "b")
    assert effects[0] == machine.Count(site="b")


def test_sites_that_let_their_deadline_pass_are_heard_though_the_others_left_meanwhile() -> None:
    state, _ = begun(RULES)
    state, _ = machine.step(RULES, state, Tick(now_s=10.0, ready=list("abcd")))
    assert (state.phase, state.attempt) == (Phase.WAIT, 2)
    _, effects = machine.step(RULES, state, Sites(eligible=list("ad"), now_s=10.0))
    assert effects == (machine.Choose(round=1, eligible=["d"], size=0),)  # and not Wait


def test_a_share_bounds_how_many_train_at_a_time() -> None:
    rules = Rules(rounds=9, sites_min=2, buffer=1, staleness_max=5, share=0.5)
    flights = frozenset(Flight(site=site, round=1, until_s=9.0) for site in "ab")
    state = State(committed=1, flights=flights)
    _, effects = machine.step(rules, state, Sites(eligible=list("abcdef"), now_s=1.0))
    assert effects == (machine.Choose(round=2, eligible=list("cdef"), size=1),)  # 3 of 6, less 2
