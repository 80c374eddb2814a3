"""Simulated worlds: whatever befalls coordinator, sites and lines, no promise of a run is broken.

Faults 1 to 9, 11, 12, 14 to 17, 25 and 29 of the reliability plan, a few hundred seeds of them; ten
thousand are `python -m tests.simworld --seeds 10000`.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest

from intramural.strategies.registry import make_rule
from tests.server.fakes import LAYOUT
from tests.simworld.hostile import EVALUATED, UPDATES
from tests.simworld.net import Weather
from tests.simworld.notary import undisturbed
from tests.simworld.office import BEGINNING
from tests.simworld.plan import (
    AT_COORDINATOR,
    AT_SITE,
    COORDINATOR,
    QUIET_S,
    Accident,
    Kind,
    Plan,
    planned,
    planned_buffered,
)
from tests.simworld.world import Broken, Result, simulate

SEEDS, SEEDS_BUFFERED, SEEDS_SLOW = 120, 60, 10_000
BATCHES = 8
SMALL = Plan(seed=1, sites=2, sites_min=2, momentum=0.5, deadline_s=600.0)


def accident(kind: str, whom: str = COORDINATOR, **changes: object) -> Accident:
    """Return an accident at once; fields named are changed."""
    usual = Accident(
        when_s=0.0,
        kind=kind,
        whom=whom,
        lasts_s=20.0,
        operation=1,
        how="after",
        power=False,
        same=False,
    )
    return replace(usual, **changes)  # type: ignore[arg-type]


@cache
def calm(plan: Plan) -> Result:
    return simulate(plan)


def last_time(result: Result) -> float:
    return float(result.lines[-1].split()[0])


@pytest.mark.parametrize("batch", range(BATCHES))
def test_no_seed_breaks_a_promise(batch: int) -> None:
    for seed in range(batch, SEEDS, BATCHES):
        simulate(planned(seed))


@pytest.mark.parametrize("batch", range(2))
def test_no_seed_with_a_buffer_breaks_a_promise(batch: int) -> None:
    late = 0
    for seed in range(batch, SEEDS_BUFFERED, 2):
        result = simulate(planned_buffered(seed))
        late += result.late
    assert late > 3


@pytest.mark.slow
def test_ten_thousand_seeds_break_no_promise() -> None:
    command = [sys.executable, "-m", "tests.simworld", "--seeds", str(SEEDS_SLOW)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_world_is_its_seed_s_alone() -> None:
    for seed in range(12):
        assert simulate(planned(seed)).trace == simulate(planned(seed)).trace


@pytest.mark.slow
def test_a_world_is_the_same_in_another_process() -> None:
    script = (
        "import json, logging\nlogging.disable(logging.CRITICAL)\n"
        "from tests.simworld.plan import planned\nfrom tests.simworld.world import simulate\n"
        "print(json.dumps([simulate(planned(seed)).trace for seed in range(40)]))"
    )
    told = []
    for salt in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": salt},
        )
        told.append(json.loads(done.stdout.splitlines()[-1]))
    assert told[0] == told[1]


def test_a_calm_world_ends_at_the_bits_of_the_formula() -> None:
    result = calm(SMALL)
    rounds = [("site-1", "site-2")] * SMALL.rounds
    federation = SMALL.federation
    digest = undisturbed(lambda: make_rule(federation, LAYOUT), BEGINNING.vector, rounds)
    assert (result.end, result.ends, result.digest) == ("finished", ("finished",), digest)
    assert (result.asked_again, result.discarded, result.resent) == (0, 0, 0)


def test_the_worlds_hold_what_they_are_to_hold() -> None:
    """Accidents that nobody meets prove nothing."""
    plans = [planned(seed) for seed in range(2000)]
    kinds = Counter((a.kind, a.whom == COORDINATOR) for plan in plans for a in plan.accidents)
    assert min(kinds.values()) > 20
    assert kinds.keys() == {(k, True) for k in AT_COORDINATOR} | {(k, False) for k in AT_SITE}
    assert {name for plan in plans for name in plan.hostile.values()} == {*UPDATES, *EVALUATED}
    for shown in ("lost", "doubled", "damaged"):
        assert sum(getattr(plan.weather, shown) > 0 for plan in plans) > 100
    assert sum(bool(plan.gone_s) for plan in plans) > 50
    assert Counter(plan.kind for plan in plans).keys() == {
        "plain",
        "private",
        "measured",
        "hidden",
    }


def operations(whom: str) -> int:
    """Return how many disk operations a host does in a calm world."""
    return calm(SMALL).operations[whom]


@pytest.mark.parametrize("power", [False, True], ids=["killed", "unplugged"])
@pytest.mark.parametrize("how", ["torn", "after"])  # before one is after another
def test_a_coordinator_that_dies_at_any_point_of_its_work_ends_at_the_same_bits(
    how: str, power: bool
) -> None:
    expected = calm(SMALL)
    for operation in range(1, operations(COORDINATOR) + 1):
        dies = accident("dies", operation=operation, how=how, power=power)
        result = simulate(replace(SMALL, accidents=(dies,)))
        assert result.ends == ("died", "finished"), operation
        assert result.digest == expected.digest, operation
        assert (result.discarded, result.trained) == (0, expected.trained), operation


@pytest.mark.parametrize("kind", ["plain", "measured"])
def test_a_site_that_dies_at_any_point_of_its_work_is_counted_once(kind: Kind) -> None:
    plan = replace(SMALL, kind=kind, rounds=1)
    expected = calm(plan)
    for operation in range(1, expected.operations["site-1"] + 1):
        how, power = ("torn", "after")[operation // 2 % 2], operation % 2 == 0
        dies = accident("dies", "site-1", operation=operation, how=how, power=power)
        result = simulate(replace(plan, accidents=(dies,)))
        assert result.ends == ("finished",), operation
        assert result.discarded == 0, operation
        assert kind != "plain" or result.digest == expected.digest, operation


@pytest.mark.parametrize("name", sorted({*UPDATES, *EVALUATED}))
def test_a_hostile_site_is_refused_and_holds_nobody_up(name: str) -> None:
    plan = Plan(seed=2, quorum=0.6, hostile={"site-2": name})
    result = simulate(plan)
    assert result.ends == ("finished",)
    assert last_time(result) < QUIET_S
    refused = [line for line in result.lines if "noticed site-2: " in line]
    others = ["site-1", "site-3"] if name in UPDATES else ["site-1", "site-2", "site-3"]
    assert len(refused) == (plan.rounds if name in UPDATES else plan.rounds + 1)
    assert sum(f"committed {n + 1} {others}" in "".join(result.lines) for n in range(2)) == 2


@pytest.mark.parametrize(
    "weather",
    [Weather(doubled=1.0), Weather(delay_s=(0.0, 60.0)), Weather(doubled=1.0, delay_s=(0.0, 60.0))],
    ids=["doubled", "out of order", "both"],
)
def test_lines_that_double_and_mix_change_no_bit(weather: Weather) -> None:
    expected = calm(Plan(seed=3))
    for seed in range(3, 8):
        result = simulate(Plan(seed=seed, weather=weather))
        assert (result.digest, result.discarded) == (expected.digest, 0)


def test_a_deadline_goes_by_no_calendar() -> None:
    """An hour forth would close the round at once; an hour back, an hour late."""
    straggler = {"site-3": (2000.0, 2000.0)}
    plan = Plan(seed=4, rounds=1, every=0, quorum=0.6, deadline_s=100.0, train_s=straggler)
    for forth in (True, False):
        jump = accident("clock", when_s=50.0, power=forth)
        result = simulate(replace(plan, accidents=(jump,)))
        (opened,) = (float(line.split()[0]) for line in result.lines if " opened 1" in line)
        (done,) = (float(line.split()[0]) for line in result.lines if " committed 1" in line)
        assert 100.0 <= done - opened < 170.0  # a coordinator oversleeps by a minute at most


def test_a_straggler_s_update_counts_in_no_later_round() -> None:
    straggler = {"site-3": (65.0, 65.0)}
    plan = Plan(seed=8, rounds=3, every=0, quorum=0.6, deadline_s=45.0, train_s=straggler)
    result = simulate(plan)
    assert any("answered site-3 train stale" in line for line in result.lines)
    committed = [line.split(" ", 1)[1] for line in result.lines if " committed " in line]
    assert len(committed) == 3
    assert not any("site-3" in line for line in committed)


def test_a_site_that_is_gone_is_named() -> None:
    result = simulate(Plan(seed=5, gone_s={"site-2": 0.0}))
    assert result.end == "waits"
    assert any("round 1 waits: 2 of 3 sites are ready" in line for line in result.lines)


@pytest.mark.parametrize("whom", [COORDINATOR, "site-1"])
@pytest.mark.parametrize("kind", ["full", "fsync"])
def test_a_bad_disk_stops_a_run_and_a_good_one_takes_it_up(kind: str, whom: str) -> None:
    expected = calm(Plan(seed=6))
    for when_s in (0.0, 5.0, 15.0, 30.0, 50.0, 70.0):
        bad = accident(kind, whom, when_s=when_s, lasts_s=60.0, power=True)
        result = simulate(Plan(seed=6, accidents=(bad,)))
        assert result.end == "finished"
        assert result.digest == expected.digest


def test_a_disk_that_stores_no_answer_is_waited_for_however_often_its_site_is_asked() -> None:
    """It takes a journal's line, so that the site passes each greeting, and fails each round."""
    unstored = accident("unstored", "site-2", lasts_s=200.0)
    result = simulate(Plan(seed=6, accidents=(unstored,)))
    assert (result.ends, result.digest) == (("finished",), calm(Plan(seed=6)).digest)
    assert result.discarded > 3  # more than a round may fail
    assert last_time(result) < 200.0 + 300.0


