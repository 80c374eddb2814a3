"""Training: steps as PyTorch takes them by hand, whatever the micro-batches."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from intramural.core.errors import TrainingError
from intramural.core.federation import Training
from intramural.models import training
from intramural.models.steps import make_step
from intramural.models.tasks import Tokens
from intramural.models.training import (
    _accumulate,
    add_gradients,
    dropout_from,
    micro_batches,
    train_round,
)
from tests.models.builders import Bench, bench, chapters, plan, titles, trained
from tests.tiny import Json, federation, generation


def tokens_of(lengths: list[int]) -> Tokens:
    one = np.zeros(1, dtype=np.int32)
    return Tokens(
        inputs=[np.zeros(length, dtype=np.int32) for length in lengths],
        targets=[one] * len(lengths),
    )


@pytest.mark.parametrize("rows_max", [None, 1, 3, 100])
@pytest.mark.parametrize("waste_max", [0, 10, 10_000])
def test_micro_batches_are_a_partition_of_the_batch(rows_max: int | None, waste_max: int) -> None:
    rng = np.random.default_rng(0)
    tokens = tokens_of(rng.integers(1, 60, 50).tolist())
    batch = rng.choice(50, 33, replace=False).tolist()
    parts = list(micro_batches(tokens, batch, rows_max=rows_max, waste_max=waste_max))
    assert sorted(i for part in parts for i in part) == sorted(batch)
    for part in parts:
        lengths = tokens.lengths()[part].tolist()
        assert len(part) <= (rows_max or 33)
        assert max(lengths) * len(part) - sum(lengths) <= waste_max
    longest = [int(tokens.lengths()[part[0]]) for part in parts]
    assert longest == sorted(longest, reverse=True)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("rows_max", [1, 3])
def test_micro_batches_gradients_add_up_to_the_batch_s(
    bert: Path, kind: str, rows_max: int
) -> None:
    config = federation(bert, exchange={"kind": kind})
    on = bench(config, chapters(24))
    batch = list(range(0, 24, 2))
    whole = on.task.losses(on.model, on.task.pad(on.tokens, batch)).mean()
    whole.backward()  # type: ignore[no-untyped-call]
    expected = on.gradient()
    losses = _accumulate(on.loaded, on.task, on.tokens, batch, plan(config, micro_batch=rows_max))
    for ours, theirs in zip(on.gradient(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(losses.mean(), whole.detach())


def by_hand(on: Bench, optimizer: torch.optim.Optimizer, *, clip: float | None = None) -> None:
    """Train a round of the bench's plan with a PyTorch optimizer."""
    parameters = list(on.loaded.exchange.parameters.values())
    for batch in plan(on.config).batches(len(on.tokens)):
        loss = on.task.losses(on.model, on.task.pad(on.tokens, batch)).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if clip is not None:
            norm = torch.sqrt(sum(((p.grad**2).sum() for p in parameters), torch.zeros(())))  # type: ignore[operator]
            assert norm > clip  # else the test says nothing
            for parameter in parameters:
                parameter.grad *= clip / norm  # type: ignore[operator]
        optimizer.step()


