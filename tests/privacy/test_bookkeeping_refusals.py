"""What the book-keeping engine refuses, by name, and when."""

from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from intramural.core.errors import TrainingError, Unclippable
from intramural.privacy.bookkeeping import BookkeepingEngine
from intramural.privacy.layer_rules import check_clippable
from intramural.privacy.moved import MovedCheck
from intramural.privacy.opacus_engine import OpacusEngine
from tests.privacy import toys
from tests.privacy.zoo import MODELS, PEFT_ASKS, SEQ, checkpoint

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings(PEFT_ASKS)


def peft_model(config: Any) -> Any:
    return peft.get_peft_model(toys.bert(SEQ), config)


def mixed_peft(**options: Any) -> Any:
    targets = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
    return {**targets, **options}


class Normed(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 4), layer


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def two_names_for_one_memory() -> nn.Module:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = nn.Parameter(a.weight.detach())
    return nn.ModuleDict({"a": a, "b": b})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Normed(nn.BatchNorm1d(4)), "norm .BatchNorm1d. mixes the records"),
        (lambda: Normed(nn.GroupNorm(2, 4)), "norm.weight .GroupNorm. has no exact"),
        (lambda: nn.Sequential(nn.Conv1d(3, 3, 3)), "0.weight .Conv1d. has no exact"),
        (lambda: nn.Sequential(Scaled(4, 4)), "0.weight .Scaled. has no exact"),
        (lambda: nn.Embedding(4, 4, max_norm=1.0), "weight .Embedding. has no exact"),
        (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight .MultiheadAttention. has no"),
        (lambda: nn.LayerNorm([3, 4]), "weight .LayerNorm. has no exact"),
        (two_names_for_one_memory, "b.weight and a.weight are two parameters in one memory"),
        (
            lambda: peft_model(peft.LoraConfig(**mixed_peft(use_dora=True))),
            "lora_magnitude_vector.default.weight .DoraLinearLayer. has no exact",
        ),
        (
            lambda: peft_model(peft.AdaLoraConfig(**mixed_peft(total_step=10))),
            "lora_.*default .ParameterDict of SVDLinear. has no exact",
        ),
        (
            lambda: peft_model(peft.VeraConfig(**mixed_peft(r=4))),
            "vera_lambda_.*default .ParameterDict of Linear. has no exact",
        ),
    ],
)
def test_what_has_no_exact_rule_is_refused_by_name(make: Any, message: str) -> None:
    model = make()
    with pytest.raises(Unclippable, match=message):
        check_clippable(model)
    with pytest.raises(Unclippable, match=message):
        toys.make_engine(model, clip_norm=1.0)


def test_a_frozen_layer_needs_no_rule() -> None:
    check_clippable(nn.Sequential(nn.Conv1d(3, 3, 3).requires_grad_(False), nn.Linear(3, 3)))


def test_the_optimizer_must_hold_the_models_tensors() -> None:
    model = nn.Linear(4, 4)
    settings: dict[str, Any] = {"noise_multiplier": 1.0, "divisor": 1.0, "noise": toys.Ones()}
    partial = torch.optim.SGD([model.weight], lr=0.1)
    with pytest.raises(Unclippable, match="bias is trainable and not in the optimizer"):
        BookkeepingEngine(model, partial, clip_norm=1.0, **settings)
    more = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(Unclippable, match="the optimizer holds 1 tensors"):
        BookkeepingEngine(model, more, clip_norm=1.0, **settings)


def prefixed(*, reentrant: bool) -> Any:
    make, _ = MODELS["gpt2 prefix"]
    model = make()
    checkpoint(model, reentrant=reentrant)
    return model


def balanced(*, coefficient: float = 0.001, told: bool = True) -> Any:
    """Return LoRA on a mixture of experts that may add a balancing loss."""
    config = transformers.MixtralConfig(
        vocab_size=toys.WORDS,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        num_local_experts=2,
        router_aux_loss_coef=coefficient,
        output_router_logits=told,
    )
    return toys.lora(transformers.MixtralForCausalLM(config), "q_proj", task_type="CAUSAL_LM")


