"""The book-keeping engine: precision, checkpoints, corners, and what it refuses."""

from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from intramural.privacy import records
from intramural.privacy.clipped_sums import clip_factors
from tests.privacy import toys
from tests.privacy.naive import clipped_sum, norms, relative_error, unit_gradients
from tests.privacy.zoo import (
    EXACT,
    FLOAT32,
    MODELS,
    PEFT_ASKS,
    PEOPLE,
    ROUNDED,
    SEQ,
    agree,
    checkpoint,
)

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings(PEFT_ASKS)


def bert_lora() -> Any:
    return toys.lora(toys.bert(SEQ), "query", "value", task_type="SEQ_CLS")


def full_bert() -> Any:
    return toys.bert(SEQ)


RECORDS = [[row] for row in range(toys.ROWS)]
UNITS = pytest.mark.parametrize("units", [RECORDS, PEOPLE], ids=["records", "persons"])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", [name for name in MODELS if "prefix" not in name])
@UNITS
def test_gradient_checkpoints_change_nothing(
    name: str, reentrant: bool, units: list[list[int]]
) -> None:
    make, kind = MODELS[name]
    prepare = partial(checkpoint, reentrant=reentrant)
    assert agree(make, kind, units=units, prepare=prepare) < EXACT


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_the_kind_of_attention_changes_nothing(name: str, kind: str) -> None:
    def prepare(model: Any) -> None:
        model.set_attn_implementation(kind)
        assert model.config._attn_implementation == kind

    make, targets = MODELS[name]
    assert agree(make, targets, prepare=prepare) < EXACT


@pytest.mark.parametrize("name", MODELS)
@UNITS
def test_bfloat16_autocast_agrees_to_its_own_precision(name: str, units: list[list[int]]) -> None:
    def around() -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    make, kind = MODELS[name]
    # a bfloat16 has 8 bits: 2^-7. Attention's prefix alone gets its gradient in float32
    assert agree(make, kind, units=units, around=around) < 8e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("share", [0, 2])
@pytest.mark.parametrize("make", [full_bert, bert_lora])
def test_a_record_that_is_not_finite_adds_zero(
    make: Any, bad: float, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "DENSE_SHARE", share)
    torch.manual_seed(0)
    model = make().train()
    losses = toys.losses_of(kind="label")
    weights = torch.ones(toys.ROWS)
    weights[2] = bad

    def broken(model: nn.Module, rows: Sequence[int]) -> Tensor:
        return losses(model, rows) * weights[list(rows)]

    good = unit_gradients(model, losses, [unit for unit in RECORDS if unit != [2]])
    clip_norm = median(norms(good))
    got = toys.engine_sum(model, broken, RECORDS, clip_norm=clip_norm)
    assert relative_error(got, clipped_sum(good, clip_norm=clip_norm)) < EXACT
    people = [[0, 1], [2, 3], [4], [5]]  # row 3 goes with row 2: they are one person
    good = unit_gradients(model, losses, [[0, 1], [4], [5]])
    got = toys.engine_sum(model, broken, people, clip_norm=clip_norm)
    assert relative_error(got, clipped_sum(good, clip_norm=clip_norm)) < EXACT


class Poisoned(nn.Module):
    """A row whose input is NaN, past a mask that hides it from the loss's value."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.head = nn.Linear(40, 50), nn.Linear(50, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.wide(x))
        return out.nan_to_num(0.0).square().sum((1, 2))


@pytest.mark.parametrize("share", [0, 2])
def test_an_input_that_is_not_finite_adds_zero(share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "DENSE_SHARE", share)
    model = Poisoned()
    x = torch.randn(4, 3, 40)
    expected = unit_gradients(model, lambda m, rows: m(x[list(rows)]), [[0], [1], [3]])
    dirty = x.clone()
    dirty[2, 1] = float("inf")
    got = toys.engine_sum(
        model, lambda m, rows: m(dirty[list(rows)]), [[0], [1], [2], [3]], clip_norm=1.0
    )
    assert relative_error(got, clipped_sum(expected, clip_norm=1.0)) < EXACT


class Shared(nn.Module):
    """A layer called twice, one with the same weight, one that nobody calls, and a tied table."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(60, 40, padding_idx=0)
        self.twice, self.same = nn.Linear(40, 40), nn.Linear(40, 40)
        self.same.weight = self.twice.weight
        self.idle = nn.Linear(3, 2)
        self.head = nn.Linear(40, 60)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.words(ids.flip(1))
        x = torch.tanh(self.twice(x))
        x = torch.tanh(self.twice(x))
        out: Tensor = self.head(self.same(x))
        return out


