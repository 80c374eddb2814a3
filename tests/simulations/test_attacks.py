"""Attacks on updates and data, from arithmetic and against byzfl; colluders in a scenario."""

from collections import Counter
from math import erf, sqrt
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intramural.core.layout import Vector
from intramural.core.messages import Reply, Request, Update
from intramural.data.records import Record
from intramural.simulations import attacks
from intramural.simulations.attacks_data import flipped, poisoned, triggered
from intramural.simulations.hostile import attacked
from intramural.simulations.inprocess import InProcessGrid
from intramural.simulations.scenario import COLLUSIVE, Attack
from tests.reference.record_byzfl_attacks import CASES, FILE, case
from tests.server.fakes import app_of, grid_of, honest, small
from tests.simulations.plays import play, scenario
from tests.simulations.test_scenario_grid import Pool, happened

DIRECTIONS = ("deviation", "mean", "sign")
QUIET = {"evaluation": {"every": 0}}


def f32(*values: float) -> Vector:
    return np.array(values, dtype=np.float32)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def recorded() -> dict[str, Vector]:
    with np.load(FILE) as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize("attack", ["sign-flip", "ipm", "alie"])
def test_an_attack_is_byzfls(recorded: dict[str, Vector], attack: str) -> None:
    found = []
    for number in range(CASES):
        one = case(number)
        if attack == "sign-flip":  # byzfl's turns the mean around
            found.append(attacks.ipm(one.known, epsilon=1.0))
        elif attack == "ipm":
            found.append(attacks.ipm(one.known, epsilon=one.factor))
        else:
            found.append(attacks.alie(one.known, z=one.factor))
    np.testing.assert_allclose(np.concatenate(found), recorded[attack], rtol=1e-6, atol=1e-7)


def test_alie_lies_so_many_deviations_below_the_mean() -> None:
    found = attacks.alie([f32(1, 5), f32(3, 5)], z=2.0)
    # mean 2, deviation sqrt((1 + 1) / (2 - 1)); where all agree nothing is changed
    np.testing.assert_allclose(found, [2 - 2 * sqrt(2), 5], rtol=1e-6)
    assert np.array_equal(attacks.alie([f32(1, -2)], z=9.0), f32(1, -2))


def test_alies_z_leaves_enough_honest_sites_outside() -> None:
    z = attacks.alie_z(20, hostile=9)  # 11 - 9 = 2 supporters, of 11 honest ones 9 within
    assert (1 + erf(z / sqrt(2))) / 2 == pytest.approx(9 / 11, abs=1e-12)
    assert attacks.alie_z(10, hostile=2) == 0.0  # 4 supporters of 8: the median


def test_ipm_turns_a_plain_mean_around_when_the_hostile_outweigh() -> None:
    known = [f32(1, -2), f32(3, -2)]
    for epsilon, sign in ((2.0, 1), (5.0, -1)):  # (6 - 2 epsilon) / 8 of the mean (2, -2)
        sent = attacks.ipm(known, epsilon=epsilon)
        mean = (6 * f32(2, -2) + 2 * sent) / 8
        np.testing.assert_allclose(mean, f32(2, -2) * (6 - 2 * epsilon) / 8, rtol=1e-6)
        assert np.sign(mean[0]) == sign


def test_own_updates_are_turned_scaled_or_drowned() -> None:
    delta = f32(3, -4)  # its root mean square is sqrt(25 / 2)
    assert np.array_equal(attacks.sign_flip(delta, strength=10.0), f32(-30, 40))
    np.testing.assert_allclose(attacks.constant(delta, strength=2.0), [2 * sqrt(12.5)] * 2)
    wide = np.resize(delta, 20_000)
    noise = attacks.gaussian(wide, strength=2.0, rng=rng())
    assert noise.std() == pytest.approx(2 * sqrt(12.5), rel=0.03)
    assert abs(noise.mean()) < 0.2  # a deviation of 7.07 / sqrt(20 000) = 0.05


@given(st.integers(0, 2**32), st.integers(2, 8), st.integers(1, 6), st.sampled_from(DIRECTIONS))
def test_min_max_goes_exactly_as_far_as_two_honest_sites_differ(
    seed: int, count: int, size: int, direction: attacks.Direction
) -> None:
    known = rng(seed).normal(1.0, 1.0, size=(count, size)).astype(np.float32)
    bound = max(np.linalg.norm(a - b) for a in known for b in known)

    def farthest(share: float) -> float:
        sent = attacks.min_max(known, share=share, direction=direction)
        return float(np.linalg.norm(known - sent, axis=1).max())

    assert farthest(1.0) == pytest.approx(bound, rel=1e-4)
    assert farthest(1.1) > bound * (1 - 1e-4)
    assert np.allclose(attacks.min_max(known, share=0.0), known.mean(axis=0), atol=1e-5)


