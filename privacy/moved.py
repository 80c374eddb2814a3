"""Moved: after the first step, did every trainable tensor move?

Training that moves nothing looks alive: the loss wanders with the batches and epsilon grows.
https://github.com/meta-pytorch/opacus/issues/820
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from intramural.core.errors import TrainingError

SAMPLE_MAX = 1024
"""About how many elements of a tensor are remembered; noise moves every one of them."""


class MovedCheck:
    """Remembers some elements of each tensor, evenly spaced, as they are before a step."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        """Take the trainable tensors by name."""
        self._parameters = dict(parameters)
        self._before = {name: _some(tensor) for name, tensor in parameters.items()}

    def check(self) -> None:
        """Refuse to go on if a tensor stands where it stood.

        Call it after a step with noise and a learning rate above 0: without noise, tensors whose
        gradient is zero (LoRA's A while B is zero) stand still for good reason.

        Raises:
            TrainingError: It names tensors that did not move.
        """
        still = [
            name
            for name, tensor in self._parameters.items()
            if torch.equal(_some(tensor), self._before[name])
        ]
        if still:
            shown = ", ".join(still[:3]) + (" ..." if len(still) > 3 else "")
            raise TrainingError(
                f"{len(still)} of {len(self._before)} trainable tensors did not move in the first "
                f"step: {shown}; move and adapt the model first, make the optimizer after"
            )


def _some(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLE_MAX)].clone()
