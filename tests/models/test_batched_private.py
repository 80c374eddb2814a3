"""Private rounds of many clients at once: each gets the steps and the noise it gets alone."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from intramural.core.errors import ConfigError, TrainingError, Unclippable
from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout, Vector
from intramural.models import batched_private
from intramural.models.batched_fit import fit_of
from intramural.models.batched_private import train_jobs_privately
from intramural.models.job import Job
from intramural.models.loading import Loaded
from intramural.models.private_training import PrivateRound, train_privately
from intramural.models.tasks import Task, Tokens
from intramural.privacy.plan import PrivacyPlan
from intramural.privacy.random import SecureRandom
from tests.models.batched_builders import (
    KINDS,
    LENGTH,
    SPOILT,
    Bag,
    Mlp,
    by_hand,
    clients,
    half_clips,
    model_of,
    modes,
    plan_of,
    start_of,
    unit_gradient,
)
from tests.tiny import Json, federation

EXACT = 1e-6
"""Largest distance from the clients alone, as a share of their way."""
SIZES = [12, 7, 10]
Units = list[NDArray[np.int64]]


def config_of(
    bert: Path, *, unit: str = "record", rate: float = 0.4, privacy: Json | None = None, **how: Any
) -> FederationConfig:
    """Return a federation of steps large enough to see, with noise that hides no sum."""
    table: Json = {
        "unit": unit,
        "noise_multiplier": 0.01,
        "delta": 1e-5,
        "clip_norm": 0.3,
        "nominal_records": 10,
    }
    if unit == "person":
        table |= {"nominal_persons": 10, "records_per_person": 3}
    training = {"batch_size": round(10 * rate), "local_steps": 3, "learning_rate": 1.0} | how
    return federation(
        bert,
        privacy=table | (privacy or {}),
        strategy={"weights": "equal"},
        training=training,
        model={"max_length": LENGTH},
    )


def units_of(unit: str, size: int) -> Units:
    """Return records alone, or the first six of them as two persons' and the rest alone."""
    rows = [np.array([row]) for row in range(size)]
    return rows if unit == "record" else [np.array([0, 4, 5]), np.array([1, 3]), rows[2], *rows[6:]]


def jobs_of(config: FederationConfig, tokens: Sequence[Tokens]) -> list[Job]:
    """Return jobs with generators at their start."""
    privacy = config.privacy
    assert privacy is not None
    return [
        Job(
            tokens=own,
            plan=plan_of(config, site),
            up=Layout(()),
            private=PrivateRound(
                plan=PrivacyPlan.of(config),
                units=units_of(privacy.unit, len(own)),
                random=SecureRandom.seeded(1, "test", site),
                dropout_seed=0,
            ),
        )
        for site, own in enumerate(tokens)
    ]


def alone(loaded: Loaded, task: Task, job: Job, start: Vector) -> Vector:
    """Return what `train_privately` makes of one client; the model is left as found."""
    before = loaded.exchange.read()
    loaded.exchange.write(start)
    assert job.private is not None
    train_privately(loaded, task, job.tokens, job.plan, job.private)
    delta = loaded.exchange.read() - start
    loaded.exchange.write(before)
    return delta


def assert_equal(got: Vector | TrainingError, expected: Vector) -> None:
    assert not isinstance(got, TrainingError)
    wrong = np.linalg.norm((got - expected).astype(np.float64))
    assert wrong < EXACT * np.linalg.norm(expected.astype(np.float64))


def streams(jobs: Sequence[Job]) -> list[int]:
    """Return each generator's next number: equal where as much was drawn."""
    return [job.private.random.seed63() for job in jobs if job.private is not None]


