"""make_private: the clipper in a plain Opacus loop, with Opacus's accountants and batch memory."""

from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from opacus import PrivacyEngine
from opacus.accountants import RDPAccountant
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from intramural.core.errors import TrainingError, Unclippable
from intramural.privacy import PrivateOptimizer, make_private
from tests.privacy import toys
from tests.privacy.naive import clipped_sum, norms, relative_error, unit_gradients
from tests.privacy.zoo import EXACT

torch.set_num_threads(1)


class Counted:
    """Seeded noise for tests; it counts its draws."""

    def __init__(self) -> None:
        self.rng, self.draws = np.random.default_rng(3), 0

    def normal(self, size: int, *, std: float) -> NDArray[np.float32]:
        self.draws += 1
        return self.rng.normal(0.0, std, size).astype(np.float32)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 40), nn.LayerNorm(40), nn.Tanh(), nn.Linear(40, 2))


def private(model: nn.Module, **more: Any) -> PrivateOptimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    settings = {"noise_multiplier": 0.0, "max_grad_norm": 1.0, "expected_batch_size": 1.0}
    return make_private(model, optimizer, **{**settings, "noise": toys.Zeros(), **more})


def data(rows: int) -> TensorDataset:
    chance = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 5, generator=chance)
    return TensorDataset(x, (x.sum(1) > 0).long())


def losses(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(model(x), y, reduction="none")


def expected_sum(model: nn.Module, rows: int, *, clip_norm: float) -> dict[str, torch.Tensor]:
    x, y = data(rows).tensors
    alone = unit_gradients(
        model,
        lambda m, which: losses(m, x[list(which)], y[list(which)]),
        [[r] for r in range(rows)],
    )
    assert clip_norm < median(norms(alone))
    return clipped_sum(alone, clip_norm=clip_norm)


def test_a_step_writes_the_clipped_sum() -> None:
    model = network()
    expected = expected_sum(model, 10, clip_norm=0.3)
    optimizer = private(model, max_grad_norm=0.3, expected_batch_size=4.0)
    losses(model, *data(10).tensors).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    got = {name: 4.0 * gradient for name, gradient in toys.gradients(model).items()}
    assert relative_error(got, expected) < EXACT


def test_opacus_batch_memory_manager_splits_a_logical_batch() -> None:
    model, noise = network(), toys.Zeros()
    expected = expected_sum(model, 10, clip_norm=0.3)
    optimizer = private(model, max_grad_norm=0.3, noise_multiplier=1.0, noise=noise)
    loader = DataLoader(data(10), batch_size=10)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    steps = 0
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=4, optimizer=optimizer
    ) as parts:
        for x, y in parts:
            assert all(map(torch.equal, before, model.parameters()))
            optimizer.zero_grad()
            losses(model, x, y).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            steps += 1
    assert steps == 3  # 4 + 4 + 2 rows
    assert len(noise.draws) == len(before)
    assert relative_error(toys.gradients(model), expected) < EXACT
    assert not any(map(torch.equal, before, model.parameters()))


def test_an_opacus_accountant_counts_the_steps_and_training_learns() -> None:
    model, accountant, noise = network(), RDPAccountant(), Counted()
    optimizer = private(
        model, noise_multiplier=0.8, expected_batch_size=32, noise=noise, max_grad_norm=1.0
    )
    optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=0.05))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer.original_optimizer, 20, 0.5)
    x, y = data(640).tensors
    chance = np.random.default_rng(5)
    first = float(losses(model, x, y).mean().detach())
    for step in range(40):
        drawn = torch.from_numpy(chance.random(640) < (0.05 if step % 10 else 0.0))
        optimizer.zero_grad()
        if drawn.any():
            losses(model, x[drawn], y[drawn]).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    assert accountant.history == [(0.8, 0.05, 40)]  # empty batches count
    assert noise.draws == 40 * 6
    optimizer.detach()
    assert float(losses(model, x, y).mean().detach()) < 0.8 * first


def test_the_state_is_the_optimizers_own_and_can_be_loaded() -> None:
    model = network()
    optimizer = private(model)
    losses(model, *data(10).tensors).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    state = optimizer.state_dict()
    assert state["state"][0].keys() == {"momentum_buffer"}
    other = private(network())
    other.load_state_dict(state)
    kept = other.state_dict()["state"][0]["momentum_buffer"]
    torch.testing.assert_close(kept, state["state"][0]["momentum_buffer"])


def test_two_backward_passes_in_a_step_are_refused() -> None:
    model = network()
    optimizer = private(model)
    losses(model, *data(10).tensors).sum().backward()  # type: ignore[no-untyped-call]
    with pytest.raises(TrainingError, match="before the last one's gradients were clipped"):
        losses(model, *data(10).tensors)
    optimizer.step()
    losses(model, *data(10).tensors)


def test_zero_grad_forgets_the_pass_and_detach_restores_the_model() -> None:
    model = network()
    before = [dict(module.__dict__) for module in model.modules()]
    optimizer = private(model)
    losses(model, *data(10).tensors).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.zero_grad()
    optimizer.step()
    assert not any(gradient.any() for gradient in toys.gradients(model).values())
    optimizer.detach()
    for module, attributes in zip(model.modules(), before, strict=True):
        assert module.__dict__.keys() == attributes.keys()
        assert not module._forward_pre_hooks


