"""Readable: which trainable parameters Opacus' hooks see, each in a pass of its own layer."""

import inspect

import torch
from opacus.grad_sample import GradSampleHooks
from torch import nn

from intramural.core.errors import Unclippable
from intramural.privacy.unfit import check_fit


def check_readable(model: nn.Module) -> None:
    """Refuse, by name, trainable parameters that Opacus' hooks cannot see or would misread.

    Raises:
        Unclippable: The first such parameter, and why; or what `check_fit` refuses.
    """
    check_fit(model)
    for name, module in model.named_modules():
        own = [n for n, p in module.named_parameters(recurse=False) if p.requires_grad]
        if own and (why := _unreadable(module)):
            raise Unclippable(f"{name}.{own[0]} ({type(module).__name__}): {why}")
        function = getattr(module, "_gradient_checkpointing_func", None)
        reentrant = getattr(function, "keywords", {}).get("use_reentrant", False)
        if function and getattr(module, "gradient_checkpointing", False) and not reentrant:
            raise Unclippable(
                f"{name or 'model'}: Opacus cannot follow non-reentrant checkpointing; set "
                "training.gradient_checkpointing = false, or privacy.engine = 'bookkeeping'"
            )


def _unreadable(module: nn.Module) -> str:
    """Return why Opacus cannot clip a layer's own parameters, or ''."""
    if isinstance(module, nn.ParameterDict | nn.ParameterList):
        return "used outside a forward pass of its own, which Opacus does not see"
    if any(True for _ in module.buffers()):
        return "the layer has buffers, which would carry one row's values to others"
    if any(p.requires_grad and p.dtype != torch.float32 for p in module.parameters()):
        return "trainable parameters must be float32, or norms and sums would not be"
    if type(module) not in GradSampleHooks.GRAD_SAMPLERS:
        if any(True for _ in module.children()):
            return "Opacus takes a layer with layers inside for one, and misses what those share"
        parameters = list(inspect.signature(module.forward).parameters.values())
        optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        needed = [p for p in parameters if p.default is p.empty and p.kind not in optional]
        if len(needed) != 1:
            return "Opacus differentiates unknown layers by their one input; this has others"
    return ""
