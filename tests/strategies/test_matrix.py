"""The matrix: what does not fit is refused at planning, with reason and nearest rule that fits."""

import re
from itertools import combinations, product
from typing import Any

import pytest

from intramural.core.config import check_config
from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.strategies.catalogue import KINDS
from intramural.strategies.matrix import COLUMNS, table
from intramural.strategies.registry import check_rule

PRIVACY = {
    "unit": "record",
    "noise_multiplier": 1.0,
    "delta": 1e-5,
    "clip_norm": 1.0,
    "nominal_records": 100,
}
ASKED: dict[str, dict[str, Any]] = {
    "record DP": {"privacy": PRIVACY, "strategy": {"weights": "equal"}},
    "mixed ranks": {"exchange": {"rank_min": 2}},
    "asynchrony": {"asynchrony": {"buffer": 3}},
    "hostile sites": {"strategy": {"hostile_max": 1}},
    "server optimizer": {"strategy": {"optimizer": "adam"}},
}
"""By column, what asks for it."""
NEEDS: dict[str, dict[str, Any]] = {
    "trimmed-mean": {"strategy": {"hostile_max": 1}},
    "multi-krum": {"strategy": {"hostile_max": 1}},
    "scaffold": {"training": {"optimizer": "sgd"}, "strategy": {"weights": "equal"}},
}
"""By rule, what it needs of a federation that asks for nothing."""
SCAFFOLDS = ("scaffold", "server optimizer")
"""It has a rate of its own, and says itself what it does not take."""


def federation(rule: str, *asked: dict[str, Any], kind: str = "lora") -> FederationConfig:
    content: dict[str, Any] = {
        "federation": {"name": "a", "rounds": 1},
        "model": {"base": "b"},
        "task": {"kind": "generation"},
        "exchange": {"kind": kind},
        "training": {"learning_rate": 0.1, "local_steps": 1},
        "sites": {"min": 9},
        "strategy": {},
    }
    for sections in asked:
        for name, keys in sections.items():
            content[name] = content.get(name, {}) | keys
    content["strategy"]["rule"] = rule
    return check_config(content, FederationConfig, source="f.toml")


@pytest.mark.parametrize(("rule", "column"), list(product(KINDS, ASKED)))
def test_a_rule_goes_with_what_it_declares_and_with_nothing_else(rule: str, column: str) -> None:
    rows = table()
    (row,) = [row for row in rows if row[0] == rule]
    declared = row[rows[0].index(column)] == "yes"
    check_rule(federation(rule, NEEDS.get(rule, {})))
    asked = federation(rule, NEEDS.get(rule, {}), ASKED[column])
    if declared:
        check_rule(asked)
        return
    says = "needs" if (rule, column) == SCAFFOLDS else "does not go with"
    with pytest.raises(ConfigError, match=f"strategy.rule = '{rule}' {says}"):
        check_rule(asked)


@pytest.mark.parametrize(
    ("rule", "column", "near"),
    [
        ("fedavg", "mixed ranks", "flexlora"),  # not exact, as it is not; needs no new base
        ("median", "mixed ranks", "flexlora"),
        ("fedsvd", "mixed ranks", "flora"),
        ("fedavg", "hostile sites", "median"),
        ("fedsvd", "server optimizer", "rolora"),  # turns, and takes no late updates either
        ("scaffold", "record DP", "fedavg"),
        ("fednova", "record DP", "fedavg"),
        ("flwr:FedAvg", "hostile sites", "median"),
    ],
)
def test_the_refusal_names_the_nearest_rule_that_fits(rule: str, column: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"use '{near}', or leave") as refused:
        check_rule(federation(rule, ASKED[column]))
    check_rule(federation(near, ASKED[column]))  # and that is true
    assert any(c.key in str(refused.value) for c in COLUMNS if c.title == column)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_remedy_without_a_condition_is_one_that_runs(kind: str) -> None:
    more: list[dict[str, Any]] = [
        *ASKED.values(),
        {"strategy": {"before": "nnm"}},
        {"strategy": {"norm_bound": 1.0}},  # goes with no mixed ranks, whatever the rule
        {"strategy": {"hostile_max": 4}},  # median bears them at 9 sites, Krum does not
        {"strategy": {"hostile_max": 5}},  # nobody does
        {"sites": {"quorum": 0.2}},
    ]
    if kind == "full":
        more.remove(ASKED["mixed ranks"])
    remedies = 0
    bounded = (ASKED["mixed ranks"], {"strategy": {"norm_bound": 1.0}})
    for rule, asked in product([*KINDS, "flwr:FedAvg", "flwr:Krum"], combinations(more, 2)):
        if asked == bounded:
            continue
        try:
            check_rule(federation(rule, *asked, kind=kind))
        except ConfigError as error:
            named = re.search(r"use '([\w-]+)', or leave", str(error))
            if named:
                check_rule(federation(named[1], *asked, kind=kind))
                remedies += 1
    assert remedies > 50


