"""Harmless keys: what may differ from an approved manifest, and what may never."""

from pathlib import Path
from typing import Any

import pytest

from intramural.client.harmless import ALWAYS, UNDER_PRIVACY, Difference, differences, same_shape
from intramural.core.federation import FederationConfig
from tests.client.envelopes import PRIVACY
from tests.tiny import Json, federation

HARMLESS: list[tuple[str, str, Any]] = [
    ("strategy", "learning_rate", 0.5),
    ("strategy", "momentum", 0.9),
    ("sites", "share", 0.5),
    ("sites", "deadline_s", 60.0),
    ("evaluation", "batch_size", 8),
]
"""What a coordinator does with updates that have left, and what changes no result."""
WITH_PRIVACY: list[tuple[str, str, Any]] = [
    ("federation", "seed", 8),
    ("training", "learning_rate", 0.2),
    ("training", "schedule", "cosine"),
    ("training", "warmup", 0.1),
    ("training", "weight_decay", 0.01),
    ("training", "momentum", 0.9),
    ("training", "gradient_clip", 1.0),
    ("training", "proximal", 0.1),
    ("sites", "quorum", 0.5),
    ("evaluation", "records_max", 10),
    ("evaluation", "every", 2),
]
"""Post-processing of noised gradients, and what a claim for one record does not rest on."""
NEVER: list[tuple[str, str, Any]] = [
    ("federation", "name", "other"),
    ("federation", "rounds", 3),
    ("model", "base", "other"),
    ("model", "digest", "sha256:" + "1" * 64),
    ("model", "max_length", 16),
    ("task", "labels", ["digestive", "circulatory", "mental", "respiratory"]),
    ("exchange", "kind", "head"),
    ("exchange", "rank", 4),
    ("training", "batch_size", 4),
    ("training", "local_steps", 3),
    ("training", "optimizer", "adamw"),
    ("training", "precision", "bfloat16"),
    ("strategy", "rule", "flwr:FedAdam"),
    ("strategy", "weight_cap", 10),
    ("strategy", "options", {"eta": 0.1}),
    ("sites", "min", 2),
    ("privacy", "noise_multiplier", 1.1),
    ("privacy", "clip_norm", 0.9),
    ("privacy", "delta", 1e-6),
    ("privacy", "nominal_records", 2001),
    ("privacy", "metrics_noise", 10.0),
]


def made(**sections: Json) -> FederationConfig:
    return federation(Path("base"), **{"strategy": {"weights": "equal"}, **sections})


def pair(
    section: str, key: str, value: Any, **sections: Json
) -> tuple[FederationConfig, FederationConfig]:
    """Return two federations that differ in one key."""
    plain = {"strategy": {"weights": "equal"}, **sections}
    changed = plain | {section: plain.get(section, {}) | {key: value}}
    return made(**plain), made(**changed)


def test_a_manifest_has_the_shape_of_itself() -> None:
    assert differences(made(), made()) == ()
    assert same_shape(made(), made())


@pytest.mark.parametrize(("section", "key", "value"), HARMLESS)
def test_what_changes_nothing_at_the_site_is_harmless(section: str, key: str, value: Any) -> None:
    assert f"{section}.{key}" in ALWAYS
    for privacy in ({}, {"privacy": PRIVACY}):
        first, second = pair(section, key, value, **privacy)
        assert same_shape(first, second)
        assert same_shape(second, first)


@pytest.mark.parametrize(("section", "key", "value"), WITH_PRIVACY)
def test_what_noise_covers_is_harmless_under_privacy_alone(
    section: str, key: str, value: Any
) -> None:
    first, second = pair(section, key, value, privacy=PRIVACY)
    assert same_shape(first, second)
    bare = pair(section, key, value)
    assert not same_shape(*bare)


@pytest.mark.parametrize(("section", "key", "value"), NEVER)
def test_what_decides_what_leaves_is_never_harmless(section: str, key: str, value: Any) -> None:
    assert f"{section}.{key}" not in ALWAYS | UNDER_PRIVACY
    first, second = pair(section, key, value, privacy=PRIVACY)
    assert not same_shape(first, second)
    assert not same_shape(second, first)


def test_every_key_on_the_lists_is_tried() -> None:
    assert {f"{section}.{key}" for section, key, _ in HARMLESS} == ALWAYS
    tried = {f"{section}.{key}" for section, key, _ in WITH_PRIVACY}
    assert tried == UNDER_PRIVACY | {"evaluation.every"}


def test_more_evaluations_are_not_harmless_where_each_is_charged() -> None:
    noised = {"privacy": PRIVACY | {"metrics_noise": 10.0}}
    assert not same_shape(*pair("evaluation", "every", 2, **noised))
    assert same_shape(*pair("evaluation", "records_max", 10, **noised))


def test_privacy_is_never_dropped_or_added_unseen() -> None:
    first, second = made(privacy=PRIVACY), made()
    assert not same_shape(first, second)
    assert not same_shape(second, first)
    hidden = made(site_privacy={"clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 0.1})
    assert not same_shape(hidden, made())


def test_one_harmful_key_among_harmless_ones_is_enough() -> None:
    first = made(privacy=PRIVACY)
    second = made(privacy=PRIVACY, federation={"seed": 1}, training={"batch_size": 9})
    assert [found.key for found in differences(first, second)] == [
        "federation.seed",
        "training.batch_size",
    ]
    assert not same_shape(first, second)


def test_differences_are_told_with_both_values() -> None:
    old = made(training={"learning_rate": 0.1})
    new = made(training={"learning_rate": 0.3, "gradient_clip": 1.0})
    assert differences(old, new) == (
        Difference(key="training.learning_rate", old=0.1, new=0.3),
        Difference(key="training.gradient_clip", old=None, new=1.0),
    )


def test_true_is_not_one() -> None:
    first, second = (
        made(strategy={"weights": "equal", "rule": "flwr:FedAdam", "options": {"eta": value}})
        for value in (1, True)
    )
    assert first.digest != second.digest
    assert [found.key for found in differences(first, second)] == ["strategy.options.eta"]
