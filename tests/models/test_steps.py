"""Steps taken on the way back: a large model's plain SGD, to the last bit, without its gradient."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from intramural.core.federation import FederationConfig, Training
from intramural.core.layout import Vector
from intramural.models import steps
from intramural.models.steps import Eager, can_step_early, make_step
from intramural.models.training import train_round
from tests.models.builders import bench, chapters, plan, trained
from tests.tiny import federation

NEVER = 1 << 62


@pytest.fixture
def full(bert: Path) -> FederationConfig:
    training = {"learning_rate": 0.1, "local_steps": 3}
    return federation(bert, exchange={"kind": "full"}, training=training)


@pytest.fixture
def size(full: FederationConfig) -> int:
    """Return how many numbers that model has, of which no embedding has nearly as many."""
    loaded = bench(full, chapters(16)).loaded
    whole = loaded.exchange.layout.size
    assert max(p.numel() for p in loaded.model.parameters()) < whole
    return whole


def trained_from(least: int, patch: pytest.MonkeyPatch, *given: Any, **options: Any) -> Vector:
    """Return `trained`, where steps are taken early from so many numbers on."""
    patch.setattr(steps, "LARGE", least)
    return trained(*given, **options)


def test_steps_on_the_way_back_are_those_at_the_end_to_the_last_bit(
    full: FederationConfig, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_the_end = trained_from(NEVER, monkeypatch, full, chapters(16))
    taken: list[float] = []
    move = steps._move

    def watched(parameter: torch.Tensor, gradient: torch.Tensor, rate: float) -> None:
        taken.append(rate)
        move(parameter, gradient, rate)

    monkeypatch.setattr(steps, "_move", watched)
    on_the_way = trained_from(size, monkeypatch, full, chapters(16))
    assert len(taken) >= 3 * 10  # three steps of a model with many parameters
    assert on_the_way.tobytes() == at_the_end.tobytes()


def test_an_embedding_s_rows_alone_are_moved_by_the_same(
    full: FederationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained_from(NEVER, monkeypatch, full, chapters(16))
    kinds: set[bool] = set()
    move = steps._move

    def watched(parameter: torch.Tensor, gradient: torch.Tensor, rate: float) -> None:
        kinds.add(gradient.is_sparse)
        move(parameter, gradient, rate)

    monkeypatch.setattr(steps, "_move", watched)
    rows = trained_from(1, monkeypatch, full, chapters(16))
    assert kinds == {True, False}
    assert not np.array_equal(whole, bench(full, chapters(16)).loaded.exchange.read())
    # Sums of the same numbers in another order: the last bits of float32 (2**-24) may differ.
    np.testing.assert_allclose(rows, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("least", [1, 2000])
def test_micro_batches_add_up_before_the_step(
    full: FederationConfig, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_the_end = trained_from(NEVER, monkeypatch, full, chapters(16), micro_batch=3)
    early = trained_from(least, monkeypatch, full, chapters(16), micro_batch=3)
    np.testing.assert_allclose(early, at_the_end, rtol=1e-5, atol=1e-6)


def test_no_two_parameters_have_a_gradient_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "LARGE", 1)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 1))
    parameters = list(model.parameters())
    most: list[int] = []
    move = steps._move

    def watched(*given: Any) -> None:
        most.append(sum(p.grad is not None for p in parameters))
        move(*given)

    monkeypatch.setattr(steps, "_move", watched)
    eager = Eager()
    eager.rate, eager.is_on = 0.5, True
    with eager.stepping(model, parameters):
        model(torch.tensor([1, 2, 2])).sum().backward()
    assert most == [1] * len(parameters)


def test_afterwards_the_model_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "LARGE", 1)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 1))
    parameters = list(model.parameters())
    before = [p.detach().clone() for p in parameters]
    eager = Eager()
    eager.rate, eager.is_on = 0.5, True

    def fail() -> None:
        with eager.stepping(model, parameters):
            assert model[0].sparse
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    model(torch.tensor([1, 2])).sum().backward()
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert all(p.grad is not None and not p.grad.is_sparse for p in parameters)


def test_rows_and_whole_gradients_are_stepped_by_hand_where_it_is_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(steps, "LARGE", 1)
    settings = Training(optimizer="sgd", learning_rate=0.5, local_steps=1)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 1))
    parameters = list(model.parameters())
    rows, weight = parameters[0], parameters[1].detach().clone()
    before = rows.detach().clone()
    step = make_step(parameters, settings)
    with Eager().stepping(model, parameters):
        model(torch.tensor([1, 2, 2])).sum().backward()
        step(0.5)
    # d(sum of outputs)/d(row) is the output weight, once for each time the token comes.
    expected = before.clone()
    expected[1] -= 0.5 * weight[0]
    expected[2] -= 0.5 * 2 * weight[0]
    torch.testing.assert_close(rows.detach(), expected)
    assert all(p.grad is None for p in parameters)


def test_an_output_layer_s_embedding_has_a_whole_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "LARGE", 1)
    lookup, output = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
    output.weight = lookup.weight
    model = nn.Sequential(lookup, output)
    with Eager().stepping(model, list(model.parameters())):
        assert not lookup.sparse


@pytest.mark.parametrize(
    "change",
    [
        {"momentum": 0.9},
        {"weight_decay": 0.1},
        {"gradient_clip": 1.0},
        {"proximal": 0.1},
        {"gradient_checkpointing": True},
        {"optimizer": "adamw"},
    ],
)
def test_what_looks_at_whole_gradients_gets_them(change: dict[str, Any]) -> None:
    plain = {"optimizer": "sgd", "learning_rate": 0.1, "local_steps": 1}
    assert can_step_early(Training(**plain), steps.LARGE)
    assert not can_step_early(Training(**plain), steps.LARGE - 1)
    assert not can_step_early(Training(**(plain | change)), steps.LARGE)


def test_a_control_variate_is_added_to_whole_gradients(
    full: FederationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shifted(least: int) -> Vector:
        monkeypatch.setattr(steps, "LARGE", least)
        on = bench(full, chapters(16))
        ones = {n: np.ones(p.shape, np.float32) for n, p in on.loaded.exchange.parameters.items()}
        train_round(on.loaded, on.task, on.tokens, plan(full), shift=ones)
        return on.loaded.exchange.read()

    assert shifted(1).tobytes() == shifted(NEVER).tobytes()
