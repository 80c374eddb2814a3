"""SiteDPFedAvg: what one site can move, what hides it, and what the rule refuses."""

from itertools import permutations
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from intramural.core.errors import AggregationError, ConfigError
from intramural.core.layout import Layout, Vector
from intramural.core.messages import Update
from intramural.privacy.random import SecureRandom
from intramural.strategies.exact_sum import MAGIC_BITS
from intramural.strategies.fedavg import FedAvg
from intramural.strategies.registry import make_rule
from intramural.strategies.rule import Fold
from intramural.strategies.site_dp import NOISE_REACH, Noise, SiteDPFedAvg, norm_of
from intramural.strategies.threads import CHUNK
from tests.strategies.updates import run_round, update
from tests.tiny import Json, federation

PRIVATE = {"clip_norm": 2.0, "noise_multiplier": 1.5, "delta": 1e-5}


def silent(size: int, std: float) -> Vector:
    """Return noise that hides nothing, so that what lies under it can be seen."""
    return np.zeros(size, dtype=np.float32)


def seeded(seed: int) -> Noise:
    """Return noise whose every call is the same."""

    def draw(size: int, std: float) -> Vector:
        return SecureRandom.seeded(seed).normal(size, std=std)

    return draw


def rule_of(**changes: Any) -> SiteDPFedAvg:
    settings: dict[str, Any] = {"clip_norm": 2.0, "noise_multiplier": 1.5, "divisor": 3}
    return SiteDPFedAvg(**(settings | {"noise": silent} | changes))


def deltas(count: int, size: int, *, seed: int = 0) -> list[Vector]:
    """Return deltas of very different lengths."""
    rng = np.random.default_rng(seed)
    lengths = 10.0 ** rng.uniform(-4, 4, count) / sqrt(size)
    return [(rng.standard_normal(size) * length).astype(np.float32) for length in lengths]


def updates(vectors: list[Vector]) -> list[Update]:
    return [update(v, site=f"site-{k}", weight=k + 1) for k, v in enumerate(vectors)]


def grid_sum(fold: Fold) -> NDArray[np.int64]:
    """Return the exact sum in grid units, as integers."""
    fold.work.settle()
    magic = np.int64((fold.work.terms * MAGIC_BITS + 2**63) % 2**64 - 2**63)
    return np.asarray(fold.work._sum - magic)


@pytest.mark.parametrize("size", [1, 7, CHUNK, 2 * CHUNK + 5])
def test_the_mean_is_the_naive_one_of_clipped_deltas(size: int) -> None:
    vectors = deltas(5, size)
    current = np.linspace(-1, 1, size, dtype=np.float32)
    naive = np.zeros(size)
    for vector in vectors:
        wide = vector.astype(np.float64)
        naive += wide * min(1.0, 2.0 / sqrt(wide @ wide))
    after, state = run_round(rule_of(divisor=4), {}, current, updates(vectors))
    np.testing.assert_allclose(after - current, naive / 4, rtol=1e-5, atol=2e-7)
    assert state == {}


def test_clipped_and_unclipped_by_hand() -> None:
    # |(3, 4)| = 5 is clipped to 2: (1.2, 1.6); |(0.6, 0.8)| = 1 stays; the sum over 4
    both = [update([3, 4], site="a", weight=900), update([0.6, 0.8], site="b", weight=1)]
    after, _ = run_round(rule_of(divisor=4), {}, np.zeros(2, np.float32), both)
    np.testing.assert_allclose(after, [0.45, 0.6], rtol=1e-6)


@pytest.mark.parametrize("clip_norm", [1e-6, 0.1, 1 / 3, 1.0, 1e6])
@pytest.mark.parametrize("noise_multiplier", [0.01, 1e4])  # the finest and the coarsest grid
@pytest.mark.parametrize("size", [1, 3, 50_000])
def test_one_site_moves_the_exact_sum_by_at_most_clip_norm(
    clip_norm: float, size: int, noise_multiplier: float
) -> None:
    rule = rule_of(clip_norm=clip_norm, noise_multiplier=noise_multiplier)
    grid = 2.0**rule._fraction_bits
    current = np.zeros(size, dtype=np.float32)
    rng = np.random.default_rng(1)
    flat = np.full(size, 1.0, dtype=np.float32)  # every value is rounded the same way
    lone = np.zeros(size, dtype=np.float32)
    lone[-1] = 3e38
    at_bound = (flat * np.float32(clip_norm / sqrt(size))).astype(np.float32)
    spread = rng.standard_normal(size).astype(np.float32)
    for vector in (flat, lone, at_bound, np.nextafter(at_bound, flat), spread, spread * 1e-30):
        without, beside = (rule.begin({}, current, round=1) for _ in range(2))
        for fold in (without, beside):
            for other in updates(deltas(3, size, seed=2)):
                rule.add(fold, other)
        rule.add(beside, update(vector, site="one more"))
        moved = (grid_sum(beside) - grid_sum(without)).astype(np.longdouble) / grid
        assert np.sqrt(np.square(moved).sum()) <= clip_norm
        if norm_of(vector) > clip_norm:  # and nearly all of the bound is used
            assert np.sqrt(np.square(moved).sum()) >= clip_norm * (1 - 1e-6)


