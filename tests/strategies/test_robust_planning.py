"""Robust rules of a federation: what it may name, and what is refused before a round is opened."""

from typing import Any

import numpy as np
import pytest

from intramural.core.config import check_config
from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout
from intramural.strategies.centred_clipping import CentredClipping
from intramural.strategies.fedavg import FedAvg
from intramural.strategies.norm_bound import NormBound
from intramural.strategies.registry import make_rule
from intramural.strategies.robust import KINDS, Robust
from intramural.strategies.robust_distance import GeometricMedian, Krum
from intramural.strategies.rule import Rule
from intramural.strategies.site_dp import SiteDPFedAvg
from tests.strategies.updates import run_round, update

LAYOUT = Layout((("w", (2,)),))


def rule_of(
    sites: dict[str, Any] | None = None, tables: dict[str, Any] | None = None, **strategy: Any
) -> Rule:
    table = {
        "federation": {"name": "a", "rounds": 1, "seed": 5},
        "model": {"base": "b"},
        "task": {"kind": "generation"},
        "exchange": {"kind": "lora"},
        "training": {"learning_rate": 0.1, "local_steps": 1},
        "sites": sites or {"min": 10},
        "strategy": strategy,
    }
    federation = check_config(table | (tables or {}), FederationConfig, source="f.toml")
    return make_rule(federation, LAYOUT, noise=lambda size, std: np.zeros(size, np.float32))


@pytest.mark.parametrize("name", list(KINDS))
def test_every_robust_rule_can_be_named(name: str) -> None:
    rule = rule_of(rule=name, hostile_max=2, before="nnm")
    assert isinstance(rule, Robust)
    assert (rule.name, rule.hostile_max, rule.before, rule.seed) == (name, 2, "nnm", 5)
    assert rule.traits is KINDS[name].traits
    assert rule.traits.byzantine
    assert (rule.traits.sums_only, rule.traits.asynchronous) == (False, False)


def test_options_reach_the_rule() -> None:
    def combiner(**strategy: Any) -> object:
        rule = rule_of(hostile_max=1, **strategy)
        assert isinstance(rule, Robust)
        return rule.combiner

    assert combiner(rule="krum", options={"left_out": 1}) == Krum(left_out=1)
    assert combiner(rule="krum") == Krum(left_out=2)
    options: dict[str, Any] = {"smoothing": 0.1, "iterations": 3}
    expected: object = GeometricMedian(smoothing=0.1, iterations=3)
    assert combiner(rule="geometric-median", options=options) == expected
    options = {"radius": 2, "iterations": 1}
    expected = CentredClipping(radius=2.0, iterations=1)
    assert combiner(rule="centred-clipping", options=options) == expected
    assert combiner(rule="centred-clipping") == CentredClipping(radius=None)
    rule = rule_of(rule="median", hostile_max=1, before="bucketing", options={"bucket": 3})
    assert isinstance(rule, Robust)
    assert (rule.bucket, rule.least) == (3, 7)  # three buckets: 3 3 1


@pytest.mark.parametrize(
    ("sites", "strategy", "least"),
    [
        ({"min": 5}, {"rule": "median", "hostile_max": 2}, 5),
        ({"min": 4}, {"rule": "median", "hostile_max": 2}, 5),
        ({"min": 7}, {"rule": "krum", "hostile_max": 2}, 7),
        ({"min": 6}, {"rule": "multi-krum", "hostile_max": 2}, 7),
        ({"min": 10, "quorum": 0.5}, {"rule": "trimmed-mean", "hostile_max": 2}, 5),
        ({"min": 10, "quorum": 0.4}, {"rule": "trimmed-mean", "hostile_max": 2}, 5),
        ({"min": 20, "quorum": 0.55}, {"rule": "median", "hostile_max": 5}, 11),  # 11, not 12
        ({"min": 5}, {"rule": "median", "hostile_max": 1, "before": "bucketing"}, 5),
        ({"min": 4}, {"rule": "median", "hostile_max": 1, "before": "bucketing"}, 5),
    ],
)
def test_a_round_that_may_close_with_too_few_is_refused(
    sites: dict[str, Any], strategy: dict[str, Any], least: int
) -> None:
    fewest = int(sites["min"] * sites.get("quorum", 1.0) + 0.5)
    if fewest >= least:
        assert isinstance(rule_of(sites, **strategy), Robust)
        return
    with pytest.raises(ConfigError, match=f"needs {least} updates a round.* with {fewest}; raise"):
        rule_of(sites, **strategy)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ({"rule": "trimmed-mean"}, "'trimmed-mean' with strategy.hostile_max = 0 is the plain m"),
        ({"rule": "multi-krum"}, "'multi-krum' with strategy.hostile_max = 0 is the plain mean"),
        ({"rule": "median", "before": "nnm"}, "strategy.before = 'nnm' with strategy.hostile_max"),
        ({"rule": "median", "options": {"bucket": 2}}, "bucket is for strategy.before = 'bucketi"),
        (
            {"rule": "median", "before": "bucketing", "options": {"bucket": 1}},
            "strategy.options.bucket must be a whole number of at least 2, got 1",
        ),
        ({"rule": "krum", "options": {"left_out": 3}}, "left_out must be 1 or 2, got 3"),
        ({"rule": "median", "options": {"radius": 1}}, "median takes .'bucket'., not .'radius'."),
        ({"rule": "centred-clipping", "options": {"radius": 0}}, "radius must be a number above 0"),
        ({"rule": "geometric-median", "options": {"iterations": 0}}, "iterations must be a whole"),
    ],
)
def test_what_makes_no_sense_is_refused(strategy: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rule_of(**strategy)


@pytest.mark.parametrize("name", ["fedavg", "median", "flwr:FedAvg"])
def test_a_norm_bound_stands_before_any_rule(name: str) -> None:
    rule = rule_of(rule=name, norm_bound=5.0)
    # the longer one is (6, 8) of length 10, cut to (3, 4)
    updates = [update([6, 8], site="a"), update([3, 4], site="b")]
    got, _ = run_round(rule, {}, np.zeros(2, np.float32), updates)
    np.testing.assert_allclose(got, [3, 4], rtol=1e-6)
    assert rule.name == name


@pytest.mark.parametrize("name", ["flora", "flexlora"])
def test_a_norm_bound_is_refused_where_ranks_are_mixed(name: str) -> None:
    # a site of rank 1 of 3 sends minus the factors it lacks: long, however little it trained
    lora = {"kind": "lora", "rank": 3, "rank_min": 1, "alpha": 6.0}
    with pytest.raises(ConfigError, match=r"norm_bound .* remove one of the two"):
        rule_of(rule=name, norm_bound=1.0, tables={"exchange": lora})


def test_without_a_norm_bound_there_is_none() -> None:
    assert isinstance(rule_of(rule="fedavg"), FedAvg)
    assert isinstance(rule_of(rule="fedavg", norm_bound=1.0), NormBound)


def test_site_privacy_has_its_own_bound() -> None:
    tables = {"site_privacy": {"noise_multiplier": 1.0, "delta": 1e-5, "clip_norm": 1.0}}
    hidden: dict[str, Any] = {"rule": "fedavg", "weights": "equal"}
    assert isinstance(rule_of(tables=tables, **hidden), SiteDPFedAvg)
    with pytest.raises(ConfigError, match="cuts updates to its clip_norm; remove it"):
        rule_of(tables=tables, norm_bound=1.0, **hidden)
