"""A private round is the arithmetic of its plan: a loop over units says the same."""

from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from intramural.core.errors import TrainingError, Unclippable
from intramural.core.layout import Vector
from intramural.models.private_training import PrivateRound, train_privately
from intramural.models.training import precision
from intramural.privacy.plan import PrivacyPlan
from intramural.privacy.random import SecureRandom
from tests.models.builders import Bench, bench, chapters, plan, titles
from tests.tiny import Json, federation, generation

EXACT = 1e-6
"""Largest distance from the loop, as a share of its way."""
NOMINAL, STEPS = 20, 4
"""Units that a site is taken to hold, and steps of the round."""
PRIVACY: Json = {
    "unit": "record",
    "noise_multiplier": 0.5,
    "delta": 1e-5,
    "clip_norm": 0.3,
    "nominal_records": NOMINAL,
}
PERSONS: Json = {"unit": "person", "nominal_persons": NOMINAL, "records_per_person": 3}
RECORDS = [np.array([row]) for row in range(24)]
PEOPLE = [np.array([0, 5]), np.array([1]), np.array([2, 3, 4]), *RECORDS[6:]]
Units = list[NDArray[np.int64]]
KINDS = [
    ("classification", "lora"),
    ("classification", "full"),
    ("classification", "head"),
    ("generation", "lora"),
    ("generation", "full"),
]
"""Every task with every exchange that it has."""


def made(
    base: Path,
    *,
    privacy: Json,
    batch_size: int = 8,
    task: str = "classification",
    kind: str = "lora",
    **training: Any,
) -> Bench:
    """Return a bench whose parameters are all away from zero, LoRA's B too."""
    build, records = (federation, chapters) if task == "classification" else (generation, titles)
    config = build(
        base,
        privacy=PRIVACY | privacy,
        strategy={"weights": "equal"},
        training={"batch_size": batch_size, "local_steps": STEPS, **training},
        exchange={"kind": kind},
    )
    on = bench(config, records(24))
    size = on.loaded.exchange.layout.size
    on.loaded.exchange.write(np.random.default_rng(0).normal(0, 0.1, size).astype(np.float32))
    return on


def half_clipped(base: Path, units: Units, *, privacy: Json, **how: Any) -> Bench:
    """Return a bench whose clip norm is what half of the units' gradients exceed at first.

    Noise is as large as the sums, for one would hide them; steps are large, for parameters round.
    """
    how = {"learning_rate": 1.0} | how
    on = made(base, privacy=privacy, **how)
    lengths = [length(unit_gradients(on, unit)) for unit in units]
    clip_norm = median(lengths)
    assert min(lengths) < 0.999 * clip_norm < 1.001 * clip_norm < max(lengths)
    privacy = privacy | {"clip_norm": clip_norm, "noise_multiplier": 0.01}
    return made(base, privacy=privacy, **how)


def privately(on: Bench, units: Units, *, micro_batch: int | None = None) -> Vector:
    """Train for a round and return the parameters."""
    how = plan(on.config, micro_batch=micro_batch)
    train_privately(on.loaded, on.task, on.tokens, how, private_round(on, units))
    return on.loaded.exchange.read()


def private_round(on: Bench, units: Units) -> PrivateRound:
    plan_ = PrivacyPlan.of(on.config)
    return PrivateRound(
        plan=plan_, units=units, random=SecureRandom.seeded(1, "test"), dropout_seed=0
    )


def unit_gradients(
    on: Bench, rows: NDArray[np.int64], *, factor: str | None = None
) -> list[Tensor]:
    """Return the summed gradient of a unit's rows, each alone in its pass, in float64."""
    parameters = parameters_of(on, factor=factor)
    total = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    for row in rows.tolist():
        with precision(on.config.training, on.loaded.device):
            loss = on.task.losses(on.model, on.task.pad(on.tokens, [row])).sum()
        for one, gradient in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            one.add_(gradient)
    return total


def parameters_of(on: Bench, *, factor: str | None = None) -> list[torch.nn.Parameter]:
    """Return the parameters of a round in the optimizer's order, which is the noise's.

    `factor`: the one LoRA factor among them, 'A' or 'B'; None: both.
    """
    other = {None: "none", "A": "lora_B", "B": "lora_A"}[factor]
    own = [p for n, p in on.loaded.exchange.parameters.items() if other not in n]
    return [p for p in own if p.ndim > 1] + [p for p in own if p.ndim <= 1]


