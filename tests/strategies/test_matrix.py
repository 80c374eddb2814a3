"""The matrix: what does not fit is refused at planning, with reason and nearest rule that fits."""

from itertools import product
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
    "hostile sites": {"strategy": {"hostile_max": 1}},
    "server optimizer": {"strategy": {"optimizer": "adam"}},
}
"""By column, what asks for it."""


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
    asked = federation(rule, ASKED[column])
    if declared or (rule, column) == ("scaffold", "server optimizer"):
        check_rule(asked)  # SCAFFOLD has a rate of its own, and says itself what it does not take
        return
    with pytest.raises(ConfigError, match=f"strategy.rule = '{rule}' does not go with"):
        check_rule(asked)


@pytest.mark.parametrize(
    ("rule", "column", "near"),
    [
        ("fedavg", "mixed ranks", "flexlora"),  # not exact, as it is not; needs no new base
        ("median", "mixed ranks", "flexlora"),
        ("fedsvd", "mixed ranks", "flora"),
        ("fedavg", "hostile sites", "median"),
        ("fedsvd", "server optimizer", "ffa-lora"),
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


def test_what_is_not_built_is_refused_and_not_ignored() -> None:
    with pytest.raises(ConfigError, match="are not built yet; remove the table"):
        check_rule(federation("fedavg", {"asynchrony": {"buffer": 3}}))


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