def test_sites_that_are_cut_off_come_back_and_the_run_goes_on() -> None:
    """Two of three for 200 s: longer than Flower waits for a node, shorter than the deadline."""
    cuts = tuple(accident("cut", f"site-{n}", when_s=12.0, lasts_s=200.0) for n in (1, 2))
    result = simulate(Plan(seed=9, deadline_s=600.0, accidents=cuts))
    assert result.ends == ("finished",)
    assert (result.digest, result.discarded) == (calm(Plan(seed=9, deadline_s=600.0)).digest, 0)
    assert result.asked_again > 0


def test_a_quorum_goes_on_without_sites_that_are_cut_off_and_they_rejoin() -> None:
    cut = accident("cut", "site-2", when_s=12.0, lasts_s=130.0)
    plan = Plan(seed=10, rounds=4, quorum=0.6, deadline_s=60.0, accidents=(cut,))
    result = simulate(plan)
    committed = [line for line in result.lines if " committed " in line]
    assert "site-2" not in committed[0]
    assert all("site-2" in line for line in committed[-2:])


def test_a_site_that_hangs_over_its_greeting_is_taken_when_it_answers() -> None:
    """Longer than a greeting is waited for."""
    hangs = accident("hang", "site-2", lasts_s=400.0)
    result = simulate(Plan(seed=11, accidents=(hangs,)))
    assert (result.ends, result.digest) == (("finished",), calm(Plan(seed=11)).digest)
    assert last_time(result) < 400.0 + 300.0


