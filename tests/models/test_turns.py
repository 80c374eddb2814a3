"""Turns: a LoRA factor that a round does not train has no gradient, no noise, and no step."""

from pathlib import Path

import numpy as np
import pytest
import torch

from intramural.core.errors import TrainingError
from intramural.core.layout import Vector
from intramural.core.route import factor_of, trained_factor
from intramural.models.private_training import train_privately
from intramural.models.rehearsal import rehearse
from intramural.models.training import train_round, trained_alone
from tests.models.builders import Bench, bench, chapters, plan
from tests.models.test_private_training import (
    ENGINE,
    EXACT,
    PRIVACY,
    RECORDS,
    by_a_loop,
    length,
    private_round,
    share_wrong,
    unit_gradients,
)
from tests.tiny import Json, federation

TURNS = [("ffa-lora", 1, "B"), ("ffa-lora", 2, "B"), ("rolora", 1, "B"), ("rolora", 2, "A")]
"""Rule, round, and the factor that its paper has trained then."""


def made(base: Path, rule: str, **sections: Json) -> Bench:
    """Return a bench whose parameters are all large: without, the head's gradient hides others."""
    on = bench(
        federation(base, strategy={"rule": rule, "weights": "equal"}, **sections), chapters(24)
    )
    size = on.loaded.exchange.layout.size
    on.loaded.exchange.write(np.random.default_rng(0).normal(0, 1.0, size).astype(np.float32))
    return on


def parts(on: Bench, vector: Vector) -> dict[str, Vector]:
    """Return the parts of a vector by what they are: A, B, or the head."""
    found: dict[str, list[Vector]] = {"A": [], "B": [], "head": []}
    for name, values in on.loaded.exchange.layout.unflatten(vector).items():
        found[factor_of(name) or "head"].append(values.reshape(-1))
    return {kind: np.concatenate(values) for kind, values in found.items()}


@pytest.mark.parametrize(("rule", "round", "factor"), TURNS)
def test_a_round_trains_the_factor_whose_turn_it_is_and_the_head(
    bert: Path, rule: str, round: int, factor: str
) -> None:
    assert trained_factor(rule, round) == factor
    # weight decay would move what has no gradient, momentum what had one before
    training: Json = {"weight_decay": 0.05, "gradient_clip": 0.05, "learning_rate": 1.0}
    on, hand = (made(bert, rule, training=training) for _ in range(2))
    start = on.loaded.exchange.read()
    how = plan(on.config, round=round)
    train_round(on.loaded, on.task, on.tokens, how)
    before, after = parts(on, start), parts(on, on.loaded.exchange.read())
    other = {"A": "B", "B": "A"}[factor]
    assert after[other].tobytes() == before[other].tobytes()
    assert not np.array_equal(after[factor], before[factor])
    assert not np.array_equal(after["head"], before["head"])
    # by hand, with the trained ones alone in the norm that is clipped
    named = hand.loaded.exchange.parameters.items()
    own = [p for n, p in named if f"lora_{other}" not in n]
    hand.model.train()
    for batch in how.batches(len(hand.tokens)):
        loss = hand.task.losses(hand.model, hand.task.pad(hand.tokens, batch)).mean()
        gradients = torch.autograd.grad(loss, own)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        assert norm > 0.05
        with torch.no_grad():
            for parameter, gradient in zip(own, gradients, strict=True):
                decay = 0.05 if parameter.ndim > 1 else 0.0
                parameter.sub_(gradient * 0.05 / norm + decay * parameter)
    np.testing.assert_allclose(
        on.loaded.exchange.read(), hand.loaded.exchange.read(), rtol=0, atol=1e-6
    )


@ENGINE
@pytest.mark.parametrize(("rule", "round", "factor"), TURNS[1:])
def test_a_frozen_factor_has_no_noise_and_no_share_of_the_clip_norm(
    bert: Path, engine: str, rule: str, round: int, factor: str
) -> None:
    training: Json = {"local_steps": 4, "learning_rate": 1.0}
    privacy = PRIVACY | {"engine": engine, "noise_multiplier": 0.01}
    on = made(bert, rule, training=training, privacy=privacy)
    alone = [length(unit_gradients(on, unit, factor=factor)) for unit in RECORDS]
    both = [length(unit_gradients(on, unit)) for unit in RECORDS]
    clip_norm = float(np.median(alone))
    assert max(b / a for a, b in zip(alone, both, strict=True)) > 1.01  # a share would show
    on = made(bert, rule, training=training, privacy=privacy | {"clip_norm": clip_norm})
    start = on.loaded.exchange.read()
    expected, _, clipped = by_a_loop(on, RECORDS, factor=factor)
    assert 0.05 < clipped < 0.95
    on.loaded.exchange.write(start)
    how = plan(on.config, round=round)
    train_privately(on.loaded, on.task, on.tokens, how, private_round(on, RECORDS))
    got = on.loaded.exchange.read()
    assert share_wrong(got, expected, start) < EXACT
    other = {"A": "B", "B": "A"}[factor]
    assert parts(on, got)[other].tobytes() == parts(on, start)[other].tobytes()
    assert all(p.requires_grad for p in on.loaded.exchange.parameters.values())


def test_a_round_that_fails_leaves_the_model_as_trainable_as_it_was(bert: Path) -> None:
    on = made(bert, "ffa-lora")
    with torch.no_grad():
        next(iter(on.loaded.exchange.parameters.values())).fill_(float("nan"))
    with pytest.raises(TrainingError, match="not finite"):
        train_round(on.loaded, on.task, on.tokens, plan(on.config))
    assert all(p.requires_grad for p in on.loaded.exchange.parameters.values())
    frozen = next(p for n, p in on.loaded.exchange.parameters.items() if "lora_A" in n)
    frozen.grad = torch.ones_like(frozen)  # as a round of another turn leaves it when it fails
    with trained_alone(on.loaded, "B") as trained:
        assert not any("lora_A" in name for name in trained)
        assert frozen.grad is None
        assert not frozen.requires_grad
    assert frozen.requires_grad


@ENGINE
@pytest.mark.parametrize("rule", ["ffa-lora", "rolora"])
def test_each_turn_is_rehearsed(bert: Path, engine: str, rule: str) -> None:
    on = made(bert, rule, privacy=PRIVACY | {"engine": engine})
    before = on.loaded.exchange.read()
    seen: list[set[str | None]] = []
    plain = on.model.forward

    def watch(*arguments: object, **named: object) -> object:
        named_ = on.loaded.exchange.parameters.items()
        seen.append({factor_of(n) for n, p in named_ if p.requires_grad})
        return plain(*arguments, **named)

    on.model.forward = watch
    rehearse(on.loaded, on.task, on.config)
    turns = [{"B", None}, {"A", None}] if rule == "rolora" else [{"B", None}]
    assert seen == turns
    assert on.loaded.exchange.read().tobytes() == before.tobytes()
