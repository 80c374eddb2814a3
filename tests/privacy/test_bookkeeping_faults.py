"""What once let a unit add more than its share: failed batches, coupled rows, long norms."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from intramural.core.errors import TrainingError, Unclippable
from intramural.privacy import make_private
from intramural.privacy.norms import squared_norms
from intramural.privacy.opacus_engine import OpacusEngine
from tests.privacy import toys

torch.set_num_threads(1)


def length(model: nn.Module) -> float:
    """Return the L2 norm of what was released, in float64."""
    squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
    return float(torch.stack(squares).sum().sqrt())


def losses(model: nn.Module, x: Tensor) -> Tensor:
    """Return one large loss a row."""
    out: Tensor = model(x).flatten(1).square().sum(1)
    return 100 * out


def attached(model: nn.Module, *, noise: Any = None, noise_multiplier: float = 0.0) -> Any:
    """Return make_private's optimizer, which clips at 1 and divides by 1."""
    return make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=noise_multiplier,
        max_grad_norm=1.0,
        expected_batch_size=1,
        noise=noise or toys.Zeros(),
    )


def backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("row", [torch.full((1, 4_000_001), 0.1234567), torch.rand(2, 4_000_001)])
def test_norms_of_long_rows_are_right(row: Tensor) -> None:
    # added one after another in float32, the first comes out 2.4e-3 too small
    assert squared_norms(row).tolist() == pytest.approx(
        row.double().square().sum(1).tolist(), rel=1e-6
    )
    assert squared_norms(row[:, :100]).tolist() == pytest.approx(
        row[:, :100].double().square().sum(1).tolist(), rel=1e-6
    )


@pytest.mark.parametrize("kind", ["bookkeeping", "opacus"])
def test_a_unit_with_a_long_gradient_keeps_the_bound(kind: str) -> None:
    model = nn.Linear(2048, 2048, bias=False).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    make: Any = OpacusEngine if kind == "opacus" else None
    settings: dict[str, Any] = {"noise_multiplier": 0.0, "divisor": 1.0, "noise": toys.Zeros()}
    engine = (
        make(model, optimizer, clip_norm=1.0, **settings)
        if make
        else toys.make_engine(model, clip_norm=1.0)
    )
    x = torch.full((1, 512, 2048), 0.1234567)  # all of the gradient's elements are alike
    with engine:
        engine.open([0])
        engine.fold(model(x).sum((1, 2)))
        engine.release()
        assert 0.999 < length(model) <= 1.0


def test_a_batch_that_failed_adds_nothing_to_the_next() -> None:
    model, x = nn.Linear(4, 2), torch.ones(1, 4)
    engine = toys.make_engine(model, clip_norm=1.0)
    with engine:
        engine.open([0])
        engine.fold(losses(model, x))  # and no release
    with engine:
        engine.open([0])
        engine.fold(losses(model, x))
        engine.release()
    assert length(model) == pytest.approx(1.0, abs=2e-6)


def test_a_part_that_failed_takes_its_batch_along() -> None:
    model, x = nn.Linear(4, 2), torch.ones(1, 4)
    engine = toys.make_engine(model, clip_norm=1.0)
    with engine:
        engine.open([0])
        engine.fold(losses(model, x))
        engine.open([0])
        with pytest.raises(RuntimeError, match="does not require grad"):
            engine.fold(losses(model, x).detach())
        engine.open([0])
        engine.fold(losses(model, x))  # the same unit, tried again
        engine.release()
    assert length(model) == pytest.approx(1.0, abs=2e-6)


def test_detaching_forgets_a_batch_underway() -> None:
    model, x = nn.Linear(4, 2), torch.ones(1, 4)
    optimizer = attached(model)
    backward(losses(model, x).sum())
    optimizer.signal_skip_step()
    optimizer.step()
    optimizer.detach()
    optimizer.attach_model(model)
    backward(losses(model, x).sum())
    optimizer.step()
    optimizer.detach()
    assert length(model) == pytest.approx(1.0, abs=2e-6)


class Coupled(nn.Module):
    """A layer whose rows reach one another as a function says."""

    def __init__(self, couple: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.couple = nn.Linear(4, 4), nn.Linear(4, 2), couple

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.couple(self.first(x))))
        return out


