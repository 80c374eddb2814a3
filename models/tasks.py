"""Tasks: from records to tokens, to one loss per example, to sums that add up across sites."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from intramural.core.metrics import Sums
from intramural.core.tokens import Ids

BLOCK_MAX = 1 << 20
"""Token ids that a data set of equal lengths keeps as one tensor beside its rows."""
IGNORED = -100
"""Target of a token that no loss counts."""


class PairLike(Protocol):
    """Anything with a text and a target, such as a record."""

    @property
    def text(self) -> str:
        """What the model reads."""
        ...

    @property
    def target(self) -> str:
        """What it should answer."""
        ...


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A tokenised data set, unpadded."""

    inputs: Ids
    """Token ids of each example."""
    targets: Ids
    """Each example's targets: one class, or one token id (or `IGNORED`) a position."""

    def __len__(self) -> int:
        return len(self.inputs)

    @cached_property
    def block(self) -> NDArray[np.int64] | None:
        """All inputs, int64, shape (examples, length), if they are few and of one length."""
        if isinstance(self.inputs, np.ndarray):
            return self.inputs.astype(np.int64) if self.inputs.size <= BLOCK_MAX else None
        lengths = {len(ids) for ids in self.inputs}
        if len(lengths) != 1 or len(self.inputs) * max(lengths) > BLOCK_MAX:
            return None
        return np.concatenate(self.inputs, dtype=np.int64).reshape(len(self.inputs), -1)

    @cached_property
    def classes(self) -> NDArray[np.int64]:
        """Each example's one target, shape (examples,): its class, where the task has classes."""
        if isinstance(self.targets, np.ndarray):
            return self.targets.reshape(-1).astype(np.int64)
        return np.concatenate(self.targets, dtype=np.int64)

    def lengths(self) -> NDArray[np.int64]:
        """Return the number of tokens of each example."""
        if isinstance(self.inputs, np.ndarray):
            count, length = self.inputs.shape
            return np.full(count, length, dtype=np.int64)
        return np.array([len(ids) for ids in self.inputs], dtype=np.int64)


Batch = dict[str, Tensor]
"""`input_ids` and `attention_mask` of shape (batch, longest), or `features` of shape
(batch, hidden) where the encoder is frozen; and `targets`."""


class Task(Protocol):
    """One kind of learning. Losses are per example: privacy needs them apart."""

    kind: str
    padded: bool
    """Rows of a batch are padded to one length; False: they all have it."""

    def tokenise(self, records: Sequence[PairLike]) -> Tokens:
        """Return the records as tokens."""
        ...

    def losses(self, model: Any, batch: Batch) -> Tensor:
        """Return one loss per example, float32, shape `(batch,)`."""
        ...

    def measure(self, model: Any, batch: Batch) -> Sums:
        """Return the batch's evaluation sums."""
        ...

    def pad(self, tokens: Tokens, indices: Sequence[int]) -> Batch:
        """Return the examples as one batch, padded to the longest among them."""
        ...


def pad_inputs(tokens: Tokens, indices: Sequence[int], *, filler: int) -> Batch:
    """Return `input_ids` and `attention_mask`, padded on the right to the longest example."""
    if tokens.block is not None:
        rows = torch.from_numpy(tokens.block.take(indices, axis=0))  # a third of torch's own time
        return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    longest = max(len(tokens.inputs[i]) for i in indices)
    ids = np.full((len(indices), longest), filler, dtype=np.int64)
    mask = np.zeros((len(indices), longest), dtype=np.int64)
    for row, index in enumerate(indices):
        length = len(tokens.inputs[index])
        ids[row, :length] = tokens.inputs[index]
        mask[row, :length] = 1
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
