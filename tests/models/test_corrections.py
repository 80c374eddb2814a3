"""Corrections: pulls and control variates are what their papers write, after clip and noise."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from intramural.models.corrections import Corrections
from intramural.models.job import Job
from intramural.models.personal import own_plan, train_beside
from intramural.models.private_training import train_privately
from intramural.models.resident import Resident
from intramural.models.training import train_round
from tests.models.builders import Bench, bench, chapters, plan
from tests.models.test_private_training import (
    ENGINE,
    EXACT,
    RECORDS,
    by_a_loop,
    half_clipped,
    made,
    private_round,
    share_wrong,
)
from tests.reference.fedprox import pulled_steps
from tests.tiny import Json, federation

Point = NDArray[np.float64]
TRAINING: Json = {"learning_rate": 0.5, "local_steps": 4}
MU = 0.8


def gradient_of(on: Bench, batch: list[int]) -> Callable[[Point], Point]:
    """Return the gradient of a batch's mean loss by a flat vector of what is trained."""

    def gradient(at: Point) -> Point:
        exchange = on.loaded.exchange
        exchange.write_trained(at.astype(np.float32))
        on.model.train()
        loss = on.task.losses(on.model, on.task.pad(on.tokens, batch)).mean()
        found = torch.autograd.grad(loss, list(exchange.parameters.values()))
        return np.concatenate([g.numpy().reshape(-1) for g in found]).astype(np.float64)

    return gradient


@pytest.mark.parametrize("clip", [None, 0.2])
def test_fedprox_descends_the_loss_with_its_term(bert: Path, clip: float | None) -> None:
    ends = []
    for strength in (MU, 0.0):
        training = TRAINING | {"proximal": strength, "gradient_clip": clip}
        config = federation(bert, training={k: v for k, v in training.items() if v is not None})
        on, hand = (bench(config, chapters(24)) for _ in range(2))
        start = on.loaded.exchange.read().astype(np.float64)
        how = plan(config)
        train_round(on.loaded, on.task, on.tokens, how)
        ends.append(on.loaded.exchange.read())
        gradients = [gradient_of(hand, batch) for batch in how.batches(24)]
        longest = float("inf") if clip is None else clip
        expected = pulled_steps(
            gradients, start, centre=start, strength=strength, rate=0.5, longest=longest
        )
        np.testing.assert_allclose(ends[-1], expected, rtol=0, atol=1e-6)
    assert np.abs(ends[0] - ends[1]).max() > 1e-3


@ENGINE
def test_the_pull_of_a_private_round_is_made_of_noised_numbers_alone(
    bert: Path, engine: str
) -> None:
    how: Json = {"privacy": {"engine": engine}, "proximal": 0.1}
    on = half_clipped(bert, RECORDS, **how)
    start = on.loaded.exchange.read()
    expected, _, _ = by_a_loop(on, RECORDS, pull=0.1)  # after clip, sum, noise and divisor
    on.loaded.exchange.write(start)
    train_privately(on.loaded, on.task, on.tokens, plan(on.config), private_round(on, RECORDS))
    got = on.loaded.exchange.read()
    assert share_wrong(got, expected, start) < EXACT
    on.loaded.exchange.write(start)
    without, _, _ = by_a_loop(on, RECORDS)
    assert share_wrong(got, without, start) > 1e-3


def test_ditto_pulls_the_site_s_own_model_to_what_was_sent(bert: Path) -> None:
    personal: Json = {"kind": "ditto", "pull": MU, "steps": 3}
    config = federation(bert, training=TRAINING, personal=personal)
    on, hand = (bench(config, chapters(24)) for _ in range(2))
    exchange, rng = on.loaded.exchange, np.random.default_rng(0)
    sent, own = (rng.normal(0, 0.1, exchange.layout.size).astype(np.float32) for _ in range(2))
    how = own_plan(config, plan(config))
    job = Job(tokens=on.tokens, plan=how, up=exchange.layout)
    resident = Resident(base=None, loaded=on.loaded, task=on.task, tokens_key="")  # type: ignore[arg-type]
    found = train_beside(resident, job, sent, own)
    gradients = [gradient_of(hand, batch) for batch in how.batches(24)]
    assert len(gradients) == 3  # personal.steps
    expected = pulled_steps(
        gradients,
        own.astype(np.float64),
        centre=sent.astype(np.float64),
        strength=MU,
        rate=0.5,
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    # a site's first own model begins as what was sent
    first = train_beside(resident, job, sent, None)
    np.testing.assert_array_equal(first, train_beside(resident, job, sent, sent))


def test_a_parameter_without_a_gradient_is_pulled_and_one_without_a_shift_is_not() -> None:
    one, two = (torch.nn.Parameter(torch.full((2,), value)) for value in (1.0, 3.0))
    anchor = {"one": np.zeros(2, np.float32), "two": np.ones(2, np.float32)}
    pull = Corrections({"one": one, "two": two}, pull=0.5, anchor=anchor)
    two.grad = torch.ones(2)
    pull()
    assert one.grad is not None
    assert one.grad.tolist() == [0.5, 0.5]
    assert two.grad.tolist() == [2.0, 2.0]  # 1 + 0.5 * (3 - 1)
    shift = Corrections({"one": one, "two": two}, shift={"two": np.full(2, 7.0, np.float32)})
    one.grad = None
    shift()
    assert one.grad is None
    assert two.grad.tolist() == [9.0, 9.0]


def test_private_training_takes_no_shift(bert: Path) -> None:
    from intramural.models.job import run_job

    on = made(bert, privacy={})
    shift = {n: np.ones(p.shape, np.float32) for n, p in on.loaded.exchange.parameters.items()}
    job = Job(
        tokens=on.tokens,
        plan=plan(on.config),
        up=on.loaded.exchange.layout,
        private=private_round(on, RECORDS),
        shift=shift,
    )
    resident = Resident(base=None, loaded=on.loaded, task=on.task, tokens_key="")  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="no noise"):
        run_job(resident, job, on.loaded.exchange.read())
