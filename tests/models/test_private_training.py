"""A private round is the arithmetic of its plan: a loop over units says the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from intramural.core.errors import TrainingError
from intramural.core.layout import Vector
from intramural.models.private_training import PrivateRound, train_privately
from intramural.privacy.plan import PrivacyPlan
from intramural.privacy.random import SecureRandom
from tests.models.builders import Bench, bench, chapters, plan
from tests.tiny import Json, federation

RATE = 0.1
"""Learning rate of the tiny federation."""
PRIVACY: Json = {
    "unit": "record",
    "noise_multiplier": 0.5,
    "delta": 1e-5,
    "clip_norm": 0.3,
    "nominal_records": 20,
}
PERSONS: Json = {"unit": "person", "nominal_persons": 20, "records_per_person": 3}
RECORDS = [np.array([row]) for row in range(24)]
PEOPLE = [np.array([0, 5]), np.array([1]), np.array([2, 3, 4]), *RECORDS[6:]]


def made(base: Path, *, privacy: Json, batch_size: int, kind: str = "lora") -> Bench:
    """Return a bench whose parameters are all away from zero, LoRA's B too."""
    training = {"batch_size": batch_size, "local_steps": 5}
    config = federation(
        base,
        privacy=PRIVACY | privacy,
        strategy={"weights": "equal"},
        training=training,
        exchange={"kind": kind},
    )
    on = bench(config, chapters(24))
    size = on.loaded.exchange.layout.size
    on.loaded.exchange.write(np.random.default_rng(0).normal(0, 0.1, size).astype(np.float32))
    return on


def private_round(on: Bench, units: list[NDArray[np.int64]]) -> PrivateRound:
    plan_ = PrivacyPlan.of(on.config)
    return PrivateRound(
        plan=plan_, units=units, random=SecureRandom.seeded(1, "test"), dropout_seed=0
    )


def by_a_loop(on: Bench, units: list[NDArray[np.int64]], *, divisor: int) -> tuple[Vector, Any]:
    """Return the parameters after five steps, and how many units each drew; the plan by hand."""
    random = SecureRandom.seeded(1, "test")
    own = on.loaded.exchange.parameters.values()
    parameters = [p for p in own if p.ndim > 1] + [p for p in own if p.ndim <= 1]
    on.model.train()
    counts = []
    for _ in range(5):
        drawn = random.choose(len(units), probability=divisor / 20)
        counts.append(len(drawn))
        totals = [torch.zeros_like(p) for p in parameters]
        for unit in drawn:
            batch = on.task.pad(on.tokens, units[unit].tolist())
            loss = on.task.losses(on.model, batch).sum()
            gradients = torch.autograd.grad(loss, parameters)
            norm = torch.stack([g.norm() for g in gradients]).norm()
            for total, gradient in zip(totals, gradients, strict=True):
                total.add_(gradient * min(1.0, 0.3 / float(norm)))
        for parameter, total in zip(parameters, totals, strict=True):
            noise = torch.from_numpy(random.normal(total.numel(), std=0.5 * 0.3))
            with torch.no_grad():
                parameter.sub_(RATE * (total + noise.view(total.shape)) / divisor)
    return on.loaded.exchange.read(), counts


@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("unit", ["record", "person"])
@pytest.mark.parametrize(("kind", "divisor"), [("lora", 8), ("lora", 1), ("head", 8)])
def test_a_round_is_poisson_draws_clipped_sums_one_noise_and_the_public_divisor(
    bert: Path, engine: str, micro_batch: int | None, unit: str, kind: str, divisor: int
) -> None:
    privacy = {"engine": engine} | (PERSONS if unit == "person" else {})
    units = PEOPLE if unit == "person" else RECORDS
    on = made(bert, privacy=privacy, batch_size=divisor, kind=kind)
    start = on.loaded.exchange.read()
    expected, counts = by_a_loop(on, units, divisor=divisor)
    # draws differ in size and are not the divisor's; of 1 in 20 some draw nobody
    assert len(set(counts)) > 1
    assert (0 in counts) == (divisor == 1)
    on.loaded.exchange.write(start)
    how = plan(on.config, micro_batch=micro_batch)
    train_privately(on.loaded, on.task, on.tokens, how, private_round(on, units))
    moved = np.abs(expected - start).max()
    np.testing.assert_allclose(on.loaded.exchange.read(), expected, rtol=0, atol=2e-5 * moved)


def test_a_loop_without_clipping_says_otherwise(bert: Path) -> None:
    # or the test above would show nothing: a clip norm that no unit reaches changes the round
    ends = []
    for clip_norm in (0.3, 1e6):
        on = made(bert, privacy={"clip_norm": clip_norm, "noise_multiplier": 1e-7}, batch_size=8)
        train_privately(on.loaded, on.task, on.tokens, plan(on.config), private_round(on, RECORDS))
        ends.append(on.loaded.exchange.read())
    assert np.abs(ends[0] - ends[1]).max() > 1e-2


@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
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