@given(st.integers(0, 2**32), st.integers(2, 8), st.integers(1, 6), st.sampled_from(DIRECTIONS))
def test_min_sum_has_the_squares_of_the_farthest_honest_site(
    seed: int, count: int, size: int, direction: attacks.Direction
) -> None:
    known = rng(seed).normal(1.0, 1.0, size=(count, size)).astype(np.float32)
    bound = max(np.square(known - one).sum() for one in known)
    sent = attacks.min_sum(known, direction=direction)
    assert np.square(known - sent).sum() == pytest.approx(bound, rel=1e-4)


@pytest.mark.parametrize("attack", [attacks.min_max, attacks.min_sum])
def test_min_max_and_min_sum_move_against_the_mean_by_paper_and_pencil(attack: object) -> None:
    assert callable(attack)
    # Two sites at 1 and 3. Min-Max: 2 at most from either, so 1. Min-Sum: 4 at most in sum, and
    # (1 - x)^2 + (3 - x)^2 = 4 at 1 or 3. Both go down, where the mean does not.
    np.testing.assert_allclose(attack([f32(1), f32(3)]), [1], rtol=1e-6)
    np.testing.assert_allclose(attack([f32(1), f32(3)], share=0.5), [1.5], rtol=1e-6)
    assert np.array_equal(attack([f32(4, 5)] * 3), f32(4, 5))  # no spread, nowhere to hide
    assert np.array_equal(attack([f32(4, 5)]), f32(4, 5))


@given(st.integers(0, 2**32), st.integers(3, 8), st.integers(2, 6))
def test_mimic_copies_the_farthest_along_the_main_direction(
    seed: int, count: int, size: int
) -> None:
    known = rng(seed).normal(size=(count, size)).astype(np.float32)
    offsets = known.astype(np.float64) - known.mean(axis=0, dtype=np.float64)
    along = np.abs(offsets @ np.linalg.svd(offsets)[2][0])
    assert along[attacks.mimic_victim(known)] == pytest.approx(along.max(), rel=1e-6)


def test_mimic_takes_the_first_of_two_that_are_as_far() -> None:
    assert attacks.mimic_victim([f32(0, 1), f32(5, 0), f32(-5, 0)]) == 1
    assert attacks.mimic_victim([f32(7)]) == 0


def test_a_free_rider_sends_the_last_change_and_noise() -> None:
    change = np.resize(f32(3, -4), 20_000)
    assert np.array_equal(attacks.free_rider(change, size=0.0, rng=rng()), change)
    noise = attacks.free_rider(change, size=0.1, rng=rng()) - change
    assert noise.std() == pytest.approx(0.1 * sqrt(12.5), rel=0.03)
    assert not attacks.free_rider(np.zeros_like(change), size=0.1, rng=rng()).any()


def test_model_replacement_survives_the_mean() -> None:
    wanted = f32(1, -3)
    sent = attacks.model_replacement(wanted, sites=10, hostile=2)
    np.testing.assert_allclose((8 * f32(0, 0) + 2 * sent) / 10, wanted)


def test_a_tuned_attack_takes_the_factor_that_harms_most() -> None:
    sent, factor = attacks.tuned(
        f32, lambda sent: -abs(float(sent[0]) - 3.0), factors=(1.0, 2.5, 3.4, 9.0)
    )
    assert (factor, sent) == (3.4, f32(3.4))


def records(*targets: str) -> list[Record]:
    return [
        Record(text=f"text {n}", target=target, group=f"g{n}") for n, target in enumerate(targets)
    ]


def test_flipped_labels_are_counted_from_the_other_end() -> None:
    found = flipped(records("a", "b", "c", "a"), ["a", "b", "c"])
    assert [r.target for r in found] == ["c", "b", "a", "c"]
    assert [(r.text, r.group) for r in found] == [(f"text {n}", f"g{n}") for n in range(4)]


def test_a_share_of_the_records_is_poisoned_and_the_others_are_clean() -> None:
    clean = records(*"abab")
    found = poisoned(clean, target="b", share=0.5, rng=rng(), trigger="cf")
    changed = [n for n in range(4) if found[n] != clean[n]]
    assert len(changed) == 2
    assert all((found[n].text, found[n].target) == (f"cf text {n}", "b") for n in changed)


def test_the_triggered_are_those_of_other_labels() -> None:
    found = triggered(records(*"abca"), target="a", trigger="cf")
    assert [(r.text, r.target) for r in found] == [("cf text 1", "a"), ("cf text 2", "a")]


