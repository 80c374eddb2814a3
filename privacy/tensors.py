"""Tensors: which a model trains, and whether the optimizer holds the same."""

import torch
from torch import nn
from torch.nn import Parameter

from intramural.core.errors import Unclippable


def trainable(model: nn.Module) -> dict[str, Parameter]:
    """Return the trainable parameters by name, each once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def check_same_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that holds other tensors than the model trains.

    Otherwise training would look alive and move nothing, or move a tensor that is not clipped:
    https://github.com/meta-pytorch/opacus/issues/820.
    """
    held = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    names = trainable(model)
    missing = [name for name, parameter in names.items() if parameter not in held]
    if missing:
        raise Unclippable(
            f"{missing[0]} is trainable and not in the optimizer ({len(missing)} such); move and "
            "adapt the model first, make the optimizer after"
        )
    if len(held) > len(names):
        raise Unclippable(
            f"the optimizer holds {len(held) - len(names)} tensors that the model does not train; "
            "move and adapt the model first, make the optimizer after"
        )
