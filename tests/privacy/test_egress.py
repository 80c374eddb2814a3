"""Egress: what is not on the list does not leave."""

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


def test_no_vector_leaves_where_none_is_expected() -> None:
    policy = EgressPolicy(layout=None, task="classification", payload_bytes_max=10**9)
    with pytest.raises(EgressRefused, match="another layout"):
        policy.check(update())


def test_too_many_bytes_stay() -> None:
    policy = EgressPolicy(layout=LAYOUT, task="classification", payload_bytes_max=23)
    with pytest.raises(EgressRefused, match=r"24 bytes: policy\.payload_bytes_max is 23"):
        policy.check(update())
