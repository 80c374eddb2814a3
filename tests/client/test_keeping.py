"""What a site keeps of a run: it goes into the next round, into its own tests, and nowhere else."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from intramural.client.agent import SiteAgent
from intramural.client.memory import MEMORY, SiteMemory
from intramural.core.errors import EgressRefused
from intramural.core.federation import FederationConfig
from intramural.core.layout import Vector
from intramural.core.messages import Evaluated, EvaluateRequest, Refusal, TrainRequest, Update
from intramural.core.metrics import PERSONAL, metrics_of, personal_of
from intramural.core.site import load_site
from intramural.models.training import RoundPlan, evaluate
from intramural.privacy.ledger import Ledger
from tests.reference.fedprox import pulled_steps
from tests.reference.scaffold_site import scaffold_site
from tests.tiny import Json, federation, rows, site

Point = NDArray[np.float64]
RUN = "sha256:" + "a" * 64
RATE = 0.5
WHOLE: Json = {"learning_rate": RATE, "local_steps": 3, "batch_size": 1000}
"""Every step sees all of the site's records, so that its gradient is a function."""
PRIVACY: Json = {
    "unit": "record",
    "noise_multiplier": 1.5,
    "delta": 1e-5,
    "clip_norm": 1.0,
    "nominal_records": 40,
}


def made(base: Path, **sections: Json) -> FederationConfig:
    return federation(base, **{"training": WHOLE} | sections)


def agent(folder: Path, config: FederationConfig, *, name: str = "a") -> SiteAgent:
    """Return the site's agent, as a process that was just started makes it."""
    place = folder / name / "site.toml"
    if not place.is_file():
        site(folder, name, rows()[:40] if name == "a" else rows()[40:80])
    return SiteAgent(load_site(place), config)


def start_of(of: SiteAgent, seed: int = 0) -> Vector:
    return np.random.default_rng(seed).normal(0, 0.1, of.layout.size).astype(np.float32)


def train(of: SiteAgent, round_: int, vector: Vector) -> Update:
    request = TrainRequest(
        manifest=of.federation.digest,
        round=round_,
        layout=of.layout.digest,
        vector=vector,
        run=RUN,
    )
    reply = of.answer(request)
    assert isinstance(reply, Update), reply
    return reply


def evaluated(of: SiteAgent, round_: int, vector: Vector, split: Any = "test") -> Evaluated:
    reply = of.answer(
        EvaluateRequest(
            manifest=of.federation.digest,
            round=round_,
            layout=of.layout.digest,
            split=split,
            vector=vector,
            run=RUN,
        )
    )
    assert isinstance(reply, Evaluated), reply
    return reply


def kept(of: SiteAgent, round_: int) -> dict[str, Vector]:
    """Return what the site kept of a round."""
    folder = of.site.ledger_file.parent / MEMORY
    memory = SiteMemory(folder, of.name, manifest=of.federation.digest)
    return memory.before(RUN, round_ + 1)


def slope_of(of: SiteAgent, sent: Vector) -> Callable[[Point], Point]:
    """Return the gradient of the site's loss by all that is trained, on all its records."""
    tokens = of.tokens_of("train")

    def gradient(at: Point) -> Point:
        resident = of.resident()
        exchange, model = resident.loaded.exchange, resident.loaded.model
        exchange.write(sent)
        exchange.write_trained(at.astype(np.float32))
        model.train()
        batch = resident.task.pad(tokens, range(len(tokens)))
        loss = resident.task.losses(model, batch).mean()
        found = torch.autograd.grad(loss, list(exchange.parameters.values()))
        return np.concatenate([g.numpy().reshape(-1) for g in found]).astype(np.float64)

    return gradient