@pytest.mark.parametrize("units", [[[0], [1], [2], [3]], [[0, 1], [2], [3]], [[0, 1], [2, 3]]])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("share", [0, 2])
def test_a_weight_used_twice_has_its_cross_terms(
    tied: bool, share: int, units: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "DENSE_SHARE", share)
    torch.manual_seed(1)
    model = Shared(tied=tied)
    ids = torch.randint(0, 60, (4, 9))

    def losses(m: nn.Module, rows: Sequence[int]) -> Tensor:
        logits = m(ids[list(rows)])[:, :8]
        targets = ids[list(rows)][:, 1:]
        return functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(1)

    alone = unit_gradients(model, losses, units)
    lengths = norms(alone)
    clip_norm = median(lengths)
    with toys.norms_noted() as noted:
        got = toys.engine_sum(model, losses, units, clip_norm=clip_norm)
    by_engines = clipped_sum(alone, clip_norm=clip_norm, lengths=noted)
    assert relative_error(got, by_engines) < EXACT
    assert all(
        1 - FLOAT32 <= mine / true <= 1 + ROUNDED for mine, true in zip(noted, lengths, strict=True)
    )
    assert not got["idle.weight"].any()


def test_a_unit_adds_no_more_than_the_clip_norm() -> None:
    torch.manual_seed(0)
    model = full_bert().train()
    losses = toys.losses_of(kind="label")
    for clip_norm in (1e-3, 0.1, 0.5):
        got = toys.engine_sum(model, losses, [[1]], clip_norm=clip_norm)
        assert norms([{name: g.double() for name, g in got.items()}])[0] <= clip_norm


def test_clip_factors() -> None:
    values = torch.tensor([0.0, 0.5, 1.0, 4.0, float("inf"), float("nan")], dtype=torch.float64)
    expected = [1.0, 1.0, 1 - 1e-6, (1 - 1e-6) / 4, 0.0, 0.0]
    factors = clip_factors(values, clip_norm=1.0)
    np.testing.assert_allclose(factors.numpy(), expected, rtol=1e-12)


def test_noise_is_drawn_once_a_release_and_an_empty_batch_is_noise_alone() -> None:
    model, noise = full_bert(), toys.Ones()
    engine = toys.make_engine(model, clip_norm=0.5, noise_multiplier=3.0, divisor=4.0, noise=noise)
    losses = toys.losses_of(kind="label")
    with engine:
        for rows in ([0, 1], [2], [3, 4, 5]):
            engine.open(range(len(rows)))
            engine.fold(losses(model, rows))
        engine.release()
        sizes = [parameter.numel() for parameter in engine.optimizer.params]
        assert noise.draws == sizes
        engine.release()
    assert noise.draws == 2 * sizes
    for gradient in toys.gradients(model).values():
        np.testing.assert_allclose(gradient.numpy(), 0.375)  # 3 * 0.5 / 4


def test_the_model_is_left_as_it_was() -> None:
    model = toys.lora(toys.llama(tied=False), "q_proj", "embed_tokens", task_type="CAUSAL_LM")
    before = [(module, dict(module.__dict__)) for module in model.modules()]
    names = {p: dict(p.__dict__) for p in model.parameters()}
    with toys.make_engine(model, clip_norm=1.0) as engine:
        assert any("forward" in module.__dict__ for module in model.modules())
        engine.open(range(2))
        engine.fold(toys.losses_of()(model, [0, 1]))
    for module, attributes in before:
        assert module.__dict__.keys() == attributes.keys()
        assert all(module.__dict__[name] is value for name, value in attributes.items())
    assert all(p.__dict__ == attributes for p, attributes in names.items())
    assert not any(p._backward_hooks for p in model.parameters())


def test_a_pass_without_gradients_goes_the_plain_way() -> None:
    model = full_bert().eval()
    losses = toys.losses_of(kind="label")
    with torch.no_grad():
        expected = losses(model, [0, 1, 2])
        with toys.make_engine(model, clip_norm=1.0):
            torch.testing.assert_close(losses(model, [0, 1, 2]), expected)