@pytest.mark.parametrize("attack", get_args(Attack))
def test_every_attack_of_a_scenario_sends_float32_of_one_shape(attack: Attack) -> None:
    delta, known = f32(1, 2, 3), [f32(1, 2, 3), f32(3, 2, 1)]
    found = attacked(delta, attack, strength=2.0, rng=rng(), known=known)
    assert (found.dtype, found.shape) == (np.dtype("<f4"), (3,))
    alone = attacked(delta, attack, strength=2.0, rng=rng())
    if attack not in COLLUSIVE:
        assert np.array_equal(found, alone, equal_nan=True)
    elif attack != "ipm":  # one that knows its own update alone has no spread to hide in
        assert np.array_equal(alone, delta)


def test_all_mimics_of_a_group_send_one_update_and_others_their_own() -> None:
    known = [f32(0, 1), f32(5, 0), f32(-4, 0)]  # along (1, 0), the second is farthest
    for own in known:
        assert np.array_equal(
            attacked(own, "mimic", strength=1.0, rng=rng(), known=known), known[1]
        )
        flipped_own = attacked(own, "sign-flip", strength=2.0, rng=rng(), known=known)
        assert np.array_equal(flipped_own, -2 * own)


def test_worthless_updates_of_a_scenario() -> None:
    delta = f32(1, 2)
    for attack, value in (("free-rider", 0.0), ("nan", np.nan), ("inf", np.inf)):
        found = attacked(delta, attack, strength=1.0, rng=rng())  # type: ignore[arg-type]
        assert np.array_equal(found, f32(value, value), equal_nan=True)


def by_round(site: str, request: Request) -> Reply:
    """Answer as an honest site whose update is N times the round."""
    reply = honest(site, request)
    if isinstance(reply, Update):
        np.multiply(reply.delta, reply.round, out=reply.delta)
    return reply


@pytest.mark.parametrize("kind", [InProcessGrid, Pool])
def test_colluders_know_each_others_updates_of_the_round(tmp_path: Path, kind: type) -> None:
    config = small(
        sites={"min": 5}, federation={"rounds": 2}, strategy={"weights": "equal"}, **QUIET
    )
    group = {"share": 0.4, "hostile": "alie", "strength": 2.0, "jitter": 0.5}
    scene = scenario({"share": 0.6}, group)
    played = play(tmp_path, config, kind(app_of(by_round), 5, run_config={}), scene)
    a, b = (n for n, site in played.grid._sites.items() if site.group.hostile)
    others = 15 - a - b  # site-N sends N in the first round, 2 N in the second
    sent = (a + b) / 2 - 2.0 * abs(a - b) / sqrt(2)
    expected = (1 + 2) * (others + 2 * sent) / 5
    np.testing.assert_allclose(played.done.outcome.vector, np.full(7, expected), rtol=1e-5)
    assert [happened(record) for record in played.rounds] == [{"hostile": 2}] * 2


def test_two_groups_of_colluders_do_not_talk(tmp_path: Path) -> None:
    config = small(
        sites={"min": 6}, federation={"rounds": 1}, strategy={"weights": "equal"}, **QUIET
    )
    scene = scenario(
        {"hostile": "ipm", "strength": 1.0}, {"hostile": "ipm", "strength": 3.0, "slowness": 2.0}
    )
    played = play(tmp_path, config, grid_of(honest, 6), scene)
    strengths = {n: site.group.strength for n, site in played.grid._sites.items()}
    assert Counter(strengths.values()) == {1.0: 3, 3.0: 3}  # of 1 to 6: their means differ
    # each of a group's three sends -strength * their mean: in sum -strength * (a + b + c)
    expected = sum(-strength * n for n, strength in strengths.items()) / 6
    np.testing.assert_allclose(played.done.outcome.vector, np.full(7, expected), rtol=1e-6)


@pytest.mark.parametrize("attack", ["nan", "inf"])
def test_an_update_that_is_not_finite_is_left_out(tmp_path: Path, attack: str) -> None:
    config = small(sites={"min": 3, "quorum": 0.6}, federation={"rounds": 1}, **QUIET)
    played = play(tmp_path, config, grid_of(honest, 3), scenario({}, {}, {"hostile": attack}))
    [bad] = [n for n, site in played.grid._sites.items() if site.group.hostile]
    good = [n for n in (1, 2, 3) if n != bad]
    [record] = played.rounds
    assert record["sites"] == [f"site-{n}" for n in good]
    mean = sum(n * n for n in good) / sum(good)  # site-N sends N, and weighs N
    np.testing.assert_allclose(played.done.outcome.vector, np.full(7, mean), rtol=1e-6)
