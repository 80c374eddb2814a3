"""Plain training: stochastic gradient descent with PyTorch and nothing of ours but the batches."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from intramural.core.layout import Vector


def set_parameters(model: Any, arrays: Mapping[str, Any]) -> None:
    """Set the named parameters of a model; all those that train must be named."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == set(arrays)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(torch.tensor(np.array(arrays[name])))


def read_parameters(model: Any) -> Vector:
    """Return the parameters that train as one vector."""
    parts = [p.detach().numpy().ravel() for p in model.parameters() if p.requires_grad]
    return np.concatenate(parts)


def train_plainly(
    model: Any,
    tokenizer: Any,
    examples: Sequence[tuple[str, int]],
    batches: Iterable[list[int]],
    *,
    learning_rate: float,
    length_max: int,
) -> None:
    """Train in place on (text, class) pairs; each batch is one padded forward pass."""
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=learning_rate
    )
    model.train()
    for batch in batches:
        texts = [examples[i][0] for i in batch]
        classes = torch.tensor([examples[i][1] for i in batch])
        inputs = tokenizer(
            texts, padding=True, truncation=True, max_length=length_max, return_tensors="pt"
        )
        inputs.pop("token_type_ids", None)
        loss = functional.cross_entropy(model(**inputs).logits, classes)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
