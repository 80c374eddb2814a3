"""Scenarios as files: what is refused, who is in which group, and when a site is connected."""

from collections import Counter
from itertools import pairwise
from math import inf
from pathlib import Path

import numpy as np
import pytest

from intramural.core.errors import ConfigError
from intramural.simulations.presence import HOUR_S, Presence
from intramural.simulations.scenario import Group, load_scenario, shipped_scenarios
from intramural.simulations.sim_clock import IDLE_S_MAX, SimClock
from tests.simulations.plays import scenario
from tests.tiny import Json


def group(**keys: object) -> Group:
    return Group.model_validate({"name": "site", "share": 1.0} | keys)


def presence(
    *, offset_h: float = 0.0, start_hour: float = 0.0, seed: int = 1, **keys: object
) -> Presence:
    rng = np.random.default_rng(seed)
    return Presence(group(**keys), offset_h=offset_h, start_hour=start_hour, rng=rng)


def test_every_shipped_scenario_bears_the_name_of_its_file() -> None:
    names = shipped_scenarios()
    assert {"calm", "stragglers", "hospitals-on-vpn", "hostile-minority"} <= set(names)
    assert [load_scenario(name).name for name in names] == names


def test_a_scenario_is_found_by_name_and_by_file(tmp_path: Path) -> None:
    text = (Path(load_scenario.__code__.co_filename).parent / "scenarios/calm.toml").read_text()
    own = tmp_path / "own.toml"
    own.write_text(text.replace("latency_s = 0.001", "latency_s = 2.5"))
    assert load_scenario(str(own)).groups[0].latency_s == 2.5
    assert load_scenario(str(own)).digest != load_scenario("calm").digest
    with pytest.raises(ConfigError, match=r"neither a file nor one of calm, .*thin-links"):
        load_scenario("clam")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"drop_out": 0.6, "crash": 0.5}, "together exceed 1"),
        ({"hours": [8, 8]}, "begin and end at one time"),
        ({"hours": [0, 24]}, "begin and end at one time"),
        ({"offset_hours": []}, "offset_hours is empty"),
        ({"on_hours": 1.0}, "set both or none"),
        ({"slowness": 0.0}, "greater than 0"),
        ({"hostile": "rude"}, "sign-flip"),
        ({"hostile": "nan", "strength": 1.0}, "'nan' has no strength"),
        ({"hostile": "mimic", "strength": 2.0}, "'mimic' has no strength"),
        ({"hostile": "min-max", "strength": 1.5}, "is a share; set it to at most 1"),
        ({"speed": 2.0}, "groups.0.speed"),
        ({"share": 0.5}, "add up to 0.5"),
    ],
)
def test_an_impossible_group_is_refused_by_name(keys: Json, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scenario(keys)


def test_an_impossible_scenario_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one table"):
        scenario(groups=[])
    with pytest.raises(ConfigError, match=r"two .* have one name"):
        scenario({"name": "a"}, {"name": "a"})
    with pytest.raises(ConfigError, match="no partition is called 'fair'"):
        scenario(partition="fair")


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        (10, {"a": 7, "b": 2, "c": 1}),
        (3, {"a": 2, "b": 1}),  # 2.1, 0.6, 0.3
    ],
)
def test_groups_have_their_shares_of_the_sites(sites: int, expected: dict[str, int]) -> None:
    shares = {"a": 0.7, "b": 0.2, "c": 0.1}
    scene = scenario(*({"name": name, "share": share} for name, share in shares.items()))
    found = Counter(g.name for g in scene.groups_of(sites, seed=7))
    assert sum(found.values()) == sites
    assert found == expected
    names = [[g.name for g in scene.groups_of(40, seed=seed)] for seed in (7, 7, 8)]
    assert names[0] == names[1] != names[2]


def test_opening_hours_follow_the_sites_own_clock() -> None:
    # The coordinator's clock shows 6 at second 0, the site's 8: it opens in 1 hour, for 8 hours.
    site = presence(hours=[9, 17], offset_h=2.0, start_hour=6.0)
    assert [site.is_here(h * HOUR_S) for h in (0, 0.99, 1, 8.99, 9, 24.99, 25)] == [
        *(False, False, True, True, False, False, True)
    ]
    assert site.next_change(0.0) == 1 * HOUR_S
    assert site.next_change(1 * HOUR_S) == 9 * HOUR_S
    assert site.next_change(10 * HOUR_S) == 25 * HOUR_S


