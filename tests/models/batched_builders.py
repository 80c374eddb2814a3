"""Small models and clients for the batched engine."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from intramural.core.federation import FederationConfig
from intramural.core.layout import Vector
from intramural.models.classification import Classification
from intramural.models.exchange import Exchange
from intramural.models.job import Job
from intramural.models.loading import Loaded
from intramural.models.tasks import Task, Tokens
from intramural.models.training import RoundPlan
from tests.models.builders import bench, chapters
from tests.tiny import LABELS, Json, federation

WORDS = 40
LENGTH = 6
SPOILT: Final = 39
"""A token id whose record has an infinite loss."""
KINDS = ["mlp", "bag", "head", "bert, lora", "bert, full"]
FACTORED = {"mlp": True, "bag": False, "head": True, "bert, lora": True, "bert, full": False}
"""By kind: whether linear layers alone are trained, and gradients need not be written out."""


class Mlp(nn.Module):
    """Linear layers over token ids, all of one length; no mask is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(LENGTH, 8)
        self.top = nn.Linear(8, len(LABELS), bias=False)
        scale = torch.ones(WORDS)
        scale[SPOILT] = torch.inf
        self.register_buffer("scale", scale)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        values = input_ids.float() / WORDS * self.get_buffer("scale")[input_ids]
        return SimpleNamespace(logits=self.top(torch.tanh(self.hidden(values))))


class Bag(nn.Module):
    """The mean of words' vectors, normalised; rows of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 8)
        self.norm = nn.LayerNorm(8)
        self.top = nn.Linear(8, len(LABELS))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        mask = attention_mask.unsqueeze(-1)
        mean = (self.words(input_ids) * mask).sum(-2) / mask.sum(-2)
        return SimpleNamespace(logits=self.top(self.norm(mean)))


class Words:
    """A tokenizer: a word's id is its length."""

    pad_token_id = 0

    def __call__(self, texts: Sequence[str], **_: Any) -> Json:
        return {"input_ids": [[len(w) % WORDS for w in text.split()] for text in texts]}


def by_hand(model: nn.Module) -> tuple[Loaded, Task]:
    """Return a model that no base holds, ready to train whole, and its task."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    exchange = Exchange(dict(model.named_parameters()))
    words: Any = Words()
    device = torch.device("cpu")
    loaded = Loaded(model=model, tokenizer=words, exchange=exchange, device=device)
    return loaded, Classification(words, LABELS, length_max=LENGTH)


def model_of(kind: str, bert: Path) -> tuple[Loaded, Task]:
    """Return a model and its task."""
    if kind in ("mlp", "bag"):
        return by_hand(Mlp() if kind == "mlp" else Bag())
    exchange: Json = {"kind": kind.rpartition(" ")[2]}
    if kind == "head":
        exchange["trained_modules"] = ["pooler", "classifier"]
    on = bench(federation(bert, exchange=exchange), [])
    return on.loaded, on.task


def start_of(loaded: Loaded) -> Vector:
    """Return parameters away from zero, LoRA's B too."""
    noise = np.random.default_rng(0).normal(0, 0.1, loaded.exchange.layout.size)
    return loaded.exchange.read() + noise.astype(np.float32)


def clients(kind: str, task: Task, sizes: Sequence[int]) -> list[Tokens]:
    """Return clients of so many records; they differ in length unless the model wants one."""
    rng = np.random.default_rng(1)
    if kind not in ("mlp", "bag"):
        whole = task.tokenise(chapters(sum(sizes)))
        ends = np.cumsum([0, *sizes]).tolist()
        return [
            Tokens(inputs=whole.inputs[a:b], targets=whole.targets[a:b]) for a, b in pairwise(ends)
        ]
    return [
        Tokens(
            inputs=[
                rng.integers(1, SPOILT, int(length), dtype=np.int32)
                for length in rng.integers(LENGTH if kind == "mlp" else 1, LENGTH + 1, size)
            ],
            targets=[rng.integers(0, len(LABELS), 1).astype(np.int32) for _ in range(size)],
        )
        for size in sizes
    ]


def plan_of(config: FederationConfig, site: int) -> RoundPlan:
    """Return the plan of the first round at a site."""
    return RoundPlan.of(config, round=1, site=str(site), micro_batch=None)


def modes(model: nn.Module) -> list[Any]:
    """Return what a call may not leave behind: numbers, gradients, hooks, forwards."""
    return [
        [(p.detach().clone().numpy().tobytes(), p.grad) for p in model.parameters()],
        [(len(m._forward_hooks), "forward" in vars(m)) for m in model.modules()],
    ]


def unit_gradient(
    loaded: Loaded, task: Task, tokens: Tokens, rows: Sequence[int]
) -> NDArray[np.float64]:
    """Return the summed gradient of a unit's rows, each alone in its pass, as one vector."""
    parameters = list(loaded.exchange.parameters.values())
    total = np.zeros(loaded.exchange.layout.size)
    for row in rows:
        loss = task.losses(loaded.model, task.pad(tokens, [row])).sum()
        parts = torch.autograd.grad(loss, parameters)
        total += torch.cat([part.flatten() for part in parts]).double().numpy()
    return total


def half_clips(loaded: Loaded, task: Task, job: Job, start: Vector) -> float:
    """Return the clip norm that half of a client's units exceed."""
    before = loaded.exchange.read()
    loaded.exchange.write(start)
    assert job.private is not None
    units = [unit.tolist() for unit in job.private.units]
    lengths = [
        float(np.linalg.norm(unit_gradient(loaded, task, job.tokens, rows))) for rows in units
    ]
    loaded.exchange.write(before)
    found = median(lengths)
    assert min(lengths) < 0.99 * found < 1.01 * found < max(lengths)
    return found
