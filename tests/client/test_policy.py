"""Policy: the site's own limits win, and only tighten."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intramural.client.policy import (
    bytes_a_round,
    check_manifest,
    check_records,
    is_open,
    violations,
)
from intramural.core.errors import Refused
from intramural.core.federation import FederationConfig
from intramural.core.site import SitePolicy
from intramural.privacy.plan import PrivacyPlan
from tests.client.envelopes import PRIVACY
from tests.tiny import Json, federation

ONE, TWO = "sha256:" + "1" * 64, "sha256:" + "2" * 64
EQUAL = {"weights": "equal"}


def made(**sections: Json) -> FederationConfig:
    return federation(Path("base"), **sections)


def private(**sections: Json) -> FederationConfig:
    return made(**{"privacy": PRIVACY, "strategy": EQUAL, **sections})


def policy(**keys: object) -> SitePolicy:
    return SitePolicy.model_validate(keys)


def bare(**keys: object) -> SitePolicy:
    return policy(require_privacy=False, **keys)


def keys_of(limits: SitePolicy, config: FederationConfig, **known: Any) -> list[str]:
    return [violation.key for violation in violations(limits, config, **known)]


def local(text: str) -> datetime:
    """Return a moment of this machine's local time."""
    return datetime.fromisoformat(f"2026-03-02T{text}").astimezone()


def test_a_federation_within_the_limits_passes() -> None:
    check_manifest(bare(), made())
    check_manifest(policy(), private())
    check_manifest(policy(), private(exchange={"kind": "head"}))
    check_manifest(bare(exchange=["lora", "full"]), made(exchange={"kind": "full"}))


CASES: list[tuple[str, SitePolicy, FederationConfig, FederationConfig, str]] = [
    ("require_privacy", policy(), private(), made(), "asks for no [privacy]"),
    (
        "exchange",
        bare(),
        made(),
        made(exchange={"kind": "full"}),
        "policy.exchange allows ['lora', 'head'], the federation asks for exchange.kind = 'full'",
    ),
    (
        "trained_modules",
        bare(exchange=["lora"]),
        made(exchange={"trained_modules": ["classifier", "bert.pooler", "pooler.dense"]}),
        made(exchange={"trained_modules": ["classifier", "encoder"]}),
        "policy.trained_modules allows ['classifier', 'pooler', 'pre_classifier', 'score'] to be "
        "trained whole, the federation asks for exchange.trained_modules with ['encoder']",
    ),
    (
        "trained_modules",
        bare(trained_modules=["layer.11", "score"]),
        made(exchange={"kind": "head", "trained_modules": ["encoder.layer.11.output"]}),
        made(exchange={"kind": "head", "trained_modules": ["layer.1", "xscore", "layer"]}),
        "exchange.trained_modules with ['layer.1', 'xscore', 'layer']",
    ),
    (
        "trained_modules",
        bare(trained_modules=[], exchange=["lora", "full"]),
        made(exchange={"kind": "full", "trained_modules": ["encoder"]}),  # policy.exchange's affair
        made(exchange={"trained_modules": ["classifier"]}),
        "policy.trained_modules allows [] to be trained whole",
    ),
    (
        "tasks",
        bare(tasks=["classification"]),
        made(),
        made(task={"kind": "generation", "labels": []}),
        "allows ['classification'], the federation asks for task.kind = 'generation'",
    ),
    (
        "models",
        bare(models=[ONE]),
        made(model={"digest": ONE}),
        made(model={"digest": TWO}),
        f"allows 1 listed base model, the federation asks for model {TWO}",
    ),
    ("models", bare(models=[ONE, TWO]), made(model={"digest": TWO}), made(), "without a digest"),
    (
        "noise_min",
        bare(noise_min=1.0),
        private(),
        private(privacy=PRIVACY | {"noise_multiplier": 0.9}),
        "allows 1 or more, the federation asks for noise_multiplier = 0.9",
    ),
    ("noise_min", bare(noise_min=0.1), private(), made(), "asks for no [privacy]"),
    (
        "clip_max",
        bare(clip_max=1.0),
        private(),
        private(privacy=PRIVACY | {"clip_norm": 1.5}),
        "allows 1 or less, the federation asks for privacy.clip_norm = 1.5",
    ),
    ("clip_max", bare(clip_max=1.0), private(), made(), "asks for no [privacy]"),
    (
        "cohort_min",
        bare(cohort_min=3),
        made(sites={"min": 3}),
        made(sites={"min": 2}),
        "allows cohorts of 3 sites or more, the federation asks for sites.min = 2",
    ),
]


@pytest.mark.parametrize(("key", "limits", "within", "outside", "words"), CASES)
def test_each_limit_lets_in_what_keeps_it_and_refuses_what_does_not(
    key: str, limits: SitePolicy, within: FederationConfig, outside: FederationConfig, words: str
) -> None:
    assert violations(limits, within) == ()
    assert keys_of(limits, outside) == [f"policy.{key}"]
    with pytest.raises(Refused) as caught:
        check_manifest(limits, outside)
    assert caught.value.exit_code == 3
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"policy.{key} allows ")
    assert "; " in str(caught.value)  # and a remedy