def test_where_the_nearest_rule_needs_more_the_refusal_says_what() -> None:
    for asked, what in (
        ({"hostile_max": 5}, r"needs 11 updates a round, and sites\.min = 9"),
        ({"before": "nnm"}, r"set strategy\.hostile_max to at least 1"),
    ):
        with pytest.raises(ConfigError, match=f"use 'median' .which then needs more: .*{what}"):
            check_rule(federation("fedavg", {"strategy": asked}))


def test_late_updates_are_for_plain_means_of_what_never_turns() -> None:
    titles, *rows = table()
    place = titles.index("asynchrony")
    assert {row[0] for row in rows if row[place] == "yes"} == {"fedavg", "ffa-lora", "fedsa-lora"}


@pytest.mark.parametrize("asked", [{"hostile_max": 1}, {"hostile_max": 1, "before": "nnm"}])
def test_what_would_not_reach_a_rule_of_flowers_is_refused(asked: dict[str, Any]) -> None:
    options = {"options": {"num_malicious_nodes": 1}}
    check_rule(federation("flwr:Krum", {"strategy": options}))
    with pytest.raises(
        ConfigError, match=r"know strategy\.options alone.*; use 'median', or leave"
    ):
        check_rule(federation("flwr:Krum", {"strategy": options | asked}))


@pytest.mark.parametrize(
    ("rule", "strategy", "message"),
    [
        ("flwr:FedNope", {}, "'flwr:FedNope' cannot be used; can: "),
        ("median", {"hostile_max": 5}, "needs 11 updates a round"),
        ("krum", {"options": {"left_out": 3}}, "left_out must be 1 or 2"),
        ("scaffold", {"weights": "equal"}, r"training\.optimizer is 'adamw'"),
    ],
)
def test_what_needs_no_model_to_be_refused_is_refused_without_one(
    rule: str, strategy: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_rule(federation(rule, {"strategy": strategy}))


def test_what_nothing_goes_with_is_said() -> None:
    everything = federation("flora", ASKED["mixed ranks"], ASKED["hostile sites"])
    with pytest.raises(ConfigError, match="no rule goes with all that is asked"):
        check_rule(everything)


def test_the_rule_that_is_named_fits_all_that_is_asked_and_not_the_first_key_alone() -> None:
    asked = (ASKED["hostile sites"], ASKED["server optimizer"])
    with pytest.raises(ConfigError, match="use 'median'"):
        check_rule(federation("fedavg", *asked))


def test_a_rule_for_adapters_is_no_remedy_where_there_are_none() -> None:
    with pytest.raises(ConfigError, match="use 'fedavg'"):
        check_rule(federation("fednova", ASKED["record DP"], kind="full"))
    for rule, kind in KINDS.items():
        if kind.needs_lora:
            with pytest.raises(ConfigError, match=r"is for exchange\.kind = 'lora'"):
                check_rule(federation(rule, kind="full"))


def test_every_column_says_why_and_every_rule_has_a_paper() -> None:
    assert all(column.why and column.key for column in COLUMNS)
    assert all("https://" in kind.paper and kind.title for kind in KINDS.values())