def test_under_privacy_a_round_that_is_tried_again_takes_the_same_updates() -> None:
    """Their ledgers have not grown in between, and were not rolled back."""
    full = accident("full", "site-2", when_s=12.0, lasts_s=40.0)
    result = simulate(Plan(seed=12, kind="private", accidents=(full,)))
    assert (result.ends, result.discarded) == (("finished",), 1)
    assert result.resent > 0
    assert not any("rolled-back" in line for line in result.lines)


def test_a_site_that_left_after_training_is_waited_for_to_evaluate() -> None:
    slow = {"site-1": (5.0, 5.0), "site-2": (5.0, 5.0), "site-3": (150.0, 150.0)}
    accidents = (
        accident("cut", "site-2", when_s=13.0, lasts_s=120.0),  # lost, so that nodes are looked at
        accident("kill", "site-1", when_s=40.0, lasts_s=300.0),
    )
    plan = Plan(seed=13, rounds=1, deadline_s=900.0, train_s=slow, accidents=accidents)
    result = simulate(plan)
    assert (result.ends, result.digest) == (("finished",), calm(Plan(seed=13, rounds=1)).digest)
    assert sum("answered site-1 evaluate well" in line for line in result.lines) == 1


def test_a_node_that_says_nothing_does_not_keep_a_lost_site_from_being_asked() -> None:
    accidents = (
        accident("kill", "site-1", when_s=12.0, lasts_s=20.0),
        accident("hang", "site-3", when_s=14.0, lasts_s=700.0),
        accident("kill", "site-3", when_s=13.0, lasts_s=30.0),
    )
    plan = Plan(seed=14, rounds=1, quorum=0.6, deadline_s=600.0, accidents=accidents)
    result = simulate(plan)
    (done,) = (float(line.split()[0]) for line in result.lines if " committed 1 " in line)
    good = [line for line in result.lines if "answered site-1 train well" in line]
    assert len(good) == 1
    assert float(good[0].split()[0]) < 400.0  # and not only at the deadline
    assert done < 1000.0


def test_a_broken_world_says_how_to_see_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("intramural.server.machine.share_of", lambda share, count: count - 1)
    with pytest.raises(Broken, match=r"see it again: python -m tests\.simworld --seed 7$"):
        simulate(Plan(seed=7, quorum=0.6, train_s={"site-3": (350.0, 400.0)}, sites_min=2))