def test_secure_aggregation_can_only_refuse_for_there_is_none_yet() -> None:
    check_manifest(policy(require_secure_aggregation=False), private())
    for config in (private(), private(sites={"min": 100})):
        with pytest.raises(Refused, match="this version has no secure aggregation"):
            check_manifest(policy(require_secure_aggregation=True), config)


def test_all_that_is_refused_is_found_and_the_first_is_named_with_the_number_of_others() -> None:
    limits = policy(clip_max=0.5, cohort_min=2, tasks=["generation"])
    config = made(exchange={"kind": "full"})
    names = ("require_privacy", "exchange", "tasks", "clip_max", "cohort_min")
    assert keys_of(limits, config) == [f"policy.{name}" for name in names]
    with pytest.raises(Refused, match=r"^policy\.require_privacy .*\(4 more limits refuse it too"):
        check_manifest(limits, config)


def test_the_models_on_the_list_are_compared_with_what_the_site_has() -> None:
    limits = bare(models=[ONE])
    assert keys_of(limits, made(), base_digest=ONE) == []
    assert keys_of(limits, made(), base_digest=TWO) == ["policy.models"]
    named = made(model={"digest": ONE})
    assert keys_of(limits, named, base_digest=ONE) == []
    assert keys_of(limits, named, base_digest=TWO) == ["policy.models"]
    assert keys_of(bare(), made(), base_digest=TWO) == []  # no list: any


def test_the_noise_of_an_epsilon_is_computed_and_compared() -> None:
    config = private(privacy=PRIVACY | {"noise_multiplier": None, "epsilon": 8.0})
    noise = PrivacyPlan.of(config).noise_multiplier
    assert keys_of(bare(noise_min=noise), config) == []
    assert keys_of(bare(noise_min=noise * 1.01), config) == ["policy.noise_min"]


def test_a_plan_that_cannot_be_made_has_no_noise() -> None:
    weights = {"weights": "examples"}  # would send the number of records
    config = made(privacy=PRIVACY | {"noise_multiplier": None, "epsilon": 8.0}, strategy=weights)
    (found,) = violations(bare(noise_min=0.01), config)
    assert found.key == "policy.noise_min"
    assert "strategy.weights" in found.remedy


@pytest.mark.parametrize(("epsilon", "refused"), [(3.0, []), (3.01, ["policy.epsilon_run"])])
def test_the_cost_of_a_run_is_compared_where_it_is_known(
    epsilon: float, refused: list[str]
) -> None:
    assert keys_of(policy(epsilon_run=3.0), private(), epsilon=epsilon) == refused
    assert keys_of(policy(epsilon_run=3.0), private()) == []
    nan = keys_of(policy(epsilon_run=3.0), private(), epsilon=float("nan"))
    assert nan == ["policy.epsilon_run"]


@pytest.mark.parametrize(
    ("config", "vectors"),
    [
        (made(), 3),  # down, up, and down again to be evaluated
        (made(evaluation={"every": 0}), 2),
        (private(), 2),  # under [privacy] nothing is evaluated
        (private(privacy=PRIVACY | {"metrics_noise": 10.0}), 3),
    ],
)
def test_bytes_a_round_are_counted_both_ways(config: FederationConfig, vectors: int) -> None:
    assert bytes_a_round(config, 1000) == vectors * 1000
    most = vectors * 1000
    assert keys_of(bare(bytes_per_round_max=most), config, vector_bytes=1000) == []
    refused = keys_of(bare(bytes_per_round_max=most - 1), config, vector_bytes=1000)
    assert refused == ["policy.bytes_per_round_max"]
    assert keys_of(bare(bytes_per_round_max=1), config) == []  # unknown until the model is built


def test_a_reply_has_a_limit_of_its_own() -> None:
    assert keys_of(bare(payload_bytes_max=1000), made(), vector_bytes=1000) == []
    assert keys_of(bare(payload_bytes_max=999), made(), vector_bytes=1000) == [
        "policy.payload_bytes_max"
    ]


@pytest.mark.parametrize(
    ("hours", "time", "is_in"),
    [
        (["08:00-18:00"], "08:00", True),
        (["08:00-18:00"], "07:59:59", False),
        (["08:00-18:00"], "17:59:59", True),
        (["08:00-18:00"], "18:00", False),  # the end is outside
        (["22:00-06:00"], "23:59", True),  # over midnight
        (["22:00-06:00"], "00:00", True),
        (["22:00-06:00"], "06:00", False),
        (["22:00-06:00", "12:00-13:00"], "12:30", True),
        (["22:00-06:00", "12:00-13:00"], "13:30", False),
        (["00:00-24:00"], "23:59:59", True),
        ([], "12:00", True),
    ],
)
def test_hours_of_the_day(hours: list[str], time: str, is_in: bool) -> None:
    limits = bare(hours=hours)
    assert is_open(limits.hours, local(time)) is is_in
    utc = local(time).astimezone(UTC)  # the same moment, told otherwise
    assert is_open(limits.hours, utc) is is_in
    assert keys_of(limits, made(), now=utc) == ([] if is_in else ["policy.hours"])
    assert keys_of(limits, made()) == []  # when it is shown to people, the hour does not matter


