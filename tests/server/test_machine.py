"""RoundMachine: its promises under ten thousand orders of events, and its corners one by one."""

import random
from itertools import islice

import pytest

from intramural.server import machine
from intramural.server.machine import Answer, Phase, Rules, Sites, State, Tick
from tests.server.world import OVER, World, calm_events, random_event, random_rules

WALKS = 10_000
EVENTS_CALM_MAX = 200
"""Three rounds of seven sites take 3 * (1 + 7 + 1 + 7 + 1) + 10 = 61 events, twice retried."""


def walk(seed: int) -> World:
    """Run one random order of events with crashes, then a calm ending."""
    rng = random.Random(seed)
    world = World(random_rules(rng))
    for _ in range(rng.randint(0, 40)):
        world.feed(random_event(world, rng))
        if rng.random() < 0.02:
            world.crash()
    for event in islice(calm_events(world), EVENTS_CALM_MAX):
        world.feed(event)
    return world


@pytest.mark.parametrize("batch", range(10))
def test_no_order_of_events_breaks_a_promise(batch: int) -> None:
    for seed in range(batch, WALKS, 10):
        try:
            world = walk(seed)
            assert world.state.phase in OVER, "the run must end when all answers come"
            assert world.commits == list(range(1, len(world.commits) + 1))
            assert isinstance(world.effects[-1], machine.Finish)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error


def replay(rules: Rules, start: State, world: World, events: list[machine.Event]) -> World:
    """Return a world that began at `start` and met these events."""
    again = World(rules, state=start, commits=list(range(1, start.committed + 1)))
    for event in events:
        again.feed(event)
    return again


def test_a_run_resumed_after_any_commit_decides_as_the_uninterrupted_one() -> None:
    compared = 0
    for seed in range(WALKS, WALKS + 1000):
        rng = random.Random(seed)
        world = World(random_rules(rng))
        for _ in range(40):
            world.feed(random_event(world, rng))
        for event in islice(calm_events(world), EVENTS_CALM_MAX):
            world.feed(event)
        for committed, events, effects in world.marks:
            again = replay(world.rules, State(committed=committed), world, world.events[events:])
            assert again.effects == world.effects[effects:], f"seed {seed}"
            assert again.state == world.state
            compared += 1
    assert compared > 1000


def test_a_crash_at_every_event_costs_no_committed_round_and_repeats_none() -> None:
    rules = Rules(rounds=3, sites_min=2, evaluate_every=2)
    calm = World(rules)
    for event in calm_events(calm):
        calm.feed(event)
    for place in range(len(calm.events)):
        world = World(rules)
        for event in islice(calm_events(world), place):
            world.feed(event)
        done = list(world.commits)
        world.crash()
        for event in calm_events(world):
            world.feed(event)
        assert world.commits[: len(done)] == done
        assert world.commits == [1, 2, 3]
        assert world.state == calm.state


def opened(rules: Rules, names: str = "abc") -> World:
    """Return a world whose first round has just begun, at time 0."""
    world = World(rules)
    world.feed(Sites(eligible=sorted(names), now_s=0.0))
    assert world.state.phase is Phase.TRAIN
    return world


def reply(world: World, names: str, *, good: bool = True, excused: bool = False) -> None:
    """Let these sites answer what is asked now, and let the machine look."""
    state = world.state
    for name in names:
        world.feed(
            Answer(
                site=name,
                phase=state.phase,
                round=state.round,
                attempt=state.attempt,
                good=good,
                excused=excused,
            )
        )
    world.feed(Tick(now_s=world.now_s))


def kinds(world: World) -> list[str]:
    return [type(effect).__name__ for effect in world.effects]


def test_below_sites_min_the_round_waits_and_says_why() -> None:
    world = World(Rules(rounds=1, sites_min=3))
    effects = world.feed(Sites(eligible=("a", "b"), now_s=0.0))
    assert effects == (machine.Wait(reason="round 1 waits: 2 of 3 sites are ready"),)
    world.feed(Tick(now_s=1e9))
    assert world.state == State()


def test_the_deadline_closes_a_round_with_its_quorum_and_not_before() -> None:
    world = opened(Rules(rounds=1, sites_min=3, quorum=0.6, deadline_s=10.0, evaluate_every=0))
    reply(world, "ab")  # ceil(0.6 * 3) = 2
    world.feed(Tick(now_s=9.9))
    assert world.commits == []
    world.feed(Tick(now_s=10.0))
    assert world.commits == [1]


def test_the_deadline_does_not_close_a_round_without_its_quorum() -> None:
    world = opened(Rules(rounds=1, sites_min=3, quorum=0.6, deadline_s=10.0))
    reply(world, "a")
    reply(world, "b", good=False)
    world.feed(Tick(now_s=1e9))
    assert world.state.phase is Phase.TRAIN
    reply(world, "c")
    assert kinds(world)[-2:] == ["Aggregate", "Evaluate"]  # 2 good answers of 3 are a quorum


def test_a_round_is_retried_and_fails_after_its_last_attempt() -> None:
    world = opened(Rules(rounds=1, sites_min=3, attempts_max=2))
    reply(world, "ab")
    reply(world, "c", good=False)
    assert world.state == State(attempt=2, failures=1)
    world.feed(Sites(eligible=("a", "b", "c"), now_s=0.0))
    reply(world, "abc", good=False)
    why = "round 1: 0 good answers, 3 needed"
    assert world.effects[-2:] == [
        machine.Discard(round=1, reason=why),
        machine.Finish(failed=why),
    ]
    assert world.state.phase is Phase.FAILED


