"""Padding: does what stands beside a record change what the model says of it?

Records are padded to the longest of their part, so where it does, one long record moves the
gradients of all others, which clipping each to a norm does not bound. Models that mix positions
without a mask (FNet, ConvBERT) are such. No gradient flows from one record to another, so a check
of gradients cannot see it.
"""

from typing import Any, Final

import torch
from torch import Tensor

from intramural.core.errors import ModelError, Unclippable
from intramural.models.loading import Loaded

SENTENCE: Final = "Other specified disorders of bone density and structure, left ankle and foot"
"""A title of ICD-10-CM, M85.872; no site's record."""
SHARE_MAX: Final = 1e-3
"""Largest change of an output, as a share of the largest: rounding is below 1e-5."""


@torch.no_grad()
def check_padding(loaded: Loaded, *, length_max: int) -> None:
    """Refuse a model for which padding changes what it says of a record; no record is read.

    Args:
        loaded: In whatever mode; it is left in it.
        length_max: Tokens of the longest record.

    Raises:
        Unclippable: The outputs of one sentence differ with the padding beside it.
        ModelError: The model cannot take `length_max` tokens.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = tokenizer(SENTENCE, truncation=True, max_length=max(2, length_max // 2))["input_ids"]
    was_training = model.training
    model.eval()
    try:
        alone = _outputs(loaded, ids, padded=0)
        for padded in sorted({1, 8, length_max - len(ids)}):
            if 0 < padded <= length_max - len(ids):
                _compare(model, alone, _outputs(loaded, ids, padded=padded), padded=padded)
    except (RuntimeError, IndexError) as error:
        raise ModelError(
            f"model.max_length = {length_max}: {type(model).__name__} fails at this length "
            f"({type(error).__name__}); lower it to what the model has positions for"
        ) from None
    finally:
        model.train(was_training)


def _compare(model: Any, alone: list[Tensor], beside: list[Tensor], *, padded: int) -> None:
    for before, after in zip(alone, beside, strict=True):
        largest = float(before.abs().max())
        change = float((after - before).abs().max())
        if not change <= SHARE_MAX * largest:
            raise Unclippable(
                f"{type(model).__name__}: {padded} tokens of padding change what it says of a "
                f"record, by {change:.2g} of {largest:.2g}, so a long record would move the "
                "others; use a model that heeds its attention mask"
            )


def _outputs(loaded: Loaded, ids: list[int], *, padded: int) -> list[Tensor]:
    """Return what the body says of the record's tokens, and the logits, of them or of the record.

    A head may be zero, and its logits tell nothing.
    """
    filler, device = loaded.tokenizer.pad_token_id, loaded.device
    mask = torch.tensor([[1] * len(ids) + [0] * padded], device=device)
    inputs = torch.tensor([[*ids, *[filler] * padded]], device=device)
    found = loaded.model(input_ids=inputs, attention_mask=mask, output_hidden_states=True)
    parts = [found.hidden_states[-1][:, : len(ids)]] if found.get("hidden_states") else []
    logits = found.logits
    parts.append(logits if logits.ndim == 2 else logits[:, : len(ids)])
    return [part.double() for part in parts]