MINUTES = st.integers(min_value=0, max_value=24 * 60 - 1)


def span(begin: int, end: int) -> str:
    return f"{begin // 60:02d}:{begin % 60:02d}-{end // 60:02d}:{end % 60:02d}"


@given(begin=MINUTES, end=MINUTES, at=MINUTES)
def test_a_span_and_its_complement_share_no_minute_and_lack_none(
    begin: int, end: int, at: int
) -> None:
    if begin == end:
        with pytest.raises(ValueError, match="begins when it ends"):
            bare(hours=[span(begin, end)])
        return
    moment = local("00:00") + timedelta(minutes=at)  # a day without a change of clocks, in UTC
    inside, outside = (bare(hours=[text]).hours for text in (span(begin, end), span(end, begin)))
    assert is_open(inside, moment) is not is_open(outside, moment)
    length = (end - begin) % (24 * 60)
    assert is_open(inside, moment) is ((at - begin) % (24 * 60) < length)  # as a clock's hand goes


FEDERATIONS = st.builds(
    lambda kind, task, sites, digest, privacy: made(
        exchange={"kind": kind},
        task={"kind": task} | ({} if task == "classification" else {"labels": []}),
        sites={"min": sites},
        model={"digest": digest},
        strategy=EQUAL,
        **({} if privacy is None else {"privacy": PRIVACY | privacy}),
    ),
    st.sampled_from(["lora", "full", "head"]),
    st.sampled_from(["classification", "generation"]),
    st.integers(1, 5),
    st.sampled_from([None, ONE, TWO]),
    st.none()
    | st.fixed_dictionaries(
        {
            "noise_multiplier": st.sampled_from([0.5, 1.0, 2.0]),
            "clip_norm": st.sampled_from([0.5, 1.0, 2.0]),
        }
    ),
)
POLICIES = st.fixed_dictionaries(
    {
        "require_privacy": st.booleans(),
        "noise_min": st.none() | st.sampled_from([0.5, 1.0, 2.0]),
        "clip_max": st.none() | st.sampled_from([0.5, 1.0, 2.0]),
        "require_secure_aggregation": st.booleans(),
        "cohort_min": st.integers(1, 5),
        "bytes_per_round_max": st.none() | st.integers(1, 400),
        "payload_bytes_max": st.integers(1, 200),
        "epsilon_run": st.sampled_from([1.0, 5.0, 10.0]),
        "exchange": st.lists(st.sampled_from(["lora", "full", "head"]), unique=True),
        "tasks": st.lists(
            st.sampled_from(["classification", "generation"]), unique=True, min_size=1
        ),
        "models": st.lists(st.sampled_from([ONE, TWO]), unique=True),
    }
)


def lower(first: Any, second: Any) -> Any:
    return min((value for value in (first, second) if value is not None), default=None)


def higher(first: Any, second: Any) -> Any:
    return max((value for value in (first, second) if value is not None), default=None)


def both(first: Json, second: Json) -> Json:
    """Return the limits of two policies together: each key the stricter of the two."""
    most = ("clip_max", "bytes_per_round_max", "payload_bytes_max", "epsilon_run")
    least = ("noise_min", "cohort_min", "require_privacy", "require_secure_aggregation")
    joined: Json = {key: lower(first[key], second[key]) for key in most}
    joined |= {key: higher(first[key], second[key]) for key in least}
    for key in ("exchange", "tasks", "models"):
        joined[key] = [value for value in first[key] if value in second[key]]
    if not first["models"] or not second["models"]:
        joined["models"] = first["models"] or second["models"]  # an empty list means any
    return joined


@given(first=POLICIES, second=POLICIES, config=FEDERATIONS, size=st.integers(1, 200))
def test_a_stricter_policy_refuses_all_that_a_looser_one_does(
    first: Json, second: Json, config: FederationConfig, size: int
) -> None:
    joined = both(first, second)
    if not joined["tasks"] or (first["models"] and second["models"] and not joined["models"]):
        return  # nothing could pass; a list of tasks cannot be empty, and one of models means any
    known: Json = {"vector_bytes": size, "epsilon": 5.0, "base_digest": ONE}
    refused = [set(keys_of(policy(**keys), config, **known)) for keys in (first, second, joined)]
    assert refused[0] | refused[1] <= refused[2]


def test_too_few_records_are_refused_and_their_count_is_not_told() -> None:
    check_records(policy(records_min=200), 200)
    with pytest.raises(Refused, match=r"fewer training records than its policy\.records_min") as e:
        check_records(policy(records_min=200), 199)
    assert not any(character.isdigit() for character in str(e.value))