UNFIT = [
    (lambda: prefixed(reentrant=False), "prompt_encoder.*weight.*leaves the prefix out"),
    (lambda: prefixed(reentrant=True), "prompt_encoder.*weight.*leaves the prefix out"),
    (balanced, "output_router_logits and a router_aux_loss_coef"),
    (lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)), "1 .BatchNorm1d."),
]
"""What neither engine can clip, trainable parameters aside."""


@pytest.mark.parametrize(("make", "message"), UNFIT)
def test_what_mixes_records_or_cannot_run_is_refused_by_both_engines(
    make: Any, message: str
) -> None:
    model = make()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    settings: dict[str, Any] = {"clip_norm": 1.0, "noise_multiplier": 1.0, "divisor": 1.0}
    for engine in (BookkeepingEngine, OpacusEngine):
        with pytest.raises(Unclippable, match=message):
            engine(model, optimizer, noise=toys.Ones(), **settings)


def test_a_prefix_checkpointed_after_the_engine_was_made_is_refused_when_it_attaches() -> None:
    make, _ = MODELS["bert prefix"]
    model = make()
    engine = toys.make_engine(model, clip_norm=1.0)
    checkpoint(model, reentrant=False)
    with pytest.raises(Unclippable, match="leaves the prefix out"), engine:
        pass
    assert "forward" not in vars(model.prompt_encoder["default"].embedding)


@pytest.mark.parametrize("options", [{"coefficient": 0.0}, {"told": False}])
def test_experts_that_no_loss_balances_are_not(options: Any) -> None:
    check_clippable(balanced(**options))


class Elsewhere(nn.Module):
    """Uses a layer's weight past the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) @ self.layer.weight
        return out.sum(1)


class Coupled(nn.Module):
    """Takes the batch's mean away: each row's loss depends on all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return (out - out.mean(0)).square().sum(1)


class Mixed(nn.Module):
    """Gives a layer a table of no batch dimension, as relative positions do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        bias: Tensor = self.layer(torch.ones(5, 4)).sum()
        return x.sum(1) + bias


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Elsewhere(), "layer.weight: used outside the layer that owns it"),
        (Coupled(), "layer.(weight|bias): a row's loss depends on other rows"),
        (Mixed(), "layer.weight .Linear.: its input does not have one entry a row"),
    ],
)
def test_what_only_a_pass_shows_is_refused_in_the_first(model: nn.Module, message: str) -> None:
    def one_pass() -> None:
        engine.open(range(3))
        engine.fold(model(torch.randn(3, 4)))

    with (
        toys.make_engine(model, clip_norm=1.0) as engine,
        pytest.raises(Unclippable, match=message),
    ):
        one_pass()


def test_wrong_use_is_refused() -> None:
    model = nn.Linear(4, 4)
    engine = toys.make_engine(model, clip_norm=1.0)
    with pytest.raises(TrainingError, match="not attached"):
        engine.open([0])
    with engine:
        with pytest.raises(TrainingError, match="without open"):
            model(torch.ones(2, 4))
        with pytest.raises(TrainingError, match="must stand together"):
            engine.open([0, 1, 0])
        with pytest.raises(TrainingError, match="must stand together"):
            engine.open([1, 2])
        engine.open([0, 1])
        with pytest.raises(TrainingError, match="expected 2 losses, one a row"):
            engine.fold(model(torch.ones(2, 4)).sum())


def test_moved_names_the_tensors_that_stand_still() -> None:
    first, second = nn.Linear(2000, 3), nn.Linear(3, 1)
    tensors = dict(nn.Sequential(first, second).named_parameters())
    moved = MovedCheck(tensors)
    for tensor in (first.weight, second.bias):
        tensor.data += 1e-3
    with pytest.raises(TrainingError, match=r"2 of 4 .* did not move .*: 0.bias, 1.weight;"):
        moved.check()
    for tensor in (first.bias, second.weight):
        tensor.data += 1e-3
    moved.check()