@pytest.mark.parametrize("secure", [False, True])
def test_the_noise_has_the_promised_spread_on_the_sum(secure: bool) -> None:
    rng = np.random.default_rng(3)

    def drawn(size: int, std: float) -> Vector:
        return rng.normal(0.0, std, size).astype(np.float32)

    size, divisor = 200_000, 5
    rule = rule_of(noise=seeded(3) if secure else drawn, divisor=divisor)
    still = np.zeros(size, dtype=np.float32)
    after, _ = run_round(rule, {}, still, [update(still)])
    on_sum = after.astype(np.float64) * divisor
    # std = noise_multiplier * clip_norm = 3; its own standard error is 3 / sqrt(2 * 200000)
    assert on_sum.std() == pytest.approx(3.0, abs=5 * 3.0 / sqrt(2 * size))
    assert on_sum.mean() == pytest.approx(0.0, abs=5 * 3.0 / sqrt(size))
    # a Gaussian's share beyond two standard deviations
    assert np.mean(np.abs(on_sum) > 6.0) == pytest.approx(0.0455, abs=0.0025)


def test_the_noise_is_added_to_the_sum_of_the_clipped() -> None:
    vectors, current = deltas(3, 1000), np.zeros(1000, dtype=np.float32)
    plain, _ = run_round(rule_of(), {}, current, updates(vectors))
    noised, _ = run_round(rule_of(noise=seeded(4)), {}, current, updates(vectors))
    alone = SecureRandom.seeded(4).normal(1000, std=3.0)
    np.testing.assert_allclose(noised - plain, alone / 3, atol=1e-6)


def test_noise_is_drawn_once_a_release_and_anew_each_time() -> None:
    calls: list[tuple[int, float]] = []
    random = SecureRandom.seeded(5)

    def counted(size: int, std: float) -> Vector:
        calls.append((size, std))
        return random.normal(size, std=std)

    rule, still = rule_of(noise=counted), np.zeros(9, dtype=np.float32)
    results = [run_round(rule, {}, still, [update(still)])[0] for _ in range(2)]
    assert calls == [(9, 3.0), (9, 3.0)]
    assert not np.any(results[0] == results[1])


def test_the_order_of_updates_changes_no_bit() -> None:
    vectors, current = updates(deltas(4, 300)), np.ones(300, dtype=np.float32)
    rule = rule_of(noise=seeded(6))
    found = {run_round(rule, {}, current, order)[0].tobytes() for order in permutations(vectors)}
    assert len(found) == 1


def test_the_divisor_does_not_follow_who_answered() -> None:
    one = [update([0.9, 0.0], site="a")]
    two = [*one, update([0.0, 0.9], site="b")]
    still = np.zeros(2, dtype=np.float32)
    np.testing.assert_allclose(run_round(rule_of(), {}, still, one)[0], [0.3, 0.0], rtol=1e-6)
    np.testing.assert_allclose(run_round(rule_of(), {}, still, two)[0], [0.3, 0.3], rtol=1e-6)


