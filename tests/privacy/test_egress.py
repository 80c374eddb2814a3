"""Egress: what is not on the list does not leave."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from intramural.core.errors import EgressRefused
from intramural.core.layout import Layout
from intramural.core.messages import Evaluated, Refusal, Reply, Update, Welcome
from intramural.core.metrics import Sums
from intramural.privacy.egress import EgressPolicy

LAYOUT = Layout((("weight", (2, 3)),))
OTHER = Layout((("weight", (2, 3)), ("imprint", (1000,))))
POLICY = EgressPolicy(layout=LAYOUT, task="classification", payload_bytes_max=24)
PRIVATE = replace(POLICY, private=True)


def update(layout: Layout = LAYOUT, *, size: int | None = None) -> Update:
    delta = np.zeros(layout.size if size is None else size, dtype=np.float32)
    return Update(
        site="a", round=1, layout=layout.digest, weight=1, loss=0.0, seconds=0.0, delta=delta
    )


def evaluated(*names: str) -> Evaluated:
    one = np.ones(1, dtype=np.int64)
    return Evaluated(site="a", round=1, split="test", sums=Sums(counts=dict.fromkeys(names, one)))


@pytest.mark.parametrize(
    "reply",
    [
        update(),  # 6 elements of 4 bytes are the 24 that the policy allows
        evaluated("confusion", "loss", "examples"),
        Welcome(site="a", layout=LAYOUT.digest, base="b", version="0"),
        Refusal(site="a", reason="data", detail="no"),
    ],
)
def test_what_is_on_the_list_leaves_unchanged(reply: Reply) -> None:
    assert POLICY.check(reply) is reply


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (update(OTHER), "the approved manifest has another layout"),
        (update(size=7), "the approved manifest has another layout"),
        (evaluated("examples", "notes"), r"refused to send sums \['notes'\]"),
        (evaluated("token_loss"), "classification lets out"),
    ],
)
def test_anything_else_stays(reply: Reply, words: str) -> None:
    with pytest.raises(EgressRefused, match=words) as caught:
        POLICY.check(reply)
    assert caught.value.reason == "egress-refused"


def test_a_generation_lets_out_its_own_sums_alone() -> None:
    policy = replace(POLICY, task="generation")
    names = ("loss", "examples", "token_loss", "tokens", "correct_tokens", "hit_shares")
    assert policy.check(evaluated(*names))
    with pytest.raises(EgressRefused, match="generation lets out"):
        policy.check(evaluated(*names, "confusion"))
    with pytest.raises(EgressRefused, match="classification lets out"):
        POLICY.check(evaluated("hit_shares"))


def test_no_vector_leaves_where_none_is_expected() -> None:
    policy = EgressPolicy(layout=None, task="classification", payload_bytes_max=10**9)
    with pytest.raises(EgressRefused, match="another layout"):
        policy.check(update())


def test_a_count_of_steps_leaves_only_where_the_rule_needs_it() -> None:
    counted = replace(update(), steps=5)
    with pytest.raises(EgressRefused, match="a count of steps: the federation's rule does not"):
        POLICY.check(counted)
    assert replace(POLICY, steps=True).check(counted) is counted
    with pytest.raises(EgressRefused, match="a count of records or steps"):
        replace(PRIVATE, steps=True).check(silent(steps=5))


def test_too_many_bytes_stay() -> None:
    policy = EgressPolicy(layout=LAYOUT, task="classification", payload_bytes_max=23)
    with pytest.raises(EgressRefused, match=r"24 bytes: policy\.payload_bytes_max is 23"):
        policy.check(update())


def silent(**changes: Any) -> Update:
    """Return an update as a private round sends it; fields named are changed."""
    told: dict[str, Any] = {"loss": None, "seconds": None, "ledger_entries": 3, "ledger_head": "h"}
    return replace(update(), **(told | changes))


@pytest.mark.parametrize(
    "reply",
    [
        silent(),
        replace(evaluated("correct", "examples"), ledger_entries=3, ledger_head="h"),
        replace(
            Welcome(site="a", layout=LAYOUT.digest, base="b", version="0"),
            ledger_entries=1,
            ledger_head="h",
        ),
        Refusal(site="a", reason="data", detail="no"),
    ],
)
def test_under_privacy_the_noised_vector_and_noised_counts_leave(reply: Reply) -> None:
    assert PRIVATE.check(reply) is reply


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (silent(loss=0.5), "a loss, a time, or a count of records or steps"),
        (silent(loss=0.0), "a loss, a time, or a count of records or steps"),
        (silent(seconds=1.0), "a loss, a time, or a count of records or steps"),
        (silent(weight=36), "a loss, a time, or a count of records or steps"),
        (silent(steps=5), "a loss, a time, or a count of records or steps"),
        (silent(layout=OTHER.digest), "another layout"),
        (silent(delta=np.zeros(7, dtype=np.float32)), "another layout"),
        (evaluated("confusion", "loss", "examples"), "exact evaluation sums"),
        (evaluated("correct", "examples", "loss"), "exact evaluation sums"),
        (evaluated("examples"), "exact evaluation sums"),
        (evaluated(), "exact evaluation sums"),
    ],
)
def test_under_privacy_nothing_else_of_the_records_leaves(reply: Reply, words: str) -> None:
    with pytest.raises(EgressRefused, match=words):
        PRIVATE.check(reply)


def test_noised_counts_are_not_on_the_list_where_nothing_is_claimed() -> None:
    with pytest.raises(EgressRefused, match=r"sums \['correct'\]"):
        POLICY.check(evaluated("correct", "examples"))
