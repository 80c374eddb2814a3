"""Unfit: models that no engine can clip exactly, whatever their layers. Refused before a pass."""

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from intramural.core.errors import Unclippable
from intramural.privacy.tensors import trainable

PREFIX = "PeftType.PREFIX_TUNING"


def check_fit(model: nn.Module) -> None:
    """Refuse a model that mixes the records of a batch, or that cannot run as it is set.

    Looks at the model alone: no data is needed, and none is seen.

    Raises:
        Unclippable: It names the layer or parameter, and the setting.
    """
    for name, layer in model.named_modules():
        place = f"{name or 'the model'} ({type(layer).__name__})"
        if isinstance(layer, _BatchNorm):
            raise Unclippable(
                f"{place} mixes the records of a batch, so none has a gradient of its own; use a "
                "model with layer normalisation"
            )
        if _balances(getattr(layer, "config", None)):
            raise Unclippable(
                f"{place}: with output_router_logits and a router_aux_loss_coef its loss balances "
                "experts over the records of a batch; set output_router_logits = false in its "
                "config.json"
            )
        if _drops_its_prefix(layer):
            raise Unclippable(
                f"{name}{'.' if name else ''}{_first(layer)} ({type(layer).__name__}): under "
                "gradient checkpointing transformers leaves the prefix out; turn checkpointing off"
            )


def _balances(config: Any) -> bool:
    """Return whether a configuration has the model add a loss that balances experts."""
    wanted = getattr(config, "output_router_logits", False) is True
    return wanted and getattr(config, "router_aux_loss_coef", None) != 0


def _drops_its_prefix(layer: Any) -> bool:
    """Return whether PEFT's prefix tuning meets gradient checkpointing, which drops caches."""
    if type(layer).__module__ != "peft.peft_model":
        return False
    if str(getattr(layer.active_peft_config, "peft_type", "")) != PREFIX:
        return False
    return any(getattr(inner, "gradient_checkpointing", False) for inner in layer.modules())


def _first(layer: nn.Module) -> str:
    return next(iter(trainable(layer)), "prompt_encoder")