def test_within_the_bound_and_without_noise_it_is_fedavg_with_its_settings() -> None:
    settings: dict[str, Any] = {"learning_rate": 0.5, "momentum": 0.9}
    ours = rule_of(clip_norm=1e4, **settings)
    theirs = FedAvg(weights="equal", **settings)
    a = b = np.ones(64, dtype=np.float32)
    memory_a: Any = {}
    memory_b: Any = {}
    for seed in range(3):
        vectors = updates([v / np.float32(100) for v in deltas(3, 64, seed=seed)])
        a, memory_a = run_round(ours, memory_a, a, vectors)
        b, memory_b = run_round(theirs, memory_b, b, vectors)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(memory_a["velocity"], memory_b["velocity"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (update([1, np.nan], site="b"), "not finite; it was left out"),
        (update([np.inf, 1], site="b"), "not finite; it was left out"),
        (update([1, -np.inf], site="b"), "not finite; it was left out"),
        (update([1, 1], site="a"), "in this round's sum already"),
    ],
)
def test_a_refused_update_leaves_no_trace(bad: Update, message: str) -> None:
    rule, good = rule_of(), update([1, 1], site="a")
    fold = rule.begin({}, np.zeros(2, dtype=np.float32), round=1)
    rule.add(fold, good)
    with pytest.raises(AggregationError, match=message):
        rule.add(fold, bad)
    assert (fold.sites, fold.weight) == (["a"], 1)
    after, _ = rule.finish(fold)
    np.testing.assert_allclose(after, [1 / 3, 1 / 3], rtol=1e-6)


def test_a_value_too_large_for_fedavg_is_clipped() -> None:
    after, _ = run_round(rule_of(), {}, np.zeros(1, np.float32), [update([-3e38])])
    np.testing.assert_allclose(after, [-2 / 3], rtol=1e-6)


def test_without_updates_there_is_no_release() -> None:
    drawn: list[int] = []

    def watched(size: int, std: float) -> Vector:
        drawn.append(size)
        return silent(size, std)

    with pytest.raises(AggregationError, match="no update to aggregate"):
        run_round(rule_of(noise=watched), {}, np.zeros(1, np.float32), [])
    assert drawn == []


@pytest.mark.parametrize("noise_multiplier", [0.01, 0.05, 1.0, 1e4])
@pytest.mark.parametrize("clip_norm", [1e-6, 1.0, 1e6])
def test_the_grid_has_room_for_many_sites_and_the_noises_tail(
    noise_multiplier: float, clip_norm: float
) -> None:
    def tail(size: int, std: float) -> Vector:
        return np.full(size, NOISE_REACH * std, dtype=np.float32)

    rule = rule_of(clip_norm=clip_norm, noise_multiplier=noise_multiplier, noise=tail, divisor=1)
    many = [update([3e38], site=str(k)) for k in range(1000)]
    after, _ = run_round(rule, {}, np.zeros(1, np.float32), many)
    expected = clip_norm * (1000 + NOISE_REACH * noise_multiplier)
    np.testing.assert_allclose(after, [expected], rtol=1e-6)


def test_a_federation_gets_the_rule_with_its_settings() -> None:
    config = federation(
        Path("b"),
        site_privacy=PRIVATE,
        sites={"min": 4},
        strategy={"weights": "equal", "momentum": 0.5},
    )
    rule = make_rule(config, Layout((("w", (2,)),)), noise=silent)
    assert isinstance(rule, SiteDPFedAvg)
    assert (rule.clip_norm, rule.noise_std, rule.divisor) == (2.0, 3.0, 4)
    assert not rule.traits.sums_only
    assert rule._average.momentum == 0.5


def test_it_is_off_by_default() -> None:
    config = federation(Path("b"), strategy={"weights": "equal"})
    assert config.site_privacy is None
    assert isinstance(make_rule(config, Layout((("w", (2,)),)), noise=silent), FedAvg)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"strategy": {"weights": "examples"}}, "strategy.weights = 'equal'.*set it, or remove"),
        ({"strategy": {"rule": "flwr:FedMedian"}}, "strategy.rule = 'fedavg'.*'flwr:FedMedian'"),
        ({"sites": {"min": 10}, "site_privacy": {"delta": 0.1}}, "delta must be below 1 / sites"),
        ({"site_privacy": {"delta": 0.0}}, "site_privacy.delta: .*above 0|greater than 0"),
        ({"site_privacy": {"clip_norm": 0.0}}, "site_privacy.clip_norm: "),
        ({"site_privacy": {"noise_multiplier": 0}}, "site_privacy.noise_multiplier: "),
        ({"site_privacy": {"noise_multiplier": float("inf")}}, "site_privacy.noise_multiplier: "),
        ({"site_privacy": {"epsilon": 1.0}}, "site_privacy.epsilon: unknown key"),
    ],
)
def test_a_federation_that_would_void_the_claim_is_refused(
    sections: dict[str, Json], message: str
) -> None:
    content: dict[str, Json] = {"strategy": {"weights": "equal"}, "site_privacy": PRIVATE}
    for name, keys in sections.items():
        content[name] = content.get(name, {}) | keys
    with pytest.raises(ConfigError, match=message):
        federation(Path("b"), **content)