def test_scaffold_s_steps_and_control_variates_are_the_paper_s(tmp_path: Path, bert: Path) -> None:
    config = made(bert, strategy={"rule": "scaffold", "weights": "equal"})
    of = agent(tmp_path, config)
    own = np.zeros(of.layout.size // 2)
    for round_ in (1, 2, 3):
        sent = start_of(of, round_)
        update = train(of, round_, sent)
        x, c = np.split(sent.astype(np.float64), 2)
        gradients = [slope_of(of, sent)] * 3
        y, own = scaffold_site(x, c, own, gradients, rate=RATE)
        assert update.steps is None  # the manifest says them
        np.testing.assert_allclose(update.delta, y - x, rtol=0, atol=2e-6)
        np.testing.assert_allclose(kept(of, round_)["control"], own, rtol=0, atol=2e-5)
        own = kept(of, round_)["control"].astype(np.float64)  # so that rounding adds up nowhere
    assert np.abs(own).max() > 0.01


RULES: list[Json] = [
    {"strategy": {"rule": "scaffold", "weights": "equal"}},
    {"strategy": {"rule": "fedsa-lora"}},
    {"exchange": {"personal": ["classifier"]}},
    {"personal": {"kind": "ditto", "steps": 2}},
]


@pytest.mark.parametrize("sections", RULES)
def test_a_round_tried_again_and_a_process_started_anew_end_at_the_same_bits(
    tmp_path: Path, bert: Path, sections: Json
) -> None:
    config = made(bert, **sections)
    of = agent(tmp_path, config)
    first, second = start_of(of, 1), start_of(of, 2)
    train(of, 1, first)
    expected, left = train(of, 2, second), kept(of, 2)
    for another in (of, agent(tmp_path, config)):
        again = train(another, 2, second)
        assert again.delta.tobytes() == expected.delta.tobytes()
        assert {n: v.tobytes() for n, v in kept(another, 2).items()} == {
            n: v.tobytes() for n, v in left.items()
        }
    assert left  # and it counts: without what round 1 left, round 2 is another
    other = agent(tmp_path / "fresh", config)
    train(other, 2, second)
    assert any(v.tobytes() != left[n].tobytes() for n, v in kept(other, 2).items())


@pytest.mark.parametrize("sections", RULES[1:3])
def test_personal_parameters_go_on_and_never_leave(
    tmp_path: Path, bert: Path, sections: Json
) -> None:
    config = made(bert, **sections)
    of = agent(tmp_path, config)
    exchange = of.resident().loaded.exchange
    personal = {name for name, _ in exchange.own_layout.entries}
    assert personal
    assert not personal & {name for name, _ in of.uplink(1).entries}
    sent, at = start_of(of), np.zeros(0)
    for round_ in (1, 2):
        update = train(of, round_, sent)
        # by hand: all that is trained takes plain steps, from what was sent and what was kept
        if round_ == 1:
            exchange.write(sent)
            at = exchange.read_trained().astype(np.float64)
        else:
            exchange.write(sent, kept(of, 1)["own"])
            at = exchange.read_trained().astype(np.float64)
        end = pulled_steps([slope_of(of, sent)] * 3, at, centre=at, strength=0.0, rate=RATE)
        whole = exchange.trained_layout.unflatten(end.astype(np.float32))
        mine = exchange.own_layout.flatten({name: whole[name] for name in personal})
        np.testing.assert_allclose(kept(of, round_)["own"], mine, rtol=0, atol=2e-6)
        gone = update.delta + sent
        travelled = of.uplink(round_).flatten({n: whole[n] for n, _ in of.uplink(round_).entries})
        np.testing.assert_allclose(gone, travelled, rtol=0, atol=2e-6)
    # a message with all that is trained is stopped at the gate
    update = train(of, 2, sent)
    layout = exchange.trained_layout
    leak = replace(update, layout=layout.digest, delta=np.zeros(layout.size, np.float32))
    with pytest.raises(EgressRefused, match="the approved manifest has another layout"):
        of.let_out(leak)


def test_a_site_tests_what_was_sent_with_its_own_part(tmp_path: Path, bert: Path) -> None:
    config = made(bert, exchange={"personal": ["classifier"]})
    of, other = agent(tmp_path, config), agent(tmp_path, config, name="b")
    sent = start_of(of)
    train(of, 1, sent)
    resident = of.resident()
    loaded, task = resident.loaded, resident.task
    losses = {}
    for name, own in (("own", kept(of, 1)["own"]), ("initial", None)):
        loaded.exchange.write(sent, own)
        tokens = of.tokens_of("test")
        sums = evaluate(loaded, task, tokens, batch_size=64, training=config.training)
        losses[name] = metrics_of("classification", sums)["loss"]
    assert abs(losses["own"] - losses["initial"]) > 1e-3
    assert metrics_of("classification", evaluated(of, 1, sent).sums)["loss"] == losses["own"]
    assert metrics_of("classification", evaluated(of, 0, sent).sums)["loss"] == losses["initial"]
    # the model is shared: a site that has not trained starts from the initial values all the same
    alone = agent(tmp_path / "alone", config, name="b")
    expected = train(alone, 1, sent)
    train(of, 2, sent)
    assert train(other, 1, sent).delta.tobytes() == expected.delta.tobytes()


def test_ditto_trains_a_model_beside_and_changes_nothing_that_leaves(
    tmp_path: Path, bert: Path
) -> None:
    personal: Json = {"kind": "ditto", "pull": 0.7, "steps": 2}
    config = made(bert, personal=personal)
    of, plain = agent(tmp_path, config), agent(tmp_path / "plain", made(bert))
    own: Point | None = None
    for round_ in (1, 2):
        sent = start_of(of, round_)
        update = train(of, round_, sent)
        assert update.delta.tobytes() == train(plain, round_, sent).delta.tobytes()
        w = sent.astype(np.float64)
        v = w if own is None else own
        slopes = [slope_of(of, sent)] * 2
        own = pulled_steps(slopes, v, centre=w, strength=0.7, rate=RATE)
        np.testing.assert_allclose(kept(of, round_)["model"], own, rtol=0, atol=2e-6)
    sent = start_of(of, 3)
    told = evaluated(of, 2, sent)
    mine = personal_of(told.sums)
    assert mine is not None
    resident = of.resident()
    resident.loaded.exchange.write_trained(kept(of, 2)["model"])
    tokens, training = of.tokens_of("test"), config.training
    expected = evaluate(resident.loaded, resident.task, tokens, batch_size=64, training=training)
    assert mine == expected
    plain_sums = {n: c for n, c in told.sums.counts.items() if not n.startswith(PERSONAL)}
    assert plain_sums.keys() == evaluated(plain, 2, sent).sums.counts.keys()
    assert all((c == evaluated(plain, 2, sent).sums.counts[n]).all() for n, c in plain_sums.items())
    assert personal_of(evaluated(of, 2, sent, "validation").sums) is None


def test_fine_tuning_begins_at_the_final_arrays_and_is_the_same_when_asked_again(
    tmp_path: Path, bert: Path
) -> None:
    schedule: Json = {"schedule": "linear"}  # whose rate is 0 by now
    config = made(bert, personal={"kind": "fine-tune", "steps": 2}, training=WHOLE | schedule)
    of = agent(tmp_path, config)
    sent = start_of(of)
    first, again = evaluated(of, 2, sent), evaluated(of, 2, sent)
    assert first.sums == again.sums
    w = sent.astype(np.float64)
    tuned = pulled_steps([slope_of(of, sent)] * 2, w, centre=w, strength=0.0, rate=RATE)
    np.testing.assert_allclose(kept(of, 2)["model"], tuned, rtol=0, atol=2e-6)
    mine = personal_of(first.sums)
    assert mine is not None
    assert mine.counts["loss"] != first.sums.counts["loss"]


def test_a_site_s_own_sums_leave_with_personal_alone_and_of_the_test_alone(
    tmp_path: Path, bert: Path
) -> None:
    of = agent(tmp_path, made(bert, personal={"kind": "ditto", "steps": 2}))
    plain = agent(tmp_path, made(bert))
    told = evaluated(of, 1, start_of(of))
    assert of.let_out(told) is told
    for asked, reply in ((plain, told), (of, replace(told, split="validation"))):
        with pytest.raises(EgressRefused, match="personal_"):
            asked.let_out(reply)


def test_under_privacy_personal_parameters_have_the_round_s_one_charge(
    tmp_path: Path, bert: Path
) -> None:
    config = made(
        bert,
        exchange={"personal": ["classifier"]},
        privacy=PRIVACY,
        strategy={"weights": "equal"},
        training=WHOLE | {"batch_size": 8},
    )
    of = agent(tmp_path, config)
    sent = start_of(of)
    before = of.resident().loaded.exchange.read_own()
    update = train(of, 1, sent)
    assert update.delta.size == of.layout.size  # no head in it
    assert not any("classifier" in name for name, _ in of.uplink(1).entries)
    mine = kept(of, 1)["own"]
    assert (mine != before).all()  # each number has noise, and it is the mechanism's
    train(of, 2, sent)
    ledger = Ledger(of.site.ledger_file, site="a", data=of.site.data_name)
    assert [(c.round, c.purpose) for c in ledger.charges] == [(1, "train"), (2, "train")]


def test_what_was_kept_at_another_rank_is_refused(tmp_path: Path, bert: Path) -> None:
    config = made(bert, strategy={"rule": "fedsa-lora"}, exchange={"rank": 4, "rank_min": 2})
    of = agent(tmp_path, config)
    sent = start_of(of)
    train(of, 1, sent)
    compute = of.site.compute.model_copy(update={"rank": 2})
    smaller = SiteAgent(of.site.model_copy(update={"compute": compute}), config)
    request = TrainRequest(
        manifest=config.digest, round=2, layout=of.layout.digest, vector=sent, run=RUN
    )
    reply = smaller.answer(request)
    assert isinstance(reply, Refusal)
    assert "set compute.rank back" in reply.detail


def test_a_plan_s_batches_are_whole_here(tmp_path: Path, bert: Path) -> None:
    # or the gradients above would be functions of more than the parameters
    of = agent(tmp_path, made(bert))
    count = len(of.tokens_of("train"))
    plan = RoundPlan.of(of.federation, round=1, site="a", micro_batch=None)
    assert [sorted(batch) for batch in plan.batches(count)] == [list(range(count))] * 3