def attempted(world: World, good: str, excused: str, bad: str = "") -> None:
    """Let abc be asked once more, and answer so."""
    if world.state.phase is Phase.WAIT:
        world.feed(Sites(eligible=("a", "b", "c"), now_s=0.0))
    reply(world, excused, good=False, excused=True)
    reply(world, bad, good=False)
    reply(world, good)


@pytest.mark.parametrize(
    ("quorum", "good", "excused", "bad", "counts"),
    [
        (1.0, "ab", "c", "", False),  # 2 + 1 = 3, of 3 needed
        (1.0, "", "abc", "", False),  # 0 + 3
        (1.0, "a", "b", "c", True),  # 1 + 1 = 2: c was at fault, whatever b's people do
        (1.0, "", "", "abc", True),
        (0.6, "a", "b", "c", False),  # 1 + 1 = 2 = ceil(0.6 * 3)
        (0.6, "", "a", "bc", True),  # 0 + 1
    ],
)
def test_an_attempt_counts_only_if_the_excused_could_not_have_saved_it(
    quorum: float, good: str, excused: str, bad: str, counts: bool
) -> None:
    world = opened(Rules(rounds=1, sites_min=3, quorum=quorum, attempts_max=2))
    attempted(world, good, excused, bad)
    assert world.state == State(attempt=2, failures=1 if counts else 0)
    attempted(world, good, excused, bad)
    assert world.state.phase is (Phase.FAILED if counts else Phase.WAIT)


def test_excused_attempts_have_no_end_and_numbers_of_their_own_and_forgive_no_failure() -> None:
    world = opened(Rules(rounds=1, sites_min=3, attempts_max=2))
    attempted(world, "ab", "", "c")
    for number in range(2, 12):
        assert world.state == State(attempt=number, failures=1)
        attempted(world, "ab", "c")
    attempted(world, "ab", "", "c")  # the second that counts
    assert world.state.phase is Phase.FAILED


def test_a_committed_round_leaves_the_next_one_all_its_attempts() -> None:
    world = opened(Rules(rounds=2, sites_min=3, attempts_max=2, evaluate_every=0))
    attempted(world, "ab", "", "c")
    attempted(world, "abc", "")
    assert world.state == State(committed=1)


def test_a_second_answer_excuses_nobody() -> None:
    world = opened(Rules(rounds=1, sites_min=3, attempts_max=1))
    reply(world, "c", good=False)
    reply(world, "c", good=False, excused=True)
    reply(world, "ab")
    assert world.state.phase is Phase.FAILED


def test_an_answer_to_the_attempt_before_is_stale() -> None:
    world = opened(Rules(rounds=1, sites_min=1), "a")
    reply(world, "a", good=False)
    world.feed(Sites(eligible=("a",), now_s=0.0))
    effects = world.feed(Answer(site="a", phase=Phase.TRAIN, round=1, attempt=1, good=True))
    assert effects == (machine.Ignore(site="a", reason="stale"),)


@pytest.mark.parametrize(("site", "reason"), [("a", "duplicate"), ("z", "not-asked")])
def test_an_answer_that_nobody_waits_for_is_ignored(site: str, reason: str) -> None:
    world = opened(Rules(rounds=1, sites_min=3))
    first = Answer(site="a", phase=Phase.TRAIN, round=1, attempt=1, good=True)
    world.feed(first)
    again = Answer(site=site, phase=Phase.TRAIN, round=1, attempt=1, good=True)
    assert world.feed(again) == (machine.Ignore(site=site, reason=reason),)


@pytest.mark.parametrize(
    ("every", "evaluated"),
    [(0, []), (1, [1, 2, 3, 3]), (2, [2, 3, 3])],
)
def test_rounds_are_evaluated_when_due_and_the_last_one_twice(
    every: int, evaluated: list[int]
) -> None:
    world = World(Rules(rounds=3, sites_min=2, evaluate_every=every))
    for event in calm_events(world):
        world.feed(event)
    found = [e for e in world.effects if isinstance(e, machine.Evaluate)]
    assert [e.round for e in found] == evaluated
    assert [e.split for e in found if e.split == "test"] == (["test"] if every else [])
    assert world.state.phase is Phase.DONE


def test_a_round_whose_evaluation_nobody_answers_well_is_committed_all_the_same() -> None:
    world = opened(Rules(rounds=1, sites_min=3))
    reply(world, "abc")
    reply(world, "abc", good=False)
    assert world.commits == [1]


@pytest.mark.parametrize(("share", "count", "size"), [(0.55, 20, 11), (0.07, 100, 7), (1.0, 5, 5)])
def test_a_share_is_rounded_up_from_the_number_written(share: float, count: int, size: int) -> None:
    # 0.55 * 20 is 11.000000000000002 in floating point, which would ask for a twelfth site.
    names = [str(number) for number in range(count)]
    rules = Rules(rounds=1, sites_min=1, share=share, quorum=share)
    _, effects = machine.step(rules, State(), Sites(eligible=names, now_s=0.0))
    assert effects == (machine.Choose(round=1, eligible=names, size=size),)
    state = machine.chosen(rules, State(), frozenset(names), now_s=0.0)
    for number, name in enumerate(sorted(names)):
        late, effects = machine.step(rules, state, Tick(now_s=1e9))
        assert bool(effects) == (number >= size)
        if effects:
            break
        answer = Answer(site=name, phase=Phase.TRAIN, round=1, attempt=1, good=True)
        state, _ = machine.step(rules, late, answer)