def length(gradients: list[Tensor]) -> float:
    return float(torch.stack([gradient.norm() for gradient in gradients]).norm())


def by_a_loop(
    on: Bench, units: Units, *, factor: str | None = None, pull: float = 0.0
) -> tuple[Vector, list[int], float]:
    """Return the parameters after the steps, how many units each drew, and the share clipped.

    `pull`: how strongly the noised steps are drawn back to the start.
    """
    privacy, divisor = on.config.privacy, on.config.training.batch_size
    rate = on.config.training.learning_rate
    assert privacy is not None
    assert privacy.noise_multiplier is not None
    clip_norm = privacy.clip_norm
    random = SecureRandom.seeded(1, "test")
    parameters = parameters_of(on, factor=factor)
    starts = [parameter.detach().double().clone() for parameter in parameters]
    on.model.train()
    counts, factors = [], []
    for _ in range(STEPS):
        drawn = random.choose(len(units), probability=divisor / NOMINAL)
        counts.append(len(drawn))
        totals = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
        for unit in drawn:
            gradients = unit_gradients(on, units[unit], factor=factor)
            norm = length(gradients)
            # each engine stays a little below the clip norm, and says by how much
            ours, opacus = clip_norm * (1 - 1e-6) / norm, clip_norm / (norm + 1e-6)
            factors.append(min(1.0, opacus if "opacus" in privacy.engine else ours))
            for total, gradient in zip(totals, gradients, strict=True):
                total.add_(gradient * factors[-1])
        for parameter, total, start in zip(parameters, totals, starts, strict=True):
            noise = random.normal(total.numel(), std=privacy.noise_multiplier * clip_norm)
            step = (total + torch.from_numpy(noise).view(total.shape)) / divisor
            with torch.no_grad():
                step = step + pull * (parameter.double() - start)
                parameter.copy_(parameter.double() - rate * step)
    clipped = sum(factor < 1 for factor in factors) / max(1, len(factors))
    return on.loaded.exchange.read(), counts, clipped


def share_wrong(got: Vector, expected: Vector, start: Vector) -> float:
    """Return the distance from where the loop ends, as a share of its way."""
    wrong, way = (got - expected).astype(np.float64), (expected - start).astype(np.float64)
    return float(np.linalg.norm(wrong) / np.linalg.norm(way))


ENGINE = pytest.mark.parametrize("engine", ["bookkeeping", "opacus", "opacus-ghost"])
ENGINE_AND_UNIT = [
    (engine, unit) for engine in ("bookkeeping", "opacus") for unit in ("record", "person")
] + [("opacus-ghost", "record")]  # which has no norm of a person


@pytest.mark.parametrize(("engine", "unit"), ENGINE_AND_UNIT)
@pytest.mark.parametrize(("task", "kind"), KINDS)
def test_a_round_is_poisson_draws_clipped_sums_one_noise_and_the_public_divisor(
    request: pytest.FixtureRequest, engine: str, unit: str, task: str, kind: str
) -> None:
    base = request.getfixturevalue("bert" if task == "classification" else "llama")
    privacy = {"engine": engine} | (PERSONS if unit == "person" else {})
    units = PEOPLE if unit == "person" else RECORDS
    on = half_clipped(base, units, privacy=privacy, task=task, kind=kind)
    start = on.loaded.exchange.read()
    expected, counts, clipped = by_a_loop(on, units)
    assert len(set(counts)) > 1  # draws differ in size and are not the divisor's
    assert 0.2 < clipped < 0.9  # half at the start
    ends = []
    for micro_batch in (None, 1, 8, 32):
        on.loaded.exchange.write(start)
        ends.append(privately(on, units, micro_batch=micro_batch))
        assert share_wrong(ends[-1], expected, start) < EXACT
        assert share_wrong(ends[-1], ends[0], start) < EXACT


