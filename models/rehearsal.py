"""Rehearsal: a private pass over public sentences, before any record is read or charged for.

An engine's own checks look at layers alone. A table used past its layer (DeBERTa's relative
positions), or read once for all rows (MPNet's), and losses that mix rows show only in a pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from intramural.core.errors import ModelError
from intramural.core.federation import FederationConfig
from intramural.core.route import trained_factor
from intramural.models.loading import Loaded
from intramural.models.padding import SENTENCE
from intramural.models.private_training import ENGINES
from intramural.models.tasks import Task, Tokens
from intramural.models.training import precision, to_device, trained_alone
from intramural.privacy.random import SecureRandom

SHORTER: Final = "Other specified disorders of bone"
"""Of another length than `SENTENCE`, so that a row is padded."""


@dataclass(frozen=True, kw_only=True)
class _Example:
    text: str
    target: str


def rehearse(loaded: Loaded, task: Task, federation: FederationConfig) -> None:
    """Refuse a model that the federation's engine cannot clip, by name; no record is read.

    One forward pass and what the engine's first pass takes backward, of two sentences; one for each
    LoRA factor, where rounds train one of them. Gradients, modes and the random state are left as
    they are; nothing is noised, and nothing steps.

    Raises:
        Unclippable: A trainable parameter, a layer or the losses have no exact gradient a unit.
        ModelError: The pass fails.
    """
    assert federation.privacy is not None
    labels = federation.task.labels or (SHORTER,)  # to generate one, where there are no classes
    ends = zip((SENTENCE, SHORTER), (labels[0], labels[-1]), strict=True)
    tokens = task.tokenise([_Example(text=text, target=target) for text, target in ends])
    rule = federation.strategy.rule
    for factor in dict.fromkeys(trained_factor(rule, round) for round in (1, 2)):
        with _as_found(loaded), trained_alone(loaded, factor) as trained:
            _pass(loaded, task, federation, tokens, list(trained.values()))


def _pass(
    loaded: Loaded,
    task: Task,
    federation: FederationConfig,
    tokens: Tokens,
    trained: list[nn.Parameter],
) -> None:
    assert federation.privacy is not None
    rows = range(len(tokens))
    engine = ENGINES[federation.privacy.engine](
        loaded.model,
        torch.optim.SGD(trained, lr=1.0),
        clip_norm=1.0,
        noise_multiplier=0.0,
        divisor=1.0,
        noise=SecureRandom.secret(),
    )
    with engine:
        try:
            engine.open(rows)
            with precision(federation.training, loaded.device):
                batch = to_device(task.pad(tokens, rows), loaded.device)
                losses = task.losses(loaded.model, batch)
            engine.fold(losses)
        except RuntimeError as error:
            raise ModelError(
                f"{type(loaded.model).__name__} fails in a private pass of two sentences "
                f"({type(error).__name__}), privacy.engine = {engine.name!r}; use another "
                "engine, or another base"
            ) from error


@contextmanager
def _as_found(loaded: Loaded) -> Iterator[None]:
    """Train within, and leave modes, gradients and the random state as they were."""
    modes = {layer: layer.training for layer in loaded.model.modules()}
    gradients = {p: p.grad for p in loaded.exchange.parameters.values()}
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    loaded.model.train()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for layer, mode in modes.items():
            layer.training = mode
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
