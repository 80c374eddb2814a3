"""Padding: does what stands beside a record change what the model says of it?

Records are padded to the longest of their part, so where it does, one long record moves the
gradients of all others, which clipping each to a norm does not bound. Models that mix positions
without a mask (FNet, ConvBERT) are such. No gradient flows from one record to another, so a check
of gradients cannot see it.
"""

from typing import Final

import torch

from intramural.core.errors import Unclippable
from intramural.models.loading import Loaded

SENTENCE: Final = "Other specified disorders of bone density and structure, left ankle and foot"
"""A title of ICD-10-CM, M85.872; no site's record."""
SHARE_MAX: Final = 1e-3
"""Largest change of an output, as a share of the largest output: rounding is below 1e-5."""


@torch.no_grad()
def check_padding(loaded: Loaded, *, length_max: int) -> None:
    """Refuse a model for which padding changes what it says of a record; no record is read.

    Args:
        loaded: In whatever mode; it is left in it.
        length_max: Tokens of the longest record.

    Raises:
        Unclippable: The outputs of one sentence differ with the padding beside it.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = tokenizer(SENTENCE, truncation=True, max_length=max(2, length_max // 2))["input_ids"]
    was_training = model.training
    model.eval()
    try:
        alone = _outputs(loaded, ids, padded=0)
        for padded in sorted({1, 8, length_max - len(ids)}):
            if 0 < padded <= length_max - len(ids):
                beside = _outputs(loaded, ids, padded=padded)
                share = float((beside - alone).abs().max() / alone.abs().max())
                if not share <= SHARE_MAX:
                    raise Unclippable(
                        f"{type(model).__name__}: {padded} tokens of padding change what it says "
                        f"of a record by {share:.1%}, so a long record would move the others; use "
                        "a model that heeds its attention mask"
                    )
    finally:
        model.train(was_training)


def _outputs(loaded: Loaded, ids: list[int], *, padded: int) -> torch.Tensor:
    """Return the logits of the tokens that are not padding, or the record's."""
    filler = loaded.tokenizer.pad_token_id
    mask = torch.tensor([[1] * len(ids) + [0] * padded], device=loaded.device)
    inputs = torch.tensor([[*ids, *[filler] * padded]], device=loaded.device)
    logits = loaded.model(input_ids=inputs, attention_mask=mask).logits.double()
    kept: torch.Tensor = logits if logits.ndim == 2 else logits[:, : len(ids)]
    return kept
