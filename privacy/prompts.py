"""Prompts: PEFT makes one prompt and repeats it for all rows; here each row makes its own.

A prompt repeated has one gradient, in which rows do not come apart.
"""

from collections.abc import Callable
from typing import Any

import torch

KINDS = ("PeftType.PROMPT_TUNING", "PeftType.P_TUNING")
"""The PEFT methods that make one prompt and repeat it for every row."""
METHOD = "get_prompt"
"""The method of a PEFT model in whose place `prompt_a_row` stands."""


def learns_prompt(layer: Any) -> bool:
    """Return whether a layer is a PEFT model that trains a prompt."""
    if type(layer).__module__ != "peft.peft_model":
        return False
    if str(getattr(layer.active_peft_config, "peft_type", "")) not in KINDS:
        return False
    return any(parameter.requires_grad for parameter in layer.prompt_encoder.parameters())


def prompt_a_row(model: Any, plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `get_prompt` that asks the encoder once; the encoder's table answers for all rows.

    Whoever puts it in place sees to that: a table called with ids of shape (1, length) must give
    each row of the batch a copy of its own.

    Args:
        model: The PEFT model.
        plain: Its own `get_prompt`, for passes without gradients.
    """

    def get_prompt(batch_size: int, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(batch_size, *args, **kwargs)
        numbers = model.prompt_tokens[model.active_adapter].unsqueeze(0)
        encoder = model.prompt_encoder[model.active_adapter]
        return encoder(numbers.to(encoder.embedding.weight.device))

    return get_prompt