def test_by_default_the_noise_is_cryptographic() -> None:
    pytest.importorskip("intramural.privacy.random")
    torch.manual_seed(0)
    models = [network(), network()]
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        make_private(
            model, optimizer, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=1.0
        ).step()
    one, other = (torch.cat([g.flatten() for g in toys.gradients(m).values()]) for m in models)
    assert 0.8 < float(one.std()) < 1.2  # 402 draws of N(0, 1): a standard error of 0.035
    assert not torch.equal(one, other)


def test_refusals_come_before_any_data() -> None:
    model = nn.Sequential(nn.Conv1d(3, 3, 3))
    with pytest.raises(Unclippable, match=r"0.weight .Conv1d."):
        private(model)
    attached = network()
    private(attached)
    with pytest.raises(TrainingError, match="without a tensor"):
        attached([1.0])


def test_an_optimizer_of_other_tensors_than_the_models_is_refused() -> None:
    settings: dict[str, Any] = {"max_grad_norm": 1.0, "expected_batch_size": 1.0}
    settings |= {"noise_multiplier": 1.0, "noise": toys.Zeros()}
    model = network()
    fewer = torch.optim.SGD(list(model.parameters())[1:], lr=0.1)
    with pytest.raises(Unclippable, match=r"0\.weight is trainable and not in"):
        make_private(model, fewer, **settings)
    more = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(Unclippable, match="the optimizer holds 1 tensors"):
        make_private(model, more, **settings)
    # refused before anything was attached: the model runs, and trains, as it was
    losses(model, *data(4).tensors).sum().backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in model.parameters())


def stepped(model: nn.Module, optimizer: PrivateOptimizer) -> None:
    losses(model, *data(10).tensors).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()


@pytest.mark.filterwarnings("ignore:Secure RNG turned off")
def test_opacus_engine_saves_and_loads_model_optimizer_and_spending(tmp_path: Path) -> None:
    made = []
    for _ in range(2):
        model, engine = network(), PrivacyEngine(accountant="rdp")
        optimizer = private(model, noise_multiplier=0.8, noise=toys.Ones())
        optimizer.attach_step_hook(engine.accountant.get_optimizer_hook_fn(sample_rate=0.05))
        made.append((model, optimizer, engine))
    (model, optimizer, engine), (later, resumed, again) = made
    for _ in range(3):
        stepped(model, optimizer)
    engine.save_checkpoint(path=tmp_path / "saved.pt", module=model, optimizer=optimizer)
    again.load_checkpoint(path=tmp_path / "saved.pt", module=later, optimizer=resumed)
    assert again.accountant.history == [(0.8, 0.05, 3)]
    for _ in range(2):
        for kept, loaded in zip(model.parameters(), later.parameters(), strict=True):
            assert torch.equal(kept, loaded)
        stepped(model, optimizer)
        stepped(later, resumed)  # with the momentum that was loaded
    assert engine.accountant.history == again.accountant.history == [(0.8, 0.05, 5)]


def test_an_optimizer_whose_tensors_were_exchanged_is_found_out_in_its_first_step() -> None:
    # https://github.com/meta-pytorch/opacus/issues/820: copies train, and the model stands still
    model = network()
    optimizer = private(model, noise_multiplier=1.0, noise=Counted())
    group = optimizer.param_groups[0]
    group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]
    with pytest.raises(Unclippable, match=r"0\.weight is trainable and not in the optimizer"):
        stepped(model, optimizer)


@pytest.mark.parametrize("idle", ["skipped parts", "a warm-up"])
def test_a_tensor_that_stands_still_ends_the_first_step_that_moves_others(idle: str) -> None:
    model = network()
    optimizer = private(model, noise_multiplier=1.0, noise=Counted())
    if idle == "skipped parts":
        optimizer.signal_skip_step()
        stepped(model, optimizer)
    else:
        optimizer.param_groups[0]["lr"] = 0.0
        stepped(model, optimizer)
        optimizer.param_groups[0]["lr"] = 0.1
    with torch.no_grad():
        dict(model.named_parameters())["3.bias"].fill_(1e30)  # beside which float32 loses a step
    with pytest.raises(TrainingError, match=r"1 of 6 .* did not move in the first step: 3\.bias;"):
        stepped(model, optimizer)


def test_without_noise_a_gradient_of_zero_is_no_fault() -> None:
    model = network()
    optimizer = private(model)
    with torch.no_grad():
        for parameter in list(model.parameters())[-2:]:
            parameter.zero_()  # so that the layers before get no gradient
    stepped(model, optimizer)
    assert not toys.gradients(model)["0.weight"].any()


def test_a_call_that_asks_for_router_logits_is_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 2))
    optimizer = private(model)
    with pytest.raises(Unclippable, match="output_router_logits adds a loss that balances"):
        model(torch.ones(3, 5), output_router_logits=True)
    optimizer.detach()
