"""OpacusEngine against a loop over units, and what it refuses."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn

from intramural.core.errors import TrainingError, Unclippable
from intramural.privacy.opacus_engine import OpacusEngine
from intramural.privacy.random import SecureRandom
from tests.privacy import toys
from tests.privacy.naive import opacus_sum, relative_error, unit_gradients
from tests.privacy.zoo import MODELS, checkpoint

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

RECORDS = [[row] for row in range(toys.ROWS)]
SEQUENCE = "SequenceClassification"


def make(model: nn.Module, **more: Any) -> OpacusEngine:
    settings: dict[str, Any] = {"clip_norm": 1.0, "noise_multiplier": 0.0, "divisor": 1.0}
    settings["noise"] = toys.Zeros()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return OpacusEngine(model, optimizer, **(settings | more))


def released(
    engine: OpacusEngine, model: nn.Module, losses: Any, *parts: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    with engine:
        for units in parts:
            engine.open([number for number, rows in enumerate(units) for _ in rows])
            engine.fold(losses(model, [row for rows in units for row in rows]))
        engine.release()
        return toys.gradients(model)


def linear_losses(model: nn.Module, x: Tensor, which: Sequence[int]) -> Tensor:
    output: Tensor = model(x[list(which)])
    return output.square().sum(1)


def test_no_unit_adds_more_than_the_clip_norm() -> None:
    model = nn.Linear(3, 2).train()
    x = 100 * torch.randn(4, 3)
    for units in ([[0]], [[0, 1, 2, 3]]):
        engine = make(model, clip_norm=0.25)
        found = released(engine, model, lambda m, rows: linear_losses(m, x, rows), units)
        length = sum(float(g.square().sum()) for g in found.values()) ** 0.5
        assert length == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_unit_that_is_not_finite_adds_exactly_zero(value: float) -> None:
    model = nn.Linear(3, 2).train()
    good, bad = torch.randn(3, 3), torch.randn(4, 3)
    bad[:3] = good
    bad[3] = value
    clean = released(make(model), model, lambda m, w: linear_losses(m, good, w), [[0], [1, 2]])
    both = released(make(model), model, lambda m, w: linear_losses(m, bad, w), [[0], [1, 2], [3]])
    for name, gradient in clean.items():  # rows of another number are added in another order
        torch.testing.assert_close(both[name], gradient, rtol=1e-6, atol=1e-6)
    spoilt = released(make(model), model, lambda m, w: linear_losses(m, bad, w), [[0], [1, 2, 3]])
    alone = released(make(model), model, lambda m, w: linear_losses(m, good, w), [[0]])
    for name, gradient in alone.items():
        torch.testing.assert_close(spoilt[name], gradient, rtol=1e-6, atol=1e-6)


def test_an_empty_batch_is_noise_alone_and_the_divisor_is_the_plans() -> None:
    model = nn.Linear(300, 20).train()
    engine = make(
        model, clip_norm=2.0, noise_multiplier=1.5, divisor=8.0, noise=SecureRandom.seeded(1)
    )
    found = released(engine, model, None)
    expected = SecureRandom.seeded(1)  # weight first, as in the optimizer
    weight = expected.normal(6000, std=3.0).reshape(20, 300) / 8
    np.testing.assert_allclose(found["weight"], weight, rtol=1e-6)
    np.testing.assert_allclose(found["bias"], expected.normal(20, std=3.0) / 8, rtol=1e-6)
    # standard deviation 1.5 * 2 / 8; its estimate from 6000 draws is within 4 / sqrt(12000)
    assert float(found["weight"].std()) == pytest.approx(0.375, rel=0.04)


def test_noise_is_drawn_once_a_batch_whatever_its_parts() -> None:
    model, x = nn.Linear(3, 2).train(), torch.randn(4, 3)
    noise = toys.Zeros()
    engine, calls = make(model, noise_multiplier=1.0, divisor=4.0, noise=noise), [0]
    engine.optimizer.attach_step_hook(lambda optimizer: calls.append(len(calls)))
    found = released(engine, model, lambda m, w: linear_losses(m, x, w), [[0], [1]], [[2]], [[3]])
    assert noise.draws == [6, 2]
    assert len(calls) == 2
    expected = opacus_sum(
        unit_gradients(model, lambda m, w: linear_losses(m, x, w), [[0], [1], [2], [3]]),
        clip_norm=1.0,
    )
    assert relative_error(found, {name: total / 4 for name, total in expected.items()}) < 1e-6


def test_steps_in_a_row_start_from_zero_each() -> None:
    model, x = nn.Linear(3, 2).train(), torch.randn(4, 3)
    with make(model) as engine:
        seen = []
        for _ in range(2):
            engine.open(range(4))
            engine.fold(linear_losses(model, x, range(4)))
            engine.release()
            seen.append(toys.gradients(model))
    assert torch.equal(seen[0]["weight"], seen[1]["weight"])


def test_a_parameter_that_no_row_used_gets_noise_alone() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)}).train()
    x = torch.randn(2, 3)
    found = released(make(model), model, lambda m, w: linear_losses(m["used"], x, w), [[0], [1]])
    assert float(found["used.weight"].abs().sum()) > 0
    assert float(found["idle.weight"].abs().sum()) == 0


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return everything on modules and parameters that an engine could leave behind."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    counts = {
        name: [sorted(vars(module)), *(len(getattr(module, hook)) for hook in hooks)]
        for name, module in model.named_modules()
    }
    return counts | {name: sorted(vars(p)) for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["bert sequences", "bert prompt", "llama lora everywhere"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    build, kind = MODELS[name]
    model, losses = build().train(), toys.losses_of(kind=kind)
    before = state_of(model)
    engine = make(model)
    assert state_of(model) == before
    released(engine, model, losses, RECORDS)
    assert state_of(model) == before
    with engine:
        engine.open(range(2))
        losses(model, [0, 1])  # a forward pass whose backward never comes
    assert state_of(model) == before
    again = released(engine, model, losses, RECORDS)  # and can be entered again
    expected = opacus_sum(unit_gradients(model, losses, RECORDS), clip_norm=1.0)
    assert relative_error(again, expected) < 1e-6


def test_a_forward_pass_that_was_given_up_leaves_no_trace() -> None:
    model, x = nn.Linear(3, 2).train(), torch.randn(4, 3)
    with make(model) as engine:
        engine.open(range(2))
        linear_losses(model, x, [0, 1])
        engine.open(range(4))
        engine.fold(linear_losses(model, x, range(4)))
        engine.release()
        found = toys.gradients(model)
    alone = unit_gradients(model, lambda m, w: linear_losses(m, x, w), [[0], [1], [2], [3]])
    assert relative_error(found, opacus_sum(alone, clip_norm=1.0)) < 1e-6


def ia3() -> Any:
    config = peft.IA3Config(target_modules=["query"], feedforward_modules=[])
    return peft.get_peft_model(toys.bert(SEQUENCE), config)


def half() -> nn.Module:
    return nn.Linear(3, 2).to(torch.bfloat16)


def checkpointed() -> Any:
    model = toys.bert(SEQUENCE)
    checkpoint(model, reentrant=False)
    return model


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: toys.lora(toys.bert(SEQUENCE), "query", use_dora=True), "lora_magnitude_vector"),
        (ia3, r"query.*ia3_l.*outside a forward pass of its own"),
        (lambda: toys.lora(toys.llama(tied=False), "embed_tokens"), "lora_embedding_A"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "1 .BatchNorm1d. mixes the"),
        (half, "must be float32"),
        (lambda: toys.bert("MaskedLM"), r"cls\.predictions\.bias .*layers inside"),
        (checkpointed, "non-reentrant checkpointing"),
    ],
    ids=["dora", "ia3", "embedding lora", "batch norm", "bfloat16", "tied bias", "checkpointing"],
)
def test_what_opacus_cannot_clip_is_refused_by_name(build: Any, words: str) -> None:
    with pytest.raises(Unclippable, match=words):
        make(build())


class Functional(nn.Module):
    """Uses a layer's weight past its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the weight twice, once unseen."""
        return nn.functional.linear(self.layer(x), self.layer.weight)


