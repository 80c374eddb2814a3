"""The report says what the sites' own models did, and whether that was worth it."""

from pathlib import Path

import numpy as np
import pytest

from intramural.core.errors import AggregationError
from intramural.core.messages import Evaluated, Split
from intramural.core.metrics import Sums, personal_of, with_personal
from intramural.server.machine import Phase
from intramural.server.post import Arrival
from intramural.server.report_html import render_html
from intramural.server.report_personal import personal_line
from intramural.server.tally import Tally
from intramural.server.usable import unusable
from tests.tiny import Json, federation

PERSONAL: Json = {"personal": {"kind": "ditto", "steps": 2}}


def sums(right: int, wrong: int = 2) -> Sums:
    """Return the sums of a test with so many records right, of four labels."""
    cells = np.zeros((4, 4), dtype=np.int64)
    cells[0, 0], cells[1, 2] = right, wrong
    count = np.array([right + wrong], dtype=np.int64)
    return Sums(counts={"confusion": cells.reshape(-1), "loss": count, "examples": count.copy()})


def report(gains: list[float], *, loss: bool = False) -> Json:
    key = "loss" if loss else "macro_f1"
    sites = [f"site-{number}" for number in range(len(gains))]
    return {
        "task": "generation" if loss else "classification",
        "final": {
            "federated": {key: 0.5},
            "own_test": {site: {"federated": {key: 0.5}} for site in sites},
            "personal": {s: {key: 0.5 + g} for s, g in zip(sites, gains, strict=True)},
        },
    }


def test_the_sentence_has_the_mean_and_student_s_interval() -> None:
    # mean 0.02; deviations -0.01, 0, 0.01: s = 0.01; 4.303 * 0.01 / sqrt(3) = 0.0248
    told = personal_line(report([0.01, 0.02, 0.03]))
    assert "macro-F1 +2.0 points" in told
    assert "mean of 3 sites (95 % interval over sites -0.5 to +4.5)" in told
    assert told.endswith("whether it paid is open.")


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [([0.05, 0.06, 0.055], "it paid."), ([-0.05, -0.06, -0.055], "it did harm.")],
)
def test_an_interval_on_one_side_of_zero_is_a_verdict(gains: list[float], verdict: str) -> None:
    assert personal_line(report(gains)).endswith(verdict)


def test_a_smaller_loss_is_a_gain() -> None:
    assert personal_line(report([-0.2, -0.21, -0.19], loss=True)).endswith("it paid.")


def test_one_site_has_no_interval_and_none_no_sentence() -> None:
    assert personal_line(report([0.1])).endswith("one site tells no more.")
    assert personal_line({"final": {"federated": {"macro_f1": 0.5}}}) == ""
    assert "it paid" in render_html(report([0.05, 0.06, 0.055]))


def arrival(split: Split, found: Sums) -> Arrival:
    phase = Phase.TEST if split == "test" else Phase.EVALUATE
    reply = Evaluated(site="a", round=2, split=split, sums=found)
    return Arrival(site="a", node=1, tag=(phase.value, 2, 1), reply=reply, problem=None)


def test_a_test_has_both_models_sums_where_the_manifest_says_so_and_only_there() -> None:
    both = with_personal(sums(5), sums(6))
    personal, plain = (federation(Path("x"), **sections) for sections in (PERSONAL, {}))
    assert unusable(arrival("test", both), personal, layout="") is None
    assert unusable(arrival("test", sums(5)), plain, layout="") is None
    for split, found, config in (
        ("test", both, plain),
        ("test", sums(5), personal),
        ("validation", both, personal),
        ("test", with_personal(sums(5), Sums(counts={"loss": np.array([1])})), personal),
    ):
        told = unusable(arrival(split, found), config, layout="")  # type: ignore[arg-type]
        assert told == "wrong-content"
    assert unusable(arrival("validation", sums(5)), personal, layout="") is None


def test_sums_that_contradict_themselves_are_refused_on_either_side() -> None:
    own = sums(6)
    own.counts["examples"][0] = 7
    with pytest.raises(AggregationError, match="the sums say 7"):
        Tally("classification").evaluated(arrival("test", with_personal(sums(5), own)).reply)  # type: ignore[arg-type]


def test_the_own_model_s_sums_come_apart_again() -> None:
    assert personal_of(with_personal(sums(5), sums(6))) == sums(6)
    assert personal_of(sums(5)) is None