@pytest.mark.parametrize("unit", ["record", "person"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_client_gets_what_it_gets_alone(bert: Path, kind: str, unit: str) -> None:
    loaded, task = model_of(kind, bert)
    tokens, start = clients(kind, task, SIZES), start_of(loaded)
    clip_norm = half_clips(loaded, task, jobs_of(config_of(bert, unit=unit), tokens)[0], start)
    config = config_of(bert, unit=unit, privacy={"clip_norm": clip_norm})
    jobs = jobs_of(config, tokens)
    expected = [alone(loaded, task, job, start) for job in jobs]
    again = jobs_of(config, tokens)
    before = modes(loaded.model)
    start.setflags(write=False)
    got = train_jobs_privately(loaded, task, again, start)
    for ours, theirs in zip(got, expected, strict=True):
        assert_equal(ours, theirs)
    assert streams(again) == streams(jobs)
    assert modes(loaded.model) == before


@pytest.mark.parametrize("kind", ["mlp", "bag"])
@pytest.mark.parametrize(
    "how",
    [
        {"momentum": 0.9, "weight_decay": 0.1, "schedule": "cosine", "warmup": 0.1},
        {"gradient_clip": 0.05},
        {"optimizer": "adamw", "learning_rate": 1e-2, "weight_decay": 0.1},
    ],
)
def test_what_the_optimizer_does_is_as_ever(bert: Path, kind: str, how: Json) -> None:
    loaded, task = model_of(kind, bert)
    tokens, start = clients(kind, task, SIZES), start_of(loaded)
    # noise as large as the sums: AdamW's steps then are not made of rounding
    config = config_of(bert, privacy={"noise_multiplier": 1.0}, **how)
    got = train_jobs_privately(loaded, task, jobs_of(config, tokens), start)
    for ours, job in zip(got, jobs_of(config, tokens), strict=True):
        assert_equal(ours, alone(loaded, task, job, start))


@pytest.mark.parametrize("kind", ["mlp", "bag"])
def test_a_step_that_draws_nobody_is_a_step_of_noise(bert: Path, kind: str) -> None:
    loaded, task = model_of(kind, bert)
    tokens, start = clients(kind, task, [3, 12, 2]), start_of(loaded)
    config = config_of(bert, rate=0.1, local_steps=4)
    counts = []
    for job in jobs_of(config, tokens):
        assert job.private is not None
        random = job.private.random
        for _ in range(4):
            counts.append(len(random.choose(len(job.tokens), probability=0.1)))
            for parameter in loaded.exchange.parameters.values():
                random.normal(parameter.numel(), std=1.0)
    steps = np.array(counts).reshape(3, 4)
    assert (steps == 0).any(0).any()
    assert (steps.sum(0) == 0).any() or (steps[:, (steps > 0).any(0)] == 0).any()
    jobs = jobs_of(config, tokens)
    expected = [alone(loaded, task, job, start) for job in jobs_of(config, tokens)]
    for ours, theirs in zip(train_jobs_privately(loaded, task, jobs, start), expected, strict=True):
        assert_equal(ours, theirs)


def test_a_stack_where_nobody_is_drawn_moves_by_its_noise_alone(bert: Path) -> None:
    loaded, task = model_of("mlp", bert)
    tokens, start = clients("mlp", task, [1, 1]), start_of(loaded)
    config = config_of(bert, rate=0.1, local_steps=1)
    jobs, other = jobs_of(config, tokens), jobs_of(config, tokens)
    got = train_jobs_privately(loaded, task, jobs, start)
    for ours, job in zip(got, other, strict=True):
        assert job.private is not None
        assert len(job.private.random.choose(1, probability=0.1)) == 0
        named = loaded.exchange.parameters
        order = ["hidden.weight", "top.weight", "hidden.bias"]  # matrices first
        noise = {n: job.private.random.normal(named[n].numel(), std=0.003) for n in order}
        # rate 1, noise 0.01 * 0.3, divisor 1
        expected = -np.concatenate([noise[name] for name in named])
        assert not isinstance(ours, TrainingError)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-7)


class Spoilable(Bag):
    """A `Bag` in which one word's rows have no finite loss."""

    def __init__(self) -> None:
        super().__init__()
        scale = torch.ones(40)
        scale[SPOILT] = torch.inf
        self.register_buffer("scale", scale)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        logits = super().forward(input_ids, attention_mask).logits
        return SimpleNamespace(logits=logits * self.get_buffer("scale")[input_ids].amax(-1, True))


@pytest.mark.parametrize("model", [Mlp, Spoilable])
def test_a_record_that_is_not_finite_adds_zero(bert: Path, model: type[Mlp]) -> None:
    loaded, task = by_hand(model())
    tokens, start = clients("mlp", task, SIZES), start_of(loaded)
    for own in (tokens[0], tokens[1]):
        own.inputs[0] = np.full(LENGTH, SPOILT, dtype=np.int32)
    config = config_of(bert, rate=0.9)  # it is drawn, and stands in for what is not drawn
    got = train_jobs_privately(loaded, task, jobs_of(config, tokens), start)
    for ours, job in zip(got, jobs_of(config, tokens), strict=True):
        assert not isinstance(ours, TrainingError)
        assert np.isfinite(ours).all()
        private = job.private
        assert private is not None
        draws = [private.random.choose(len(private.units), probability=0.9)]
        if job.tokens is not tokens[2]:
            assert 0 in draws[0]
    for ours, job in zip(got, jobs_of(config, tokens), strict=True):
        expected = alone(loaded, task, job, start)
        assert np.isfinite(expected).all()
        assert_equal(ours, expected)


@pytest.mark.parametrize("kind", ["mlp", "bag"])
def test_parts_and_stacks_are_knobs_of_memory(
    bert: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    loaded, task = model_of(kind, bert)
    tokens, start = clients(kind, task, SIZES), start_of(loaded)
    config = config_of(bert, unit="person")
    whole = train_jobs_privately(loaded, task, jobs_of(config, tokens), start)
    monkeypatch.setattr(batched_private, "GRADIENT_BYTES_MAX", 1)  # a unit at a time
    for clients_max in (1, 2, 50):
        jobs = jobs_of(config, tokens)
        parts = train_jobs_privately(loaded, task, jobs, start, clients_max=clients_max)
        for ours, theirs in zip(parts, whole, strict=True):
            assert not isinstance(theirs, TrainingError)
            assert_equal(ours, theirs)


def test_no_clip_no_noise_and_another_draw_would_show(bert: Path) -> None:
    # or equality above would say nothing: each of them moves a round by far more than rounding
    loaded, task = model_of("mlp", bert)
    tokens, start = clients("mlp", task, SIZES[:1]), start_of(loaded)
    ends = []
    for privacy in ({}, {"clip_norm": 1e3, "noise_multiplier": 3e-6}, {"noise_multiplier": 0.02}):
        jobs = jobs_of(config_of(bert, privacy=privacy), tokens)
        ends.append(train_jobs_privately(loaded, task, jobs, start)[0])
    ends.append(train_jobs_privately(loaded, task, jobs, start)[0])  # the stream goes on
    for i, one in enumerate(ends):
        for other in ends[:i]:
            assert np.abs(np.subtract(one, other)).max() > 1e-3  # type: ignore[arg-type]


def test_a_tensor_that_stands_still_is_an_error_in_its_client_s_place(bert: Path) -> None:
    loaded, task = model_of("mlp", bert)
    tokens, start = clients("mlp", task, SIZES), start_of(loaded)
    start[-1:] = 0.5
    slot = next(s for s in loaded.exchange.layout.slots() if s.name == "hidden.bias")
    start[slot.start : slot.stop] = 1e30  # beside which float32 loses a step
    got = train_jobs_privately(loaded, task, jobs_of(config_of(bert), tokens), start)
    for result in got:
        assert isinstance(result, TrainingError)
        assert "1 of 3 trainable tensors did not move" in str(result)
        assert "hidden.bias" in str(result)


class Tied(Mlp):
    """Uses a layer's weights past the layer: the layer's factors do not tell all of it."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        logits = super().forward(input_ids, attention_mask).logits
        return SimpleNamespace(logits=logits + self.top.weight.sum(1))


class Twice(Mlp):
    """Runs a layer twice."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        both = [torch.tanh(self.hidden(input_ids.float() / scale)) for scale in (10.0, 20.0)]
        return SimpleNamespace(logits=self.top(both[0] + both[1]))


@pytest.mark.parametrize("model", [Tied, Twice])
def test_gradients_that_no_factors_tell_are_written_out(bert: Path, model: type[Mlp]) -> None:
    loaded, task = by_hand(model())
    tokens, start = clients("mlp", task, [6, 6]), start_of(loaded)
    config = config_of(bert, local_steps=1)
    assert fit_of(loaded, task, config.training, length=LENGTH).layers is None
    clip_norm = half_clips(loaded, task, jobs_of(config, tokens)[0], start)
    privacy = {"clip_norm": clip_norm, "noise_multiplier": 1e-6}
    config = config_of(bert, rate=1.0, local_steps=1, privacy=privacy)
    got = train_jobs_privately(loaded, task, jobs_of(config, tokens), start)
    for ours, job in zip(got, jobs_of(config, tokens), strict=True):
        loaded.exchange.write(start)
        gradients = [unit_gradient(loaded, task, job.tokens, [row]) for row in range(6)]
        lengths = [float(np.linalg.norm(g)) for g in gradients]
        pairs = zip(gradients, lengths, strict=True)
        total = np.stack([g * min(1.0, clip_norm / length) for g, length in pairs]).sum(0)
        assert not isinstance(ours, TrainingError)
        np.testing.assert_allclose(ours, -total / 10, rtol=0, atol=1e-5 * clip_norm)


def test_what_is_not_private_as_planned_is_refused(bert: Path) -> None:
    loaded, task = model_of("mlp", bert)
    tokens, start = clients("mlp", task, [4]), start_of(loaded)
    opacus = jobs_of(config_of(bert, privacy={"engine": "opacus"}), tokens)
    with pytest.raises(ConfigError, match=r"does not clip as privacy\.engine = 'opacus'"):
        train_jobs_privately(loaded, task, opacus, start)
    frozen, task = by_hand(Mlp())
    parameters = frozen.exchange.parameters
    parameters.pop("top.weight")  # trained by the model, and not travelling: nothing clips it
    partly = Loaded(
        model=frozen.model,
        tokenizer=frozen.tokenizer,
        exchange=type(frozen.exchange)(parameters),
        device=frozen.device,
    )
    with pytest.raises(Unclippable, match=r"top\.weight is trainable and not in the optimizer"):
        train_jobs_privately(partly, task, jobs_of(config_of(bert), tokens), partly.exchange.read())


def test_no_clients_have_no_results(bert: Path) -> None:
    loaded, task = model_of("mlp", bert)
    assert train_jobs_privately(loaded, task, [], start_of(loaded)) == []
