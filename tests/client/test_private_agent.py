"""SiteAgent under [privacy]: the ledger is charged first, and only a noised vector leaves."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intramural.client.agent import SiteAgent
from intramural.core.journal import scan
from intramural.core.messages import (
    Evaluated,
    EvaluateRequest,
    Hello,
    Refusal,
    Reply,
    TrainRequest,
    Update,
    Welcome,
)
from intramural.core.site import load_site
from intramural.models.private_training import parts_of
from intramural.models.tasks import Tokens
from intramural.privacy.accountant import Event, epsilon_pld
from intramural.privacy.ledger import Ledger
from tests.tiny import Json, federation, rows, site

PRIVACY: Json = {
    "unit": "record",
    "noise_multiplier": 1.0,
    "delta": 1e-5,
    "clip_norm": 1.0,
    "nominal_records": 60,
}
EQUAL: Json = {"weights": "equal"}
SEEDED: Json = {"not_private_seed": 3}


def agent(
    folder: Path,
    base: Path,
    *,
    privacy: Json | None = None,
    data: Json | None = None,
    records: list[dict[str, str]] | None = None,
    policy: Json | None = None,
    **sections: Any,
) -> SiteAgent:
    config = federation(base, privacy=PRIVACY | (privacy or {}), strategy=EQUAL, **sections)
    allowed = {"require_privacy": True, "exchange": ["lora", "full", "head"]} | (policy or {})
    written = site(folder, "a", records or rows()[:60], policy=allowed, data=data or {})
    return SiteAgent(load_site(written), config)


def train(of: SiteAgent, *, round_: int = 1) -> Reply:
    vector = np.zeros(of.layout.size, dtype=np.float32)
    return of.answer(
        TrainRequest(
            manifest=of.federation.digest, round=round_, layout=of.layout.digest, vector=vector
        )
    )


def updated(reply: Reply) -> Update:
    assert isinstance(reply, Update), reply
    return reply


def kinds(of: SiteAgent) -> list[str]:
    return [entry.kind for entry in scan(of.site.ledger_file).entries]


def test_a_reply_under_privacy_holds_the_vector_and_nothing_of_the_records(
    tmp_path: Path, bert: Path
) -> None:
    of = agent(tmp_path, bert)
    update = updated(train(of))
    assert (update.weight, update.loss, update.seconds) == (1, None, None)
    assert np.abs(update.delta).max() > 0
    ledger = Ledger(of.site.ledger_file, site="a", data=of.site.data_name)
    assert (update.ledger_entries, update.ledger_head) == (len(ledger), ledger.head)
    (charge,) = ledger.charges
    # batch 8 of nominal 60, two steps: the federation's constants, not the 60 rows' train split
    assert (charge.sample_rate, charge.steps, charge.noise_multiplier) == (8 / 60, 2, 1.0)
    assert charge.is_private
    assert charge.unit == "record"


def test_metrics_are_refused_under_privacy(tmp_path: Path, bert: Path) -> None:
    of = agent(tmp_path, bert)
    reply = of.answer(evaluation(of, split="test"))
    assert isinstance(reply, Refusal)
    assert "sends no metrics" in reply.detail


def test_the_charge_is_on_disk_before_a_record_is_read(tmp_path: Path, bert: Path) -> None:
    of = agent(tmp_path, bert)
    of.site.data.path.unlink()
    reply = train(of)
    assert isinstance(reply, Refusal)
    assert reply.reason == "at-site"  # what the records cause is not told apart
    assert kinds(of) == ["opened", "charged", "settled"]  # charged, and never refunded


def test_a_run_beyond_the_lifetime_budget_is_refused_before_the_records_are_opened(
    tmp_path: Path, bert: Path
) -> None:
    of = agent(tmp_path, bert, policy={"epsilon_lifetime": 0.5})
    of.site.data.path.unlink()
    reply = of.answer(Hello(manifest=of.federation.digest))
    assert isinstance(reply, Refusal)
    assert reply.reason == "budget-exhausted"
    assert kinds(of) == ["opened"]
    reply = train(of)  # a coordinator that asks all the same
    assert isinstance(reply, Refusal)
    assert reply.reason == "budget-exhausted"
    assert kinds(of) == ["opened"]


def test_a_resumed_run_is_admitted_for_the_rounds_that_are_left(tmp_path: Path, bert: Path) -> None:
    of = agent(tmp_path, bert)
    assert isinstance(of.answer(Hello(manifest=of.federation.digest)), Welcome)
    updated(train(of, round_=1))
    updated(train(of, round_=2))
    whole = of._guarded().ledger.epsilon(1e-5)
    policy = of.site.policy.model_copy(update={"epsilon_lifetime": whole * 1.001})
    again = SiteAgent(of.site.model_copy(update={"policy": policy}), of.federation)
    assert isinstance(again.answer(Hello(manifest=again.federation.digest)), Welcome)
    reply = train(again, round_=2)  # a third charge: the round is tried again, and costs again
    assert isinstance(reply, Refusal)
    assert reply.reason == "budget-exhausted"


def test_a_retry_is_charged_again_and_draws_other_noise(tmp_path: Path, bert: Path) -> None:
    of = agent(tmp_path, bert)
    first, second = updated(train(of)), updated(train(of))
    assert not np.array_equal(first.delta, second.delta)
    assert [c.attempt for c in of._guarded().ledger.charges] == [1, 2]


def test_a_test_s_seed_repeats_the_bits_and_takes_the_claim_away(
    tmp_path: Path, bert: Path
) -> None:
    one = agent(tmp_path / "1", bert, policy=SEEDED)
    two = agent(tmp_path / "2", bert, policy=SEEDED)
    np.testing.assert_array_equal(updated(train(one)).delta, updated(train(two)).delta)
    assert one._guarded().ledger.spent(1e-5).is_private is False


@pytest.mark.parametrize("kind", ["lora", "full", "head"])
@pytest.mark.parametrize("unit", ["record", "person"])
def test_both_engines_take_the_same_steps(tmp_path: Path, bert: Path, kind: str, unit: str) -> None:
    deltas = []
    privacy: Json = {"unit": unit}
    if unit == "person":
        privacy |= {"nominal_persons": 20, "records_per_person": 3}
    records = [row | {"person": str(n // 2)} for n, row in enumerate(rows()[:60])]
    for engine in ("bookkeeping", "opacus"):
        of = agent(
            tmp_path / engine,
            bert,
            privacy=privacy | {"engine": engine},
            policy=SEEDED,
            records=records,
            data={"person": "person"},
            exchange={"kind": kind},
        )
        request = TrainRequest(
            manifest=of.federation.digest,
            round=1,
            layout=of.layout.digest,
            vector=np.random.default_rng(0).normal(0, 0.1, of.layout.size).astype(np.float32),
        )
        deltas.append(updated(of.answer(request)).delta)
    scale = np.abs(deltas[0]).max()
    assert scale > 0
    np.testing.assert_allclose(deltas[0] / scale, deltas[1] / scale, atol=2e-5)


def test_a_person_as_unit_needs_a_column_of_persons(tmp_path: Path, bert: Path) -> None:
    privacy = {"unit": "person", "nominal_persons": 20, "records_per_person": 3}
    reply = train(agent(tmp_path, bert, privacy=privacy))
    assert isinstance(reply, Refusal)
    assert "data.person" in reply.detail


def test_a_step_that_draws_nobody_is_a_step_of_noise(tmp_path: Path, bert: Path) -> None:
    # 8 of 200,000: two steps draw none of 36 records with probability 1 - 0.003
    of = agent(tmp_path, bert, privacy={"nominal_records": 50_000, "delta": 1e-6}, policy=SEEDED)
    guard = of._guarded()
    drawn = guard.random(1).choose(36, probability=8 / 50_000)
    assert drawn.size == 0
    delta = updated(train(of)).delta
    # two SGD steps at 0.1, noise of 1.0 over divisor 8: each element's sd is 0.1 / 8 * sqrt(2)
    assert np.std(delta) == pytest.approx(0.1 / 8 * 2**0.5, rel=0.2)


def tokens(*lengths: int) -> Tokens:
    inputs = [np.zeros(n, dtype=np.int32) for n in lengths]
    return Tokens(inputs=inputs, targets=[np.zeros(1, dtype=np.int32) for _ in lengths])


def test_a_unit_is_never_cut_in_two_and_every_row_comes_once() -> None:
    units = [[0], [1, 2, 3], [4, 5], [6]]
    parts = list(parts_of(tokens(*range(1, 8)), units, rows_max=2))
    assert sorted(row for part, _ in parts for row in part) == list(range(7))
    for part, owners in parts:
        assert owners == sorted(owners)
        for unit in units:
            assert len({o for r, o in zip(part, owners, strict=True) if r in unit}) <= 1
            assert not set(unit) & set(part) or set(unit) <= set(part)
    assert list(parts_of(tokens(1), [], rows_max=2)) == []


def test_by_default_a_part_holds_eight_rows_or_a_thousand_tokens() -> None:
    long = [
        len(p) for p, _ in parts_of(tokens(*[500] * 20), [[i] for i in range(20)], rows_max=None)
    ]
    short = [
        len(p) for p, _ in parts_of(tokens(*[10] * 200), [[i] for i in range(200)], rows_max=None)
    ]
    assert long == [8, 8, 4]
    assert short == [102, 98]  # 102 * 10 <= 1024


def evaluation(of: SiteAgent, *, split: Any = "validation", round_: int = 1) -> EvaluateRequest:
    vector = np.zeros(of.layout.size, dtype=np.float32)
    return EvaluateRequest(
        manifest=of.federation.digest,
        round=round_,
        layout=of.layout.digest,
        split=split,
        vector=vector,
    )


def test_noised_metrics_are_charged_and_two_counts_leave(tmp_path: Path, bert: Path) -> None:
    of = agent(tmp_path, bert, privacy={"metrics_noise": 4.0})
    reply = of.answer(evaluation(of))
    assert isinstance(reply, Evaluated)
    assert set(reply.sums.counts) == {"correct", "examples"}
    (charge,) = of._guarded().ledger.charges
    # every record is in every evaluation: no sampling, one release
    assert (charge.purpose, charge.sample_rate, charge.steps) == ("metrics", 1.0, 1)
    assert charge.noise_multiplier == 4.0
    assert kinds(of) == ["opened", "charged", "settled"]


def test_metrics_are_charged_before_a_record_is_read(tmp_path: Path, bert: Path) -> None:
    of = agent(tmp_path, bert, privacy={"metrics_noise": 4.0})
    of.site.data.path.unlink()
    reply = of.answer(evaluation(of))
    assert isinstance(reply, Refusal)
    assert reply.reason == "at-site"  # what the records cause is not told apart
    assert kinds(of) == ["opened", "charged", "settled"]  # as failed, and never refunded


def test_a_run_is_admitted_only_if_its_evaluations_are_covered_too(
    tmp_path: Path, bert: Path
) -> None:
    train_event = Event(sample_rate=8 / 60, noise_multiplier=1.0, steps=4)
    # two rounds of two steps; evaluated twice on validation and once on test
    metrics_event = Event(sample_rate=1.0, noise_multiplier=4.0, steps=3)
    both = [train_event, metrics_event]
    whole = epsilon_pld(both, delta=1e-5, relation="add-remove")
    training = epsilon_pld([train_event], delta=1e-5, relation="add-remove")
    assert training < 0.9 * whole
    for share, kind in ((1.001, Welcome), (0.999, Refusal)):
        of = agent(
            tmp_path / str(share),
            bert,
            privacy={"metrics_noise": 4.0},
            policy={"epsilon_lifetime": whole * share},
        )
        assert isinstance(of.answer(Hello(manifest=of.federation.digest)), kind)


def test_person_and_group_together_are_refused_before_anything_is_charged(
    tmp_path: Path, bert: Path
) -> None:
    # one record that joins two groups would move others from one side of the splits to another
    of = agent(tmp_path, bert, data={"person": "person", "group": "category"})
    reply = of.answer(Hello(manifest=of.federation.digest))
    assert isinstance(reply, Refusal)
    assert "data.person or data.group" in reply.detail
    assert not of.site.ledger_file.exists()


def test_a_greeting_reads_no_record(tmp_path: Path, bert: Path) -> None:
    # whether a site greets would otherwise tell of its records, at no charge
    of = agent(tmp_path, bert, policy={"records_min": 10_000})
    of.site.data.path.unlink()
    assert isinstance(of.answer(Hello(manifest=of.federation.digest)), Welcome)
    assert kinds(of) == ["opened"]


@pytest.mark.parametrize("policy", [{"records_min": 10_000}, {"records_min": 10_001}])
def test_records_that_are_too_few_are_charged_for_and_not_told_of(
    tmp_path: Path, bert: Path, policy: Json
) -> None:
    reply = train(agent(tmp_path, bert, policy=policy))
    assert isinstance(reply, Refusal)
    assert (reply.reason, reply.detail) == (
        "at-site", "the site could not take part; its own log says why"
    )  # fmt: skip


def test_a_round_is_tried_no_more_often_than_the_policy_lets(tmp_path: Path, bert: Path) -> None:
    of = agent(tmp_path, bert, policy={"retries_max": 1})
    # two rounds are planned and one retry is allowed: three charges, whatever they are for
    for _ in range(3):
        updated(train(of))
    reply = train(of)
    assert isinstance(reply, Refusal)
    assert "charged 3 times, of 2 planned and policy.retries_max" in reply.detail
    assert kinds(of).count("charged") == 3


@pytest.mark.parametrize("round_", [0, 3])
def test_a_round_that_the_manifest_has_not_is_refused_uncharged(
    tmp_path: Path, bert: Path, round_: int
) -> None:
    of = agent(tmp_path, bert)
    reply = train(of, round_=round_)
    assert isinstance(reply, Refusal)
    assert f"round {round_} is not one of the manifest's 2" in reply.detail
    assert kinds(of) == ["opened"]


def test_an_update_says_whether_a_seed_was_used(tmp_path: Path, bert: Path) -> None:
    assert updated(train(agent(tmp_path / "1", bert))).seeded is False
    assert updated(train(agent(tmp_path / "2", bert, policy=SEEDED))).seeded is True