@ENGINE
def test_a_step_that_draws_nobody_is_a_step_all_the_same(bert: Path, engine: str) -> None:
    on = half_clipped(bert, RECORDS, privacy={"engine": engine}, batch_size=1)
    start = on.loaded.exchange.read()
    expected, counts, _ = by_a_loop(on, RECORDS)
    assert 0 in counts  # of 24 records with a rate of 1 in 20
    on.loaded.exchange.write(start)
    assert share_wrong(privately(on, RECORDS), expected, start) < EXACT


@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
@pytest.mark.parametrize(("task", "kind"), KINDS)
def test_bfloat16_is_private_training_in_its_own_precision(
    request: pytest.FixtureRequest, engine: str, task: str, kind: str
) -> None:
    base = request.getfixturevalue("bert" if task == "classification" else "llama")
    how: Json = {"privacy": {"engine": engine}, "task": task, "kind": kind}
    on = half_clipped(base, RECORDS, **how, precision="bfloat16")
    start = on.loaded.exchange.read()
    expected, _, _ = by_a_loop(on, RECORDS)
    on.loaded.exchange.write(start)
    got = privately(on, RECORDS)
    assert share_wrong(got, expected, start) < 1e-2  # 2^-7, and some steps
    assert on.config.privacy is not None
    clipped = {"clip_norm": on.config.privacy.clip_norm, "noise_multiplier": 0.01}
    whole = made(base, **how | {"privacy": clipped | {"engine": engine}}, learning_rate=1.0)
    assert share_wrong(privately(whole, RECORDS), got, start) > 1e-4  # and it was in use


@ENGINE
def test_a_gradient_left_by_a_round_that_failed_enters_no_private_step(
    bert: Path, engine: str
) -> None:
    clean = privately(made(bert, privacy={"engine": engine}), RECORDS)
    on = made(bert, privacy={"engine": engine})
    for parameter in parameters_of(on):
        parameter.grad = torch.full_like(parameter, 7.0)
    assert privately(on, RECORDS).tobytes() == clean.tobytes()


def test_a_loop_without_clipping_says_otherwise(bert: Path) -> None:
    # or the test above would show nothing: a clip norm that no unit reaches changes the round
    ends = []
    for clip_norm in (0.3, 1e6):
        on = made(bert, privacy={"clip_norm": clip_norm, "noise_multiplier": 1e-7}, batch_size=8)
        ends.append(privately(on, RECORDS))
    assert np.abs(ends[0] - ends[1]).max() > 1e-2


@ENGINE
def test_a_tensor_that_stands_still_ends_the_round_after_its_first_step(
    bert: Path, engine: str
) -> None:
    on = made(bert, privacy={"engine": engine}, batch_size=8)
    name, stuck = next(iter(on.loaded.exchange.parameters.items()))
    with torch.no_grad():
        stuck.fill_(1e30)  # beside which float32 loses a step of about 0.1 * 0.15 / 8
    draws = private_round(on, RECORDS)
    with pytest.raises(TrainingError, match=r"\b1 of .* did not move in the first step") as caught:
        train_privately(on.loaded, on.task, on.tokens, plan(on.config), draws)
    assert name in str(caught.value)
    # one step was taken: the stream stands where one draw and one noise a tensor leave it
    other = SecureRandom.seeded(1, "test")
    other.choose(len(RECORDS), probability=8 / 20)
    for parameter in on.loaded.exchange.parameters.values():
        other.normal(parameter.numel(), std=0.15)
    assert draws.random.seed63() == other.seed63()


@ENGINE
def test_a_model_whose_tensors_were_exchanged_ends_the_round_after_its_first_step(
    bert: Path, engine: str
) -> None:
    # https://github.com/meta-pytorch/opacus/issues/820: what trained is not what is used
    on = made(bert, privacy={"engine": engine}, local_steps=1)
    name, old = next(iter(on.loaded.exchange.parameters.items()))
    layer = on.model.get_submodule(name.rpartition(".")[0])

    def exchange(*_: Any) -> None:
        layer.weight = torch.nn.Parameter(old.detach().clone())

    hook = register_optimizer_step_post_hook(exchange)
    try:
        with pytest.raises(Unclippable, match=f"{name} is trainable and not in the optimizer"):
            privately(on, RECORDS)
    finally:
        hook.remove()
