"""Fit: may many clients of this federation be trained in one pass, with equal results?"""

from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from intramural.core.errors import ConfigError, TrainingError
from intramural.core.federation import FederationConfig, Training
from intramural.core.route import uplink
from intramural.models.batched_losses import BatchedLosses, Sizes, plain_attention
from intramural.models.batched_rows import Factors
from intramural.models.classification import Classification
from intramural.models.loading import Loaded
from intramural.models.padding import SENTENCE
from intramural.models.tasks import Batch, Task, Tokens
from intramural.models.training import to_device

CLOSE = 1e-4
"""Largest difference of a gradient, as a share of its largest number, that is rounding."""
CLOSE_MIN = 1e-6
"""The same as a share of the largest number of all gradients: some are nothing but rounding."""

SHORTER: Final = "Fever"
"""Of another length than `SENTENCE`, so that a row is padded; no site's record."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a model is batched; see `BatchedLosses`."""

    wide_masks: bool
    factored: bool
    in_rows: bool
    sizes: Sizes


_rehearsed: WeakKeyDictionary[nn.Module, Fit | str] = WeakKeyDictionary()
"""By model: how it is batched, or why it cannot be."""


def unfit_reason(loaded: Loaded, task: Task, federation: FederationConfig) -> str | None:
    """Return why the federation's clients cannot be trained in one pass, or None: they can.

    Whatever is not refused was tried: two rows of public text, each by itself and both stacked.
    No record is read; the model is left in training mode.
    """
    privacy = federation.privacy
    if privacy is not None and privacy.engine != "bookkeeping":
        return f"privacy.engine = {privacy.engine!r} clips one client at a time"
    down = loaded.exchange.layout
    if not loaded.exchange.is_plain or uplink(federation, down, round=1) is not down:
        return f"strategy.rule = {federation.strategy.rule!r} trains other parts than it sends"
    if federation.exchange.rank_min is not None:
        return "exchange.rank_min lets clients train adapters of several ranks"
    if federation.training.proximal or federation.personal or federation.exchange.personal:
        return "training.proximal, exchange.personal and [personal] are for one client at a time"
    found = _fit(loaded, task, federation.training, length=federation.model.max_length)
    return found if isinstance(found, str) else None


def fit_of(loaded: Loaded, task: Task, training: Training, *, length: int) -> BatchedLosses:
    """Return the task's losses for many clients at once.

    `length`: tokens of a row, for a model that takes rows of one length only.

    Raises:
        ConfigError: They cannot be had; the reason is named.
    """
    found = _fit(loaded, task, training, length=length)
    if isinstance(found, str):
        raise ConfigError(f"the batched engine cannot train this federation: {found}")
    return BatchedLosses(
        loaded,
        task,
        wide_masks=found.wide_masks,
        factored=found.factored,
        in_rows=found.in_rows,
        sizes=found.sizes,
    )


def _fit(loaded: Loaded, task: Task, training: Training, *, length: int) -> Fit | str:
    """Return how to batch, or the reason of a refusal."""
    if not isinstance(task, Classification):
        return f"task.kind = {task.kind!r}, whose losses are taken at positions that differ"
    if training.precision != "float32":
        return f"training.precision = {training.precision!r} rounds otherwise in a stack"
    if training.gradient_checkpointing:
        return "training.gradient_checkpointing runs layers twice, which a stack cannot"
    if loaded.device.type not in ("cpu", "cuda"):
        return f"device {loaded.device.type!r} has no float64, in which norms are added up"
    loaded.model.train()
    for name, layer in loaded.model.named_modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.training and layer.p > 0:
            return (
                f"{name} drops at random ({layer.p:g}), and a stack's masks are not the clients' "
                "own; set the base's dropout to 0"
            )
    if loaded.model not in _rehearsed:
        if not all(bool(p.isfinite().all()) for p in loaded.exchange.parameters.values()):
            return "the model holds numbers that are not finite; write a round's parameters first"
        _rehearsed[loaded.model] = _rehearse(loaded, task, length)
    return _rehearsed[loaded.model]


def _rehearse(loaded: Loaded, task: Classification, length: int) -> Fit | str:
    """Try both forms of masks, the task's own first."""
    name = type(loaded.model).__name__
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        before = _random_states(loaded.device)
        for tokens in (task.tokenise(_sentences(task)), _of_one_length(length)):
            try:
                expected = _alone(loaded, task, tokens)
                break
            except (RuntimeError, IndexError):
                continue  # a model for rows of one length takes no sentences
        else:
            return f"{name} fails in a pass of two rows"
        if not all(map(torch.equal, before, _random_states(loaded.device))):
            return f"{name} draws random numbers in training; set the base's dropout to 0"
    reason = ""
    for wide in (False, True):
        try:
            losses = BatchedLosses(loaded, task, wide_masks=wide, factored=True)
            got = _together(losses, loaded, tokens)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            kind = type(error).__name__
            reason = reason or f"{name} cannot run for several clients at once ({kind})"
            continue
        if _close(got, expected):
            factored = _factors_fit(losses, loaded, tokens, [part[2:] for part in expected[1:]])
            of_rows = BatchedLosses(loaded, task, wide_masks=wide, factored=factored, in_rows=True)
            in_rows = _rows_fit(of_rows, loaded, tokens, [part[:2] for part in expected])
            return Fit(wide_masks=wide, factored=factored, in_rows=in_rows, sizes=Sizes())
        reason = f"{name} says other things of a row in a stack than of the row alone"
    return reason


