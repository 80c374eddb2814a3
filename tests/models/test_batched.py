"""Many clients in one pass a step: each gets what it gets alone."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from intramural.core.errors import ConfigError, TrainingError
from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout, Vector
from intramural.models import batched
from intramural.models.batched import train_jobs
from intramural.models.batched_fit import fit_of, unfit_reason
from intramural.models.job import Job, Trained
from intramural.models.loading import Loaded
from intramural.models.stacked import pieces
from intramural.models.tasks import Task, Tokens
from intramural.models.training import train_round
from tests.models.batched_builders import (
    FACTORED,
    KINDS,
    LENGTH,
    SPOILT,
    Bag,
    Mlp,
    by_hand,
    clients,
    model_of,
    modes,
    plan_of,
    start_of,
)
from tests.models.builders import bench, titles
from tests.models.test_head import with_dropout
from tests.tiny import Json, federation, generation

SIZES = [7, 3, 12, 8, 5]
"""With batches of 4: short last batches, clients of less than a batch, passes of 1 to 3 steps."""
SETTINGS: dict[str, Json] = {
    "sgd": {"local_epochs": 1},
    "momentum, decay, cosine": {
        "local_epochs": 2,
        "momentum": 0.9,
        "weight_decay": 0.1,
        "schedule": "cosine",
        "warmup": 0.1,
    },
    "clip": {"local_steps": 3, "gradient_clip": 0.05},
    "adamw": {
        "local_epochs": 2,
        "optimizer": "adamw",
        "learning_rate": 5e-4,
        "weight_decay": 0.1,
        "schedule": "linear",
    },
}
EXACT = 1e-6


def config_of(bert: Path, **training: Any) -> FederationConfig:
    how: Json = {"batch_size": 4, "local_steps": None, "learning_rate": 0.1} | training
    return federation(bert, training=how, model={"max_length": LENGTH})


def jobs_of(config: FederationConfig, tokens: list[Tokens]) -> list[Job]:
    return [
        Job(tokens=own, plan=plan_of(config, site), up=Layout(()))
        for site, own in enumerate(tokens)
    ]


def alone(loaded: Loaded, task: Task, job: Job, start: Vector) -> Trained:
    """Return what `train_round` makes of one client; the model is left as found."""
    before = loaded.exchange.read()
    loaded.exchange.write(start)
    loss = train_round(loaded, task, job.tokens, job.plan)
    delta = loaded.exchange.read() - start
    loaded.exchange.write(before)
    return delta, loss


def assert_equal(got: Trained | TrainingError, expected: Trained) -> None:
    assert isinstance(got, tuple)
    assert np.abs(expected[0]).max() > 1e-4  # it was trained
    np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=EXACT)
    assert got[1] == pytest.approx(expected[1], abs=EXACT)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *[(kind, settings) for kind in ("mlp", "bag", "head") for settings in SETTINGS],
        ("bert, lora", "momentum, decay, cosine"),
        ("bert, lora", "adamw"),
        ("bert, full", "clip"),  # AdamW makes steps of keys' biases, whose gradient is rounding
    ],
)
def test_each_client_gets_what_it_gets_alone(bert: Path, kind: str, settings: str) -> None:
    loaded, task = model_of(kind, bert)
    jobs = jobs_of(config_of(bert, **SETTINGS[settings]), clients(kind, task, SIZES))
    start = start_of(loaded)
    expected = [alone(loaded, task, job, start) for job in jobs]
    before = modes(loaded.model)
    start.setflags(write=False)  # as it comes from the wire
    for got, want in zip(train_jobs(loaded, task, jobs, start), expected, strict=True):
        assert_equal(got, want)
    assert modes(loaded.model) == before


def test_the_settings_of_the_test_above_all_matter(bert: Path) -> None:
    loaded, task = model_of("bag", bert)
    start = start_of(loaded)
    whole = SETTINGS["momentum, decay, cosine"]
    ways = [whole, SETTINGS["sgd"], SETTINGS["clip"], SETTINGS["clip"] | {"gradient_clip": None}]
    ways[1] = ways[1] | {"local_epochs": 2}
    ways += [{k: v for k, v in whole.items() if k != name} for name in list(whole)[1:]]
    ends = []
    for way in ways:
        jobs = jobs_of(config_of(bert, **way), clients("bag", task, [12]))
        ((delta, _),) = train_jobs(loaded, task, jobs, start)  # type: ignore[misc]
        ends.append(delta)
    for i, one in enumerate(ends):
        for other in ends[:i]:
            assert np.abs(one - other).max() > 1e-4


@pytest.mark.parametrize("clients_max", [1, 2, 50])
def test_how_many_share_a_stack_changes_nothing(bert: Path, clients_max: int) -> None:
    loaded, task = model_of("bag", bert)
    jobs = jobs_of(config_of(bert, local_epochs=1), clients("bag", task, SIZES))
    start = start_of(loaded)
    got = train_jobs(loaded, task, jobs, start, clients_max=clients_max)
    for result, job in zip(got, jobs, strict=True):
        assert_equal(result, alone(loaded, task, job, start))


def test_no_clients_have_no_results(bert: Path) -> None:
    loaded, task = model_of("mlp", bert)
    assert train_jobs(loaded, task, [], start_of(loaded)) == []


def test_a_stack_keeps_within_its_memory(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, task = model_of("mlp", bert)
    jobs = jobs_of(config_of(bert, local_steps=1), clients("mlp", task, [8] * 5))
    losses = fit_of(loaded, task, jobs[0].plan.training, length=6)
    # a client's parameters four times: 4 * 4 bytes * (6 * 8 + 8 + 8 * 4) = 1408 bytes, and
    # twice what each of 4 rows keeps, at least the 8 numbers of its hidden layer: 256 bytes
    for limit, most in ((1, 1), (2 * 1408, 1), (1 << 29, 50)):
        monkeypatch.setattr(batched, "BYTES_MAX", limit)
        size = batched.stack_size(
            loaded, losses, jobs, rows=lambda job: len(job.tokens) // 2, clients_max=50
        )
        assert size == most
    monkeypatch.setattr(batched, "BYTES_MAX", 20 * (1408 + 256))
    size = batched.stack_size(loaded, losses, jobs, rows=lambda job: 4, clients_max=50)
    assert 2 <= size <= 20


@pytest.mark.parametrize(("count", "most"), [(0, 3), (1, 3), (7, 3), (9, 3), (50, 50)])
def test_pieces_are_alike_and_few(count: int, most: int) -> None:
    found = pieces(count, most)
    assert [i for piece in found for i in piece] == list(range(count))
    assert len(found) == -(-count // most)
    sizes = [len(piece) for piece in found]
    assert not sizes or max(sizes) - min(sizes) <= 1


def check_spoilt_client(config: FederationConfig) -> None:
    """Of three clients the middle one fails, as it does alone; the others are as ever."""
    loaded, task = by_hand(Mlp())
    tokens = clients("mlp", task, [8, 8, 8])
    tokens[1].inputs[3] = np.full(6, SPOILT, dtype=np.int32)
    jobs = jobs_of(config, tokens)
    start = start_of(loaded)
    before, spoilt, after = train_jobs(loaded, task, jobs, start)
    with pytest.raises(TrainingError) as caught:
        alone(loaded, task, jobs[1], start)
    assert isinstance(spoilt, TrainingError)
    assert str(spoilt) == str(caught.value)
    loaded, task = by_hand(Mlp())
    for got, job in ((before, jobs[0]), (after, jobs[2])):
        assert_equal(got, alone(loaded, task, job, start))


def test_a_client_whose_loss_is_not_finite_fails_by_itself(bert: Path) -> None:
    check_spoilt_client(config_of(bert, local_epochs=1))


@pytest.mark.parametrize("kind", KINDS)
def test_models_that_fit_are_not_refused(bert: Path, kind: str) -> None:
    loaded, task = model_of(kind, bert)
    before = modes(loaded.model)
    state = torch.random.get_rng_state()
    assert unfit_reason(loaded, task, config_of(bert, local_steps=1)) is None
    assert modes(loaded.model) == before
    assert torch.equal(torch.random.get_rng_state(), state)
    losses = fit_of(loaded, task, config_of(bert, local_steps=1).training, length=6)
    assert (losses.layers is not None) == FACTORED[kind]


class Dropping(Bag):
    """Drops outside any dropout layer."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        logits = super().forward(input_ids, attention_mask).logits
        return SimpleNamespace(logits=nn.functional.dropout(logits, 0.5, self.training))


