"""Residual: what a layer's frozen weight has gained, on top of what the base model says."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from intramural.core.errors import ModelError


class FrozenWeights:
    """The frozen weights of LoRA layers that a rule adds to: base weight plus residual.

    The base weights are kept beside the model, in float32, so that each sum is made of them anew
    and no rounding piles up.
    """

    def __init__(self, model: Any, layers: Sequence[str]) -> None:
        """Find and remember the layers' weights; `layers` are paths of PEFT's modules.

        Raises:
            ModelError: A layer is no plain linear one, or another module uses its weight too.
        """
        self.layers = tuple(layers)
        self.is_moved = False
        """Whether a layer's weight is another than the base model's."""
        shared = _shared(model)
        self._weights: dict[str, Tensor] = {}
        self._base: dict[str, Tensor] = {}
        for layer in self.layers:
            module = model.get_submodule(layer)
            base = module.get_base_layer()
            if getattr(module, "fan_in_fan_out", False) or not isinstance(base, nn.Linear):
                raise ModelError(
                    f"{layer} ({type(base).__name__}) keeps its weight transposed or is not "
                    "linear, and strategy.rule adds to it; use another base, or a rule that does "
                    "not, such as 'fedsvd'"
                )
            if base.weight in shared:
                raise ModelError(
                    f"{layer}: its weight is used elsewhere too, and strategy.rule adds to it; "
                    "leave the layer out of exchange.target_modules"
                )
            self._weights[layer] = base.weight
            self._base[layer] = base.weight.detach().to(torch.float32).clone()

    @torch.no_grad()
    def write(self, residuals: Mapping[str, NDArray[np.float32]]) -> None:
        """Set each layer's weight to base plus residual, shape `(outputs, inputs)`."""
        self.is_moved = any(bool(residual.any()) for residual in residuals.values())
        for layer, weight in self._weights.items():
            added = torch.tensor(residuals[layer], device=weight.device)
            weight.copy_(self._base[layer] + added)


def _shared(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that more than one module holds."""
    seen: set[nn.Parameter] = set()
    twice: set[nn.Parameter] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (twice if parameter in seen else seen).add(parameter)
    return twice