@pytest.mark.parametrize("attack", ["alie", "min-max", "min-sum", "mimic"])
def test_one_site_alone_cannot_collude(attack: str) -> None:
    honest = {"name": "a", "share": 0.8}
    scene = scenario(honest, {"name": "b", "share": 0.2, "hostile": attack})
    with pytest.raises(ConfigError, match="takes two sites, and of 5 it has 1; raise its share"):
        scene.groups_of(5, seed=7)
    assert len(scene.groups_of(10, seed=7)) == 10


def test_one_site_alone_can_turn_its_own_update() -> None:
    scene = scenario({"name": "a", "share": 0.8}, {"name": "b", "share": 0.2, "hostile": "ipm"})
    assert len(scene.groups_of(5, seed=7)) == 5


@pytest.mark.parametrize("offset_h", [-24.0, 0.0, 24.0])
def test_hours_over_midnight_are_open_at_the_start(offset_h: float) -> None:
    site = presence(hours=[22, 6], offset_h=offset_h, start_hour=2.0)
    assert site.is_here(0.0)
    assert site.next_change(0.0) == 4 * HOUR_S
    assert site.next_change(4 * HOUR_S) == 20 * HOUR_S


def test_a_site_without_hours_never_leaves() -> None:
    site = presence()
    assert site.is_here(0.0)
    assert site.is_here(1e9)
    assert site.next_change(1e9) == inf


def test_coming_and_going_has_the_means_that_were_asked_for() -> None:
    site = presence(on_hours=3.0, off_hours=1.0)
    changes, now_s = [], 0.0
    for _ in range(4000):
        now_s = site.next_change(now_s)
        changes.append(now_s)
    spans = [(b - a, site.is_here(a)) for a, b in pairwise(changes)]
    on, off = ([s / HOUR_S for s, here in spans if here is kind] for kind in (True, False))
    # 2000 exponentials: the mean's own deviation is mean / sqrt(2000), 2.2 %; four of them
    assert np.mean(on) == pytest.approx(3.0, rel=0.09)
    assert np.mean(off) == pytest.approx(1.0, rel=0.09)


def test_looking_in_another_order_finds_the_same_times() -> None:
    one, two = presence(on_hours=1.0, off_hours=1.0), presence(on_hours=1.0, off_hours=1.0)
    times = np.random.default_rng(0).uniform(0, 1e6, 300)
    later = {float(t): two.is_here(t) for t in sorted(times, reverse=True)}
    assert {float(t): one.is_here(t) for t in times} == later
    assert 50 < sum(later.values()) < 250


def test_hours_and_churn_together_need_both() -> None:
    both = presence(hours=[9, 17], on_hours=2.0, off_hours=2.0, seed=3)
    hours, churn = presence(hours=[9, 17]), presence(on_hours=2.0, off_hours=2.0, seed=3)
    times = np.arange(0.0, 40 * 24 * HOUR_S, 500.0)
    expected = [hours.is_here(t) and churn.is_here(t) for t in times]
    assert [both.is_here(t) for t in times] == expected
    assert 0 < sum(expected) < len(times) / 3


def test_a_sleep_ends_at_what_is_due_next_and_leaps_over_nothing() -> None:
    clock = SimClock(5.0)
    clock.alarm(30.0)
    clock.alarm(12.5)
    clock.follow(lambda now_s: 20.0 if now_s < 20.0 else inf)
    seen = []
    for _ in range(5):
        clock.sleep(0.2)
        seen.append(clock.monotonic())
    assert seen == [12.5, 20.0, 30.0, 30.0 + IDLE_S_MAX, 30.0 + 2 * IDLE_S_MAX]
    clock.sleep(100.0)  # nothing is due: as long as was asked for
    assert clock.monotonic() == 30.0 + 2 * IDLE_S_MAX + 100.0
