"""A head on a frozen encoder: the encoder runs once a text, and the head trains on what it said."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from intramural.core.errors import ModelError
from intramural.models.tasks import Tokens, pad_inputs

ROWS = 64
"""Texts that go through the encoder at once."""
POOLER = "pooler."
"""In the names of parameters that stand behind the encoder, although the base model holds them."""
CLOSE = 1e-4
"""Largest difference of logits, remembered against computed, that rounding can explain."""


def train_head_alone(model: Any, ends: Sequence[str]) -> None:
    """Freeze all but the modules whose names end as given, and keep the encoder in evaluation mode.

    Without dropout a text's features are the same each time, so that they can be remembered.

    Raises:
        ModelError: A module named is the encoder's: remembered features would not learn of it.
    """
    for name, parameter in model.named_parameters():
        module = name.rpartition(".")[0]
        parameter.requires_grad_(any(f".{module}.".find(f".{end}.") >= 0 for end in ends))
    body = model.base_model
    inner = [n for n, p in body.named_parameters() if p.requires_grad and POOLER not in n]
    if inner:
        raise ModelError(
            f"exchange.kind = 'head' trains behind the encoder only, and {inner[0]} is in it; "
            "change exchange.trained_modules, or use 'lora'"
        )
    body.train = lambda mode=True: nn.Module.train(body, False)
    body.eval()


class FrozenBody:
    """Remembers the first token's last hidden state of each text it has seen.

    That is all that the heads of BERT, RoBERTa, DistilBERT and their kin read; a pooler stands
    behind it and may be trained. One record's features depend on that record alone.
    """

    def __init__(
        self, model: Any, *, filler: int, device: torch.device, seen: dict[bytes, Tensor]
    ) -> None:
        """Take the model and what an equal encoder has seen before; `seen` is added to."""
        self._model = model
        self._body = model.base_model
        self._filler = filler
        self._device = device
        self._seen = seen

    def features(self, tokens: Tokens, indices: Sequence[int]) -> Tensor:
        """Return the texts' features, shape `(len(indices), hidden)`.

        Raises:
            ModelError: The model's head reads more than the first token.
        """
        keys = [tokens.inputs[i].tobytes() for i in indices]
        new = [i for i, key in zip(indices, keys, strict=True) if key not in self._seen]
        # in float32 always, or they would depend on who asked first: training or evaluation
        with torch.autocast(self._device.type, enabled=False):
            if new and not self._seen:
                self._check(tokens, new[:4])
            new.sort(key=lambda i: len(tokens.inputs[i]))
            for start in range(0, len(new), ROWS):
                rows = new[start : start + ROWS]
                for i, state in zip(rows, self._run(tokens, rows), strict=True):
                    self._seen[tokens.inputs[i].tobytes()] = state
        return torch.stack([self._seen[key] for key in keys])

    def logits(self, features: Tensor) -> Tensor:
        """Return the model's logits for features, shape `(rows, labels)`."""
        ids = torch.zeros(len(features), 1, dtype=torch.long, device=features.device)
        with self._answering(features):
            logits: Tensor = self._model(input_ids=ids, attention_mask=ids + 1).logits
        return logits

    @torch.no_grad()
    def _run(self, tokens: Tokens, rows: Sequence[int]) -> Tensor:
        batch = pad_inputs(tokens, rows, filler=self._filler)
        output = self._body(**{name: tensor.to(self._device) for name, tensor in batch.items()})
        # a copy: a view would keep the states of all tokens
        first: Tensor = output.last_hidden_state[:, 0].clone()
        return first

    @torch.no_grad()
    def _check(self, tokens: Tokens, rows: Sequence[int]) -> None:
        """Compare remembered with computed logits once: another kind of head shows itself here."""
        training = self._model.training
        self._model.eval()
        batch = pad_inputs(tokens, rows, filler=self._filler)
        batch = {name: tensor.to(self._device) for name, tensor in batch.items()}
        whole = self._model(**batch).logits
        close = torch.allclose(self.logits(self._run(tokens, rows)), whole, atol=CLOSE)
        self._model.train(training)
        if not close:
            raise ModelError(
                "exchange.kind = 'head' needs a model whose head reads the first token (BERT and "
                "its kin); use 'lora'"
            )

    @contextmanager
    def _answering(self, features: Tensor) -> Iterator[None]:
        """Let the encoder answer with these features instead of running."""
        from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

        def forward(**_: Any) -> Any:
            states = features[:, None]
            pooler = getattr(self._body, "pooler", None)
            pooled = pooler(states) if pooler is not None else None
            return BaseModelOutputWithPoolingAndCrossAttentions(
                last_hidden_state=states, pooler_output=pooled
            )

        self._body.forward = lambda *_, **named: forward(**named)
        try:
            yield
        finally:
            del self._body.forward
