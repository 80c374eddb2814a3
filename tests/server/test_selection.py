"""Selection: uniform as ever, weighted as drawn one by one, and everybody in turn."""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest

from intramural.core.config import check_config
from intramural.core.errors import ConfigError
from intramural.core.federation_rounds import Sites
from intramural.server.selection import draw

NAMES = ["a", "b", "c", "d"]


def drawn(seed: int, size: int, *, history: Any = (), **sites: Any) -> tuple[str, ...]:
    config = check_config({"min": 1, **sites}, Sites, source="f.toml")
    return tuple(draw(config, NAMES, size, history=history, rng=np.random.default_rng(seed)))


def test_uniform_draws_are_those_of_earlier_versions() -> None:
    # NumPy's own draw without replacement, whose bits digests of old runs rest on
    for seed in range(20):
        places = np.random.default_rng(seed).choice(4, size=2, replace=False)
        assert drawn(seed, 2) == tuple(sorted(NAMES[p] for p in places))


def probability(subset: tuple[str, ...], weights: dict[str, float]) -> float:
    """Return how likely a set is when drawn one by one in proportion to the weights."""
    total = 0.0
    for order in itertools.permutations(subset):
        left, p = sum(weights.values()), 1.0
        for name in order:
            p *= weights[name] / left
            left -= weights[name]
        total += p
    return total


def test_weighted_draws_are_those_of_drawing_one_by_one() -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 6.0}
    trials = 4000
    seen = Counter(drawn(s, 2, selection="weighted", weights=weights) for s in range(trials))
    for subset in itertools.combinations(NAMES, 2):
        p = probability(subset, weights | {"d": 1.0})  # who is not named has 1
        deviation = np.sqrt(trials * p * (1 - p))
        assert abs(seen[subset] - trials * p) < 4.5 * deviation


def test_in_turn_everybody_takes_part_before_anybody_does_twice_more() -> None:
    history: list[dict[str, Any]] = []
    for round_ in range(8):
        cohort = drawn(round_, 3, history=history, selection="round-robin")
        history.append({"sites": cohort})
        counts = Counter(site for record in history for site in record["sites"])
        assert max(counts.values()) - min(counts[name] for name in NAMES) <= 1
    assert len({record["sites"] for record in history}) > 1


def test_in_turn_goes_by_who_took_part_and_the_draw_decides_among_equals() -> None:
    history = [{"sites": ["a", "b"]}, {"sites": ["a", "c", "d"]}]  # once: b, c, d
    seen = {drawn(s, 1, history=history, selection="round-robin") for s in range(50)}
    assert seen == {("b",), ("c",), ("d",)}


def test_weights_without_a_weighted_draw_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"sites\.weights are for sites\.selection"):
        drawn(0, 1, weights={"a": 2.0})
