"""A workload as it is handed to another simulator: tokens in memory, a model, the local steps.

Imports nothing of ours but the perceptron, so that it also runs where we are not installed.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

HANDED = "BENCHMARK_HANDED"
"""Environment variable: the folder that holds the workload."""
SETTINGS, TOKENS = "work.json", "tokens.npz"


@dataclass(frozen=True, kw_only=True)
class Handed:
    """A workload: its settings, and every client's records."""

    kind: str
    """'mlp', 'lora' or 'full'."""
    base: str
    """Folder of the model."""
    labels: int
    clients: int
    per_round: int
    batch: int
    steps: int
    learning_rate: float
    rounds: int
    ids: Tensor
    """Token ids of shape (clients, records, words)."""
    classes: Tensor
    """Of shape (clients, records)."""


def load(*, rounds: int | None = None) -> Handed:
    """Return the workload in the folder that the environment names."""
    folder = Path(os.environ[HANDED])
    settings: dict[str, Any] = json.loads((folder / SETTINGS).read_text())
    tokens = np.load(folder / TOKENS)
    ids, classes = torch.from_numpy(tokens["ids"]), torch.from_numpy(tokens["classes"])
    return Handed(**settings, rounds=rounds or 1, ids=ids, classes=classes)


def build_model(handed: Handed) -> nn.Module:
    """Return the model, of which the parameters that train require gradients."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if handed.kind == "mlp":
        from benchmarks.mlp import register

        register()
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        handed.base, num_labels=handed.labels, local_files_only=True
    )
    if handed.kind == "lora":
        from peft import LoraConfig, TaskType, get_peft_model

        targets = ["query", "value"]
        config = LoraConfig(
            task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, lora_dropout=0.0, target_modules=targets
        )
        model = get_peft_model(model, config)
    built: nn.Module = model
    return built


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model: nn.Module, ids: Tensor, classes: Tensor) -> Tensor:
    """Return a batch's mean loss."""
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return torch.nn.functional.cross_entropy(logits, classes)


def train(
    handed: Handed, model: nn.Module, parameters: Iterable[nn.Parameter], client: int
) -> float:
    """Make one client's local steps in place; return the last one's loss."""
    model.train()
    optimizer = torch.optim.SGD(parameters, lr=handed.learning_rate)
    ids, classes = handed.ids[client], handed.classes[client]
    loss = torch.zeros(())
    for step in range(handed.steps):
        rows = slice(step * handed.batch, (step + 1) * handed.batch)
        loss = loss_of(model, ids[rows], classes[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return float(loss)