class Unseen(Functional):
    """Uses a layer's weight past its forward only."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the weight unseen."""
        return nn.functional.linear(x, self.layer.weight)


class Coupled(nn.Module):
    """Takes the batch's mean away."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, less its mean."""
        out: Tensor = self.layer(x)
        return out - out.mean(0)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (Functional, r"layer\.weight: rows of a batch reach one another, or Opacus misreads"),
        (Unseen, r"layer\.weight: Opacus finds no gradient a row"),
        (Coupled, "rows of a batch reach one another"),
    ],
)
def test_what_only_a_pass_shows_is_refused_in_the_first(build: Any, words: str) -> None:
    model = build().train()
    engine = make(model)
    with engine:
        engine.open(range(3))
        losses = model(torch.randn(3, 3)).square().sum(1)
        with pytest.raises(Unclippable, match=words):
            engine.fold(losses)
    assert all(p.grad is None for p in model.parameters())


def test_a_model_in_eval_mode_is_refused_and_not_trained_unclipped() -> None:
    model, x = nn.Linear(3, 2).eval(), torch.randn(2, 3)
    with make(model) as engine:
        with pytest.raises(TrainingError, match=r"call model\.train"):
            engine.open(range(2))
        model.train()
        engine.open(range(2))
        losses = linear_losses(model.eval(), x, range(2))
        with pytest.raises(Unclippable, match="No activations detected"):
            engine.fold(losses)


def test_optimizer_and_model_must_hold_the_same_tensors() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    settings: dict[str, Any] = {
        "clip_norm": 1.0,
        "noise_multiplier": 1.0,
        "divisor": 1.0,
        "noise": toys.Zeros(),
    }
    with pytest.raises(Unclippable, match="not in the optimizer"):
        OpacusEngine(model, torch.optim.SGD(model[0].parameters(), lr=0.1), **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[0].requires_grad_(False)
    model[0].weight = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(Unclippable, match="not in the optimizer"):
        OpacusEngine(model, optimizer, **settings)


@pytest.mark.parametrize("owners", [[], [1], [0, 2], [0, 1, 0], [1, 0]])
def test_units_are_numbered_in_order(owners: list[int]) -> None:
    with (
        make(nn.Linear(3, 2)) as engine,
        pytest.raises(TrainingError, match="numbered from 0 without gaps"),
    ):
        engine.open(owners)


def test_a_mean_loss_and_an_engine_that_is_not_entered_are_refused() -> None:
    model, x = nn.Linear(3, 2).train(), torch.randn(2, 3)
    engine = make(model)
    with pytest.raises(TrainingError, match="use it in a with block"):
        engine.open(range(2))
    with engine:
        engine.open(range(2))
        mean = linear_losses(model, x, range(2)).mean()
        with pytest.raises(TrainingError, match=r"expected 2 losses, one a row, got \(\)"):
            engine.fold(mean)
