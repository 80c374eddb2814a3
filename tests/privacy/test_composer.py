"""Composer: as `epsilon_pld`, with little composed twice, and no file trusted to say less."""

import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intramural.privacy.accountant import (
    RECORD_INTERVAL,
    SCREEN_INTERVAL,
    Event,
    Relation,
    epsilon_pld,
    epsilon_rdp,
    groups_of,
)
from intramural.privacy.composer import Composed, Composer
from tests.privacy.compositions import Count, forget_all

DELTA = 1e-5
TRAIN, OTHER, METRICS = (0.02, 2.0), (0.05, 3.0), (1.0, 30.0)


def events(*parts: tuple[tuple[float, float], int]) -> list[Event]:
    return [Event(sample_rate=q, noise_multiplier=noise, steps=n) for (q, noise), n in parts]


def told(composer: Composer, *parts: tuple[tuple[float, float], int]) -> float:
    return composer(events(*parts), delta=DELTA, relation="add-remove")


def anew(*parts: tuple[tuple[float, float], int]) -> float:
    return epsilon_pld(events(*parts), delta=DELTA, relation="add-remove")


def guarded() -> Composer:
    return Composer(guard=Composer(interval=SCREEN_INTERVAL))


def as_read(composer: Composer, *parts: tuple[tuple[float, float], int]) -> Composed:
    """Return what a composer composed of these events, as a file would give it back."""
    told(composer, *parts)
    composed = composer.composed(events(*parts), "add-remove")
    assert composed is not None
    return replace(composed, is_read=True)


def test_what_grows_costs_what_it_costs_composed_anew() -> None:
    composer = Composer()
    for parts in (
        [(TRAIN, 100)],
        [(TRAIN, 120)],
        [(TRAIN, 120), (METRICS, 1)],
        [(TRAIN, 140), (METRICS, 3)],
        [(TRAIN, 140), (METRICS, 3), (OTHER, 10)],
        [(METRICS, 3), (OTHER, 30), (TRAIN, 160)],
        [(TRAIN, 20)],
        [(METRICS, 2)],
    ):
        assert told(composer, *parts) == pytest.approx(anew(*parts), rel=1e-8)
    assert composer([], delta=DELTA, relation="add-remove") == 0.0


PARTS = st.dictionaries(
    st.sampled_from([TRAIN, OTHER, METRICS]), st.integers(1, 60), min_size=1, max_size=3
)


@settings(max_examples=15, deadline=None)
@given(
    grown=st.lists(PARTS, min_size=1, max_size=5),
    relation=st.sampled_from(["add-remove", "replace-one"]),
)
def test_epsilon_never_falls_and_is_never_less_than_that_of_all_events(
    grown: list[dict[tuple[float, float], int]], relation: Relation
) -> None:
    composer, spent, seen = Composer(interval=SCREEN_INTERVAL), Counter[tuple[float, float]](), 0.0
    for more in grown:
        spent.update(more)
        one = events(*spent.items())
        found = composer(one, delta=DELTA, relation=relation)
        own = epsilon_pld(one, delta=DELTA, relation=relation, interval=SCREEN_INTERVAL)
        assert found >= own * (1 - 1e-9)
        assert found == pytest.approx(own, rel=1e-6)
        assert found > seen
        seen = found


def test_what_stands_is_not_composed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_all()
    count, composer = Count(monkeypatch), Composer()
    told(composer, (TRAIN, 100), (OTHER, 50), (METRICS, 5))
    assert count.taken() == {"step": 3, "repeated": 2, "composed": 2}
    told(composer, (TRAIN, 100), (OTHER, 50), (METRICS, 5))
    composer(events((TRAIN, 100), (OTHER, 50), (METRICS, 5)), delta=1e-7, relation="add-remove")
    assert count.taken() == {}
    # a known mechanism: its new steps, and what stands with them and with the Gaussian
    told(composer, (TRAIN, 120), (OTHER, 50), (METRICS, 5))
    assert count.taken() == {"repeated": 1, "composed": 2}
    # a new one as well; nothing of the others is composed again
    told(composer, (TRAIN, 120), (OTHER, 50), ((0.03, 4.0), 10), (METRICS, 5))
    assert count.taken() == {"step": 1, "repeated": 1, "composed": 2}
    # a round as the last: its steps are known together
    told(composer, (TRAIN, 140), (OTHER, 50), ((0.03, 4.0), 10))
    assert count.taken() == {"composed": 1}


def test_useless_noise_is_told_by_its_bound_and_not_composed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = Count(monkeypatch)
    one = events(((0.01, 0.02), 2000))
    assert Composer()(one, delta=DELTA, relation="add-remove") == epsilon_rdp(one, delta=DELTA)
    assert count.taken() == {}


def test_what_is_given_is_built_upon(monkeypatch: pytest.MonkeyPatch) -> None:
    given_, composer = as_read(Composer(), (TRAIN, 100), (OTHER, 50)), guarded()
    composer.take("add-remove", given_)
    forget_all()
    count = Count(monkeypatch)
    found = told(composer, (TRAIN, 100), (OTHER, 50))
    assert count.taken(RECORD_INTERVAL) == {}
    assert found == pytest.approx(anew((TRAIN, 100), (OTHER, 50)), rel=1e-8)
    more = told(composer, (TRAIN, 120), (OTHER, 50))
    assert more == pytest.approx(anew((TRAIN, 120), (OTHER, 50)), rel=1e-8)
    # of another relation, or of steps that were never taken, it says nothing
    replaced = composer(events((TRAIN, 100)), delta=DELTA, relation="replace-one")
    assert replaced > told(composer, (TRAIN, 100)) == pytest.approx(anew((TRAIN, 100)), rel=1e-8)


@pytest.mark.parametrize("steps", [1, 50, 97])
def test_what_is_given_and_says_less_than_the_events_is_left_aside(steps: int) -> None:
    """97 of 100 steps would cost 1.6 % less."""
    forged = replace(as_read(Composer(), (TRAIN, steps)), groups=groups_of(events((TRAIN, 100))))
    composer = guarded()
    composer.take("add-remove", forged)
    assert told(composer, (TRAIN, 100)) == anew((TRAIN, 100))
    later = guarded()
    later.take("add-remove", forged)
    assert told(later, (TRAIN, 101)) == anew((TRAIN, 101))


@pytest.mark.parametrize("worth", [math.nan, -1.0, 0.0, 1.0])
def test_numbers_that_are_no_probabilities_are_left_aside(worth: float) -> None:
    given_ = as_read(Composer(), (TRAIN, 100))
    given_.distribution._pmf_remove._probs[:] = worth
    given_.distribution._pmf_add._probs[:] = worth
    composer = guarded()
    composer.take("add-remove", given_)
    forget_all()  # the arrays just written to are the accountant's own
    assert told(composer, (TRAIN, 100)) == anew((TRAIN, 100))