def _close(got: list[Tensor], expected: list[Tensor]) -> bool:
    """Return whether the parts are equal to rounding, each beside its own size."""
    largest = max(float(part.abs().max()) for part in expected)
    return all(
        bool((a - b).abs().max() <= CLOSE * b.abs().max() + CLOSE_MIN * largest)
        for a, b in zip(got, expected, strict=True)
    )


def _alone(loaded: Loaded, task: Task, tokens: Tokens) -> list[Tensor]:
    """Return losses and gradients as plain training has them, without a stack.

    First the losses of the mean of rows 0 and 1 and of row 1, shape (2,). Then of each parameter
    its gradients, shape (4, size): of these two, of row 0 and of row 1.
    """
    parameters = list(loaded.exchange.parameters.values())
    found, losses = [], []
    for rows in ([0, 1], [1], [0]):
        batch = to_device(task.pad(tokens, rows), loaded.device)
        loss = task.losses(loaded.model, batch).mean()
        found.append(torch.autograd.grad(loss, parameters, materialize_grads=True))
        losses.append(loss.detach())
    parts = [
        torch.stack([both, second, first, second]).flatten(1)
        for both, second, first in zip(*found, strict=True)
    ]
    return [torch.stack(losses[:2]), *parts]


def _together(losses: BatchedLosses, loaded: Loaded, tokens: Tokens) -> list[Tensor]:
    """Return what `_alone` does, from a stack of two clients and from two units of one client."""
    own = {name: p.detach() for name, p in loaded.exchange.parameters.items()}
    two = {n: p.expand(2, *p.shape).clone().requires_grad_() for n, p in own.items()}
    stacked, weights = _two_clients(losses, loaded, tokens)
    with plain_attention():
        means = losses.many(two, stacked, weights)
        clients = torch.autograd.grad(means.sum(), list(two.values()), materialize_grads=True)
        one = {name: p[None] for name, p in own.items()}
        units = losses.unit_gradients(one, *_two_units(losses, tokens))
    parts = [
        torch.cat([of_clients, of_units[0]]).flatten(1)
        for of_clients, of_units in zip(clients, units.values(), strict=True)
    ]
    return [means.detach(), *parts]


def _two_units(losses: BatchedLosses, tokens: Tokens) -> tuple[Batch, Tensor]:
    """Return rows 0 and 1 as one client's units, of one row and a filler each, and weights."""
    batch = losses.batch(tokens, np.array([[[0, 0], [1, 1]]]))
    return batch, torch.tensor([[[1.0, 0.0], [1.0, 0.0]]], device=batch["targets"].device)


def _factors_fit(
    losses: BatchedLosses, loaded: Loaded, tokens: Tokens, expected: list[Tensor]
) -> bool:
    """Return whether factors multiply to the gradients of rows 0 and 1, (2, size) a parameter.

    They do not where a layer's weights are used past the layer.
    """
    if losses.layers is None:
        return False
    own = {name: p.detach()[None] for name, p in loaded.exchange.parameters.items()}
    found = {n: p.new_zeros(2, *p.shape[1:]) for n, p in own.items()}
    try:
        with plain_attention():
            _, factors = losses.factors(own, *_two_units(losses, tokens))
    except (RuntimeError, TrainingError):
        return False
    _write_products(losses, found, {one: (x[0], g[0]) for one, (x, g) in factors.items()})
    return _close([part.flatten(1) for part in found.values()], expected)


def _rows_fit(
    losses: BatchedLosses, loaded: Loaded, tokens: Tokens, expected: list[Tensor]
) -> bool:
    """Return whether two clients' sums and gradients can be had from one pass of all their rows."""
    if losses.layers is None:
        return False
    own = {name: p.detach() for name, p in loaded.exchange.parameters.items()}
    found = {n: p.new_zeros(2, *p.shape) for n, p in own.items()}
    try:
        sums, factors = losses.factors(own, *_two_clients(losses, loaded, tokens), shared=True)
    except (RuntimeError, TrainingError):
        return False
    _write_products(losses, found, factors)
    return _close([sums, *(part.flatten(1) for part in found.values())], expected)


def _two_clients(losses: BatchedLosses, loaded: Loaded, tokens: Tokens) -> tuple[Batch, Tensor]:
    """Return rows 0 and 1 as one client's, row 1 and one that counts for nothing as another's.

    So the clients' rows are in no order of length, in which a model could put them unseen.
    """
    batch = losses.batch(tokens, np.array([[0, 1], [1, 0]]))
    return batch, torch.tensor([[0.5, 0.5], [1.0, 0.0]], device=loaded.device)


def _write_products(losses: BatchedLosses, found: dict[str, Tensor], factors: Factors) -> None:
    """Write the gradients that the factors multiply to."""
    assert losses.layers is not None
    for layer, (inputs, outputs) in factors.items():
        weight, bias = losses.layers[layer]
        if weight is not None:
            found[weight] = outputs.mT @ inputs
        if bias is not None:
            found[bias] = outputs.sum(1)


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.random.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


@dataclass(frozen=True, kw_only=True)
class _Example:
    text: str
    target: str


def _sentences(task: Classification) -> list[_Example]:
    """Return two sentences of different lengths, so that one is padded."""
    ends = zip((SENTENCE, SHORTER), (task.labels[0], task.labels[-1]), strict=True)
    return [_Example(text=text, target=target) for text, target in ends]


def _of_one_length(length: int) -> Tokens:
    """Return two rows of so many tokens."""
    ids = np.arange(length, dtype=np.int32)
    return Tokens(
        inputs=[ids % 3, ids % 4],
        targets=[np.array([0], dtype=np.int32), np.array([1], dtype=np.int32)],
    )
