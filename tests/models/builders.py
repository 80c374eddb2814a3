"""Small builders of models, tokens and plans."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from intramural.core.federation import FederationConfig
from intramural.core.layout import Vector
from intramural.models.base import resolve_base
from intramural.models.loading import Loaded, load_model
from intramural.models.resident import make_task
from intramural.models.tasks import Task, Tokens
from intramural.models.training import RoundPlan, train_round
from tests.tiny import rows
from tests.tiny_models import VOCABULARY

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # of trained models' size: at 0.02 a layer hardly does anything
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {}),
    "roberta": ("Roberta", {"max_position_embeddings": 66}),
    "deberta": ("DebertaV2", {"relative_attention": True}),
    "deberta, relative": (
        "DebertaV2",
        {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 16},
    ),
    "mpnet": ("MPNet", {"max_position_embeddings": 66}),
    "fnet": ("FNet", {}),
    "convbert": ("ConvBert", {"embedding_size": 32}),
}
"""Models of other kinds than the tiny ones, by name: class and settings."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A text and a target."""

    text: str
    target: str


def chapters(count: int) -> list[Pair]:
    """Return titles with their chapters, short and long ones."""
    return [Pair(text=row["title"], target=row["chapter"]) for row in rows()[:count]]


def titles(count: int) -> list[Pair]:
    """Return codes with their titles."""
    return [Pair(text=row["code"], target=row["title"]) for row in rows()[:count]]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A model on the bench, with tokens of some records."""

    config: FederationConfig
    loaded: Loaded
    task: Task
    tokens: Tokens

    @property
    def model(self) -> Any:
        return self.loaded.model

    def gradient(self) -> list[torch.Tensor]:
        """Return the gradients of the travelling parameters, and clear them."""
        found = []
        for parameter in self.loaded.exchange.parameters.values():
            assert parameter.grad is not None
            found.append(parameter.grad.clone())
            parameter.grad = None
        return found


def bench(config: FederationConfig, records: Sequence[Pair]) -> Bench:
    """Build a federation's model on the processor."""
    base = resolve_base(config.model.base)
    loaded = load_model(config, base, device="cpu")
    task = make_task(config, loaded, base=base)
    return Bench(config=config, loaded=loaded, task=task, tokens=task.tokenise(records))


def plan(config: FederationConfig, *, round: int = 1, micro_batch: int | None = None) -> RoundPlan:
    """Return the plan of one round at a site called 'a'."""
    return RoundPlan.of(config, round=round, site="a", micro_batch=micro_batch)


def trained(config: FederationConfig, records: Sequence[Pair], **options: Any) -> Vector:
    """Return the parameters after one round from the federation's start."""
    on = bench(config, records)
    train_round(on.loaded, on.task, on.tokens, plan(config, **options))
    return on.loaded.exchange.read()


def folder_of(base: Path, target: Path, *, leave_out: str = "") -> Path:
    """Copy a base model's folder, but for one kind of file."""
    target.mkdir(parents=True)
    for path in base.iterdir():
        if path.suffix != leave_out:
            (target / path.name).write_bytes(path.read_bytes())
    return target


def base_of(kind: str, bert: Path, folder: Path) -> Path:
    """Write a small model of a kind, with the tokenizer of the tiny BERT."""
    name, more = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SIZES | more), pad_token_id=0)
    getattr(transformers, f"{name}Model")(config).save_pretrained(folder_of(bert, folder))
    return folder