class Heedless(Bag):
    """Looks at padding."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return super().forward(input_ids, torch.ones_like(attention_mask))


class Asking(Bag):
    """Takes another way for a stack of other values."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        if bool((input_ids > 3).any()):
            return super().forward(input_ids, attention_mask)
        return super().forward(input_ids + 1, attention_mask)


class Remembering(Mlp):
    """Uses a tensor of its own past its name, so that a stack's do not reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = [self.top.weight]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        logits = super().forward(input_ids, attention_mask).logits
        return SimpleNamespace(logits=logits + self.kept[0].sum(1))


class Mixing(Mlp):
    """Holds a row against the mean of its batch."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        logits = super().forward(input_ids, attention_mask).logits
        return SimpleNamespace(logits=2 * logits - logits.mean(0))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Mixing, "says other things of a row in a stack"),
        (Dropping, "draws random numbers in training"),
        (Heedless, "says other things of a row in a stack"),
        (Asking, "cannot run for several clients at once"),
        (Remembering, "says other things of a row in a stack"),
    ],
)
def test_a_model_that_would_not_be_equal_is_refused(
    bert: Path, model: type[nn.Module], reason: str
) -> None:
    loaded, task = by_hand(model())
    config = config_of(bert, local_steps=1)
    assert reason in (unfit_reason(loaded, task, config) or "")
    jobs = jobs_of(config, clients("bag", task, [4]))
    with pytest.raises(ConfigError, match=f"cannot train this federation: .*{reason}"):
        train_jobs(loaded, task, jobs, start_of(loaded))


