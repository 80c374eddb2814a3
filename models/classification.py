"""Classification: one label per text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from intramural.core.metrics import Sums, fixed_point
from intramural.models.head import FrozenBody
from intramural.models.tasks import Batch, PairLike, Tokens, pad_inputs


class Classification:
    """Cross-entropy over a fixed list of labels."""

    kind = "classification"

    def __init__(
        self,
        tokenizer: Any,
        labels: Sequence[str],
        *,
        length_max: int,
        body: FrozenBody | None = None,
    ) -> None:
        """Take the tokenizer and the labels; with a frozen body, batches are its features."""
        self.labels = tuple(labels)
        self._tokenizer = tokenizer
        self._filler: int = tokenizer.pad_token_id
        self._length_max = length_max
        self._body = body
        self.padded = body is None

    def tokenise(self, records: Sequence[PairLike]) -> Tokens:
        """Return the texts as token ids, cut at the longest length, and labels as classes."""
        classes = {label: index for index, label in enumerate(self.labels)}
        texts = [record.text for record in records]
        if not texts:
            return Tokens(inputs=[], targets=[])
        encoded = self._tokenizer(texts, truncation=True, max_length=self._length_max)
        return Tokens(
            inputs=[np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]],
            targets=[np.array([classes[r.target]], dtype=np.int32) for r in records],
        )

    def pad(self, tokens: Tokens, indices: Sequence[int]) -> Batch:
        """Return one batch; `targets` has shape `(batch,)`."""
        if self._body is not None:
            batch = {"features": self._body.features(tokens, indices)}
        else:
            batch = pad_inputs(tokens, indices, filler=self._filler)
        batch["targets"] = torch.from_numpy(tokens.classes.take(indices))
        return batch

    def losses(self, model: Any, batch: Batch) -> Tensor:
        """Return each text's cross-entropy, shape `(batch,)`."""
        return functional.cross_entropy(
            self._logits(model, batch), batch["targets"], reduction="none"
        )

    def measure(self, model: Any, batch: Batch) -> Sums:
        """Return confusion counts (true class x predicted class), loss sum, and examples."""
        logits, classes = self._logits(model, batch), batch["targets"]
        losses = functional.cross_entropy(logits, classes, reduction="none")
        count = len(self.labels)
        cells = (classes * count + logits.argmax(-1)).cpu().numpy()
        return Sums(
            counts={
                "confusion": np.bincount(cells, minlength=count * count).astype(np.int64),
                "loss": np.array([fixed_point(losses.double().cpu().numpy())], dtype=np.int64),
                "examples": np.array([len(cells)], dtype=np.int64),
            }
        )

    def _logits(self, model: Any, batch: Batch) -> Tensor:
        if self._body is not None:
            return self._body.logits(batch["features"]).float()
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        logits: Tensor = output.logits
        return logits.float()