def groups(on: Bench, decay: float) -> list[dict[str, Any]]:
    named = on.loaded.exchange.parameters
    vectors = [p for name, p in named.items() if "bias" in name or "LayerNorm" in name]
    matrices = [p for p in named.values() if all(p is not v for v in vectors)]
    return [
        {"params": matrices, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


@pytest.mark.parametrize(
    ("training", "make"),
    [
        ({"optimizer": "sgd"}, lambda g: torch.optim.SGD(g, lr=0.1)),
        (
            {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.3},
            lambda g: torch.optim.SGD(g, lr=0.1, momentum=0.9),
        ),
        ({"optimizer": "adamw"}, lambda g: torch.optim.AdamW(g, lr=0.1)),
        (
            {"optimizer": "adamw", "weight_decay": 0.3, "learning_rate": 0.01},
            lambda g: torch.optim.AdamW(g, lr=0.01),
        ),
    ],
)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_optimizers_step_as_pytorch_does_by_hand(
    bert: Path, training: Json, make: Any, kind: str
) -> None:
    settings = {"local_steps": 3} | training
    config = federation(bert, training=settings, exchange={"kind": kind})
    hand = bench(config, chapters(16))
    hand.model.train()
    by_hand(hand, make(groups(hand, training.get("weight_decay", 0.0))))
    expected = hand.loaded.exchange.read().copy()
    ours = trained(config, chapters(16))
    # AdamW divides by the gradient's size, so that rounding of a gradient near 0 can be seen; the
    # keys' biases have no gradient but rounding, since a softmax does not feel a common shift
    tolerance = 1e-6 if training["optimizer"] == "sgd" else 2e-3
    for slot in hand.loaded.exchange.layout.slots():
        if slot.name.endswith("key.bias"):
            expected[slot.start : slot.stop] = ours[slot.start : slot.stop]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance)
    assert np.mean(np.abs(ours - expected)) < 1e-6


def test_the_gradient_s_norm_is_clipped(bert: Path) -> None:
    config = federation(bert, training={"gradient_clip": 0.01, "local_steps": 2})
    hand = bench(config, chapters(16))
    hand.model.train()
    optimizer = torch.optim.SGD(hand.loaded.exchange.parameters.values(), lr=0.1)
    by_hand(hand, optimizer, clip=0.01)
    ours = trained(config, chapters(16))
    np.testing.assert_allclose(ours, hand.loaded.exchange.read(), rtol=0, atol=1e-6)
    free = trained(federation(bert, training={"local_steps": 2}), chapters(16))
    assert np.abs(ours - free).max() > 1e-3


def test_the_first_round_of_a_process_drops_as_all_later_ones(bert: Path, tmp_path: Path) -> None:
    # A PEFT model that was just built says it trains while its base does not yet.
    base = tmp_path / "dropping"
    shutil.copytree(bert, base)
    settings = json.loads((base / "config.json").read_text()) | {"hidden_dropout_prob": 0.5}
    (base / "config.json").write_text(json.dumps(settings))
    on = bench(federation(base, training={"local_steps": 2}), chapters(16))
    start = on.loaded.exchange.read()
    rounds = []
    for _ in range(2):
        on.loaded.exchange.write(start)
        train_round(on.loaded, on.task, on.tokens, plan(on.config))
        rounds.append(on.loaded.exchange.read().tobytes())
        on.model.eval()  # as an evaluation leaves it
    assert rounds[0] == rounds[1]
    assert (
        rounds[0] != trained(federation(bert, training={"local_steps": 2}), chapters(16)).tobytes()
    )


def test_a_gradient_left_by_a_round_that_failed_is_nobody_s(bert: Path) -> None:
    # The model is shared: what another site's broken round left must not enter this one's update.
    on = bench(federation(bert, training={"local_steps": 2}), chapters(16))
    start = on.loaded.exchange.read()
    for parameter in on.loaded.exchange.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    on.loaded.exchange.write(start)
    train_round(on.loaded, on.task, on.tokens, plan(on.config))
    expected = trained(on.config, chapters(16))
    assert on.loaded.exchange.read().tobytes() == expected.tobytes()


def test_bfloat16_trains_and_leaves_float32_weights_near(bert: Path) -> None:
    settings = {"local_steps": 3, "precision": "bfloat16"}
    on = bench(federation(bert, training=settings), chapters(16))
    loss = train_round(on.loaded, on.task, on.tokens, plan(on.config))
    assert np.isfinite(loss)
    assert {p.dtype for p in on.loaded.exchange.parameters.values()} == {torch.float32}
    exact = trained(federation(bert, training={"local_steps": 3}), chapters(16))
    np.testing.assert_allclose(on.loaded.exchange.read(), exact, rtol=0, atol=0.02)
    assert on.loaded.exchange.read().tobytes() != exact.tobytes()


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("task", ["classification", "generation"])
def test_gradient_checkpointing_gives_equal_gradients(
    bert: Path, llama: Path, kind: str, task: str
) -> None:
    found = []
    for checkpointing in (False, True):
        settings = {"training": {"gradient_checkpointing": checkpointing}}
        if task == "classification":
            on = bench(federation(bert, exchange={"kind": kind}, **settings), chapters(6))
        else:
            on = bench(generation(llama, exchange={"kind": kind}, **settings), titles(6))
        on.model.train()
        losses = on.task.losses(on.model, on.task.pad(on.tokens, list(range(6))))
        losses.mean().backward()  # type: ignore[no-untyped-call]
        found.append(on.gradient())
    for with_, without in zip(*found, strict=True):
        torch.testing.assert_close(with_, without, rtol=0, atol=1e-7)


def test_a_loss_that_is_not_finite_is_an_error_with_a_remedy(bert: Path) -> None:
    config = federation(bert, training={"learning_rate": 1e30, "local_steps": 3})
    remedy = r"loss is not finite at step \d of round 1; lower training\.learning_rate"
    with pytest.raises(TrainingError, match=remedy):
        trained(config, chapters(16))


@pytest.mark.parametrize(
    ("examples", "settings", "sizes"),
    [
        (10, {"local_epochs": 2, "local_steps": None, "batch_size": 4}, [4, 4, 2] * 2),
        (10, {"local_steps": 4, "batch_size": 4}, [4, 4, 2, 4]),
        (3, {"local_steps": 2, "batch_size": 8}, [3, 3]),
    ],
)
def test_batches_are_shuffled_passes(
    bert: Path, examples: int, settings: Json, sizes: list[int]
) -> None:
    of = plan(federation(bert, training=settings))
    batches = list(of.batches(examples))
    assert [len(batch) for batch in batches] == sizes == [len(b) for b in of.batches(examples)]
    first = [i for batch in batches for i in batch][:examples]
    assert sorted(first) == list(range(examples))
    assert list(of.batches(examples)) == batches
    later = plan(federation(bert, training=settings), round=2)
    assert list(later.batches(50)) != list(of.batches(50))


def test_a_round_does_not_depend_on_the_global_generator(bert: Path) -> None:
    config = federation(bert, exchange={"dropout": 0.3}, training={"local_steps": 3})
    torch.manual_seed(1)
    first = trained(config, chapters(16))
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    assert trained(config, chapters(16)).tobytes() == first.tobytes()
    torch.manual_seed(1)
    trained(config, chapters(16))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_sgd_steps_to_the_last_bit_as_pytorch_s_optimizer(momentum: float, decay: float) -> None:
    settings = Training(
        optimizer="sgd", learning_rate=0.1, local_steps=1, momentum=momentum, weight_decay=decay
    )
    generator = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(s, generator=generator)) for s in ((7, 5), (5,), (3, 7))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    step = make_step(ours, settings)
    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in theirs if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in theirs if p.ndim == 1], "weight_decay": 0.0},
        ],
        momentum=momentum,
    )
    for number, rate in enumerate((0.1, 0.07, 0.03)):
        for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            is_left_out = number == 1 and place == 2  # a round may skip a layer
            gradient = torch.randn(a.shape, generator=generator)
            a.grad, b.grad = (None, None) if is_left_out else (gradient, gradient.clone())
        step(rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert all(a.grad is None for a in ours)


@pytest.mark.parametrize("engine", [True, False])
@pytest.mark.parametrize("twice", [False, True])
def test_gradients_are_pytorch_s_own_and_add_up(
    twice: bool, engine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not engine:  # as in a PyTorch that hides it
        monkeypatch.setattr(training, "_ENGINE", None)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(5, 3, generator=generator)
    weights = torch.rand(5, generator=generator)
    ours, theirs = (nn.Linear(3, 1) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    for _ in range(1 + twice):
        add_gradients(ours(inputs).squeeze(1).square(), weights)
        theirs(inputs).squeeze(1).square().backward(weights)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.grad is not None
        assert torch.equal(mine.grad, other.grad)  # type: ignore[arg-type]


def test_dropout_draws_from_its_seed_and_leaves_pytorch_s_generator_as_it_was() -> None:
    torch.manual_seed(1)
    before, cpu = torch.get_rng_state(), torch.device("cpu")
    with dropout_from(7, cpu):
        first = torch.rand(3)
    again = []

    def fail() -> None:
        with dropout_from(7, cpu):
            again.append(torch.rand(3))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(first, again[0])
    assert torch.equal(torch.get_rng_state(), before)