@pytest.mark.parametrize(
    "couple",
    [lambda h: h + h[:1], lambda h: h.cumsum(0), lambda h: h + h[1:2], lambda h: h - h.mean(0)],
    ids=["all read the first", "each reads those before", "all read the second", "the mean"],
)
@pytest.mark.parametrize("rows", [2, 5])
def test_rows_that_reach_one_another_are_refused_whichever_way(
    couple: Callable[[Tensor], Tensor], rows: int
) -> None:
    model = Coupled(couple)
    with toys.make_engine(model, clip_norm=1.0) as engine:
        engine.open(range(rows))
        with pytest.raises(Unclippable, match="depends on other rows"):
            engine.fold(losses(model, torch.randn(rows, 4)))


@pytest.mark.parametrize("spoilt", [0.0, torch.nan])
def test_a_part_without_gradients_does_not_pass_for_a_check(spoilt: float) -> None:
    model = Coupled(lambda h: h - h.mean(0))
    with toys.make_engine(model, clip_norm=1.0) as engine:
        engine.open(range(4))
        engine.fold(losses(model, torch.randn(4, 4)) * spoilt)
        engine.open(range(4))
        with pytest.raises(Unclippable, match="depends on other rows"):
            engine.fold(losses(model, torch.randn(4, 4)))


def test_two_forward_passes_in_one_backward_are_refused() -> None:
    model = nn.Linear(4, 2)
    optimizer = attached(model)
    both = losses(model, torch.ones(3, 4)).sum() + losses(model, torch.ones(3, 4)).sum()
    with pytest.raises(TrainingError, match="another forward pass than the last"):
        backward(both)
    optimizer.detach()


def test_a_stale_graph_is_not_folded_with_the_owners_of_another_pass() -> None:
    model = nn.Linear(4, 2)
    with toys.make_engine(model, clip_norm=1.0) as engine:
        engine.open([0, 1])
        old = losses(model, torch.ones(2, 4))
        engine.open([0, 0])
        with pytest.raises(TrainingError, match="another forward pass than the last"):
            engine.fold(old)


def test_gradients_may_be_cleared_between_forward_and_backward() -> None:
    model, x = nn.Linear(4, 2), torch.ones(1, 4)
    optimizer = attached(model)
    loss = losses(model, x).sum()
    optimizer.zero_grad()
    backward(loss)
    optimizer.step()
    optimizer.detach()
    assert length(model) == pytest.approx(1.0, abs=2e-6)


@pytest.mark.parametrize("positions", [False, True])
def test_a_batch_of_nobody_may_go_through_the_model(positions: bool) -> None:
    model = nn.Sequential(nn.Embedding(20, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    x = torch.zeros((0, 5) if positions else (0,), dtype=torch.long)
    noise = toys.Ones()
    optimizer = attached(model, noise=noise, noise_multiplier=1.0)
    backward(model(x).sum())
    optimizer.step()
    optimizer.detach()
    assert sorted(noise.draws) == [2, 4, 4, 8, 80]  # each parameter's, and nothing beside it
    assert length(model) == pytest.approx(98**0.5)


@pytest.mark.parametrize("inside", ["fold", "step"])
def test_clipping_under_autocast_is_in_float32(inside: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(64, 64), torch.randn(1, 3, 64)
    half = torch.autocast("cpu", dtype=torch.bfloat16)
    if inside == "fold":
        with toys.make_engine(model, clip_norm=1.0) as engine:
            engine.open([0])
            with half:
                engine.fold(functional.mse_loss(model(x), x, reduction="none").sum((1, 2)))
            engine.release()
    else:
        optimizer = attached(model)
        with half:
            backward(losses(model, x).sum())
            optimizer.step()
        optimizer.detach()
    assert length(model) <= 1.0


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_matrix_products_below_float32_are_refused(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    try:
        with pytest.raises(Unclippable, match=r"call torch\.set_float32_matmul"):
            toys.make_engine(nn.Linear(4, 2), clip_norm=1.0)
    finally:
        torch.set_float32_matmul_precision("highest")


def patched() -> nn.Module:
    layer = nn.Linear(4, 2)
    forward = layer.forward
    layer.__dict__["forward"] = lambda x: 100 * forward(x)
    return layer


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("make", [patched, lambda: nn.utils.weight_norm(nn.Linear(4, 2))])
def test_a_layer_that_is_not_what_its_class_says_is_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(Unclippable, match="no exact gradient a record"):
        toys.make_engine(make(), clip_norm=1.0)


@pytest.mark.parametrize("option", ["scale_grad_by_freq", "sparse", "max_norm"])
def test_lora_on_a_table_read_by_how_often_it_is_used_is_refused(option: str) -> None:
    options: dict[str, Any] = {option: 1.0 if option == "max_norm" else True}
    model: Any = nn.Sequential(nn.Embedding(20, 4, **options))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(Unclippable, match="no exact gradient a record"):
        toys.make_engine(adapted, clip_norm=1.0)