def test_a_model_that_diverged_is_not_refused_for_good(bert: Path) -> None:
    loaded, task = by_hand(Mlp())
    good, config = loaded.exchange.read(), config_of(bert, local_steps=1)
    loaded.exchange.write(np.full_like(good, np.nan))
    assert "not finite" in (unfit_reason(loaded, task, config) or "")
    loaded.exchange.write(good)
    assert unfit_reason(loaded, task, config) is None


def test_what_cannot_be_equal_is_refused_by_name(bert: Path, llama: Path, tmp_path: Path) -> None:
    loaded, task = model_of("bert, lora", bert)
    private: Json = {
        "unit": "record",
        "noise_multiplier": 1.0,
        "delta": 1e-5,
        "clip_norm": 1.0,
        "nominal_records": 20,
        "engine": "opacus",
    }
    for key, section, value in (
        ("precision", "training", {"precision": "bfloat16"}),
        ("gradient_checkpointing", "training", {"gradient_checkpointing": True}),
        ("privacy.engine = 'opacus'", "privacy", private),
    ):
        found = unfit_reason(loaded, task, federation(bert, **{section: value}))
        assert found is not None
        assert key in found
    on = bench(federation(with_dropout(bert, tmp_path), exchange={"kind": "full"}), [])
    found = unfit_reason(on.loaded, on.task, on.config)
    assert found is not None
    assert "embeddings.dropout drops at random (0.5)" in found
    speaks = bench(generation(llama), titles(2))
    found = unfit_reason(speaks.loaded, speaks.task, speaks.config)
    assert found is not None
    assert "task.kind = 'generation'" in found


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"strategy": {"rule": "ffa-lora"}}, "'ffa-lora'"),
        ({"strategy": {"rule": "fedsa-lora"}}, "'fedsa-lora'"),
        ({"strategy": {"rule": "scaffold"}}, "'scaffold'"),
        ({"strategy": {"rule": "flora"}}, "'flora'"),
        ({"exchange": {"personal": ["classifier"]}}, "trains other parts than it sends"),
        ({"exchange": {"rank": 4, "rank_min": 2}}, "exchange.rank_min"),
        ({"training": {"proximal": 0.1}}, "training.proximal"),
        ({"personal": {"kind": "ditto", "steps": 1}}, "[personal]"),
    ],
)
def test_what_a_site_does_for_a_rule_is_refused_in_a_stack(
    bert: Path, sections: Json, named: str
) -> None:
    on = bench(federation(bert, **sections), [])
    assert named in (unfit_reason(on.loaded, on.task, on.config) or "")
