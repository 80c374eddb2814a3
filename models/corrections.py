"""Corrections: what a step's gradient gains beside the records' own: a pull, a control variate.

FedProx pulls a site's steps back to where its round began; Ditto pulls a site's own model to the
federation's; SCAFFOLD adds how the sites' gradients differ from this site's.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Named = Mapping[str, NDArray[np.float32]]
"""Numbers for each parameter, by its name and in its shape."""


class Corrections:
    """Adds `pull * (w - anchor) + shift` to the gradients of the trained parameters.

    Called between whatever clips and noises the gradient and the optimizer's step. It sees no
    record: under [privacy] `w` has noise already and the anchor is what the coordinator sent, so
    that this is post-processing.

    Source: the pull is the gradient of FedProx's term, Li et al. 2020, equation 2,
    https://arxiv.org/abs/1812.06127.
    """

    def __init__(
        self,
        trained: Mapping[str, nn.Parameter],
        *,
        pull: float = 0.0,
        anchor: Named | None = None,
        shift: Named | None = None,
    ) -> None:
        """Take what is trained, as it is before the first step.

        Args:
            trained: By name; they stay the model's own tensors.
            pull: Strength of the pull to the anchor; 0: none.
            anchor: None: where the parameters are now.
            shift: Added to each step's gradient; nothing to parameters that it does not name.
        """
        self._pull = pull
        self._trained = dict(trained) if pull or shift else {}
        self._anchor: dict[str, Tensor] = {}
        self._shift: dict[str, Tensor] = {}
        for name, parameter in self._trained.items():
            if pull:
                held = (
                    parameter.detach().clone() if anchor is None else like(parameter, anchor[name])
                )
                self._anchor[name] = held
            if shift is not None and name in shift:
                self._shift[name] = like(parameter, shift[name])

    @torch.no_grad()
    def __call__(self) -> None:
        """Add to the gradients; a parameter without one gets what is added."""
        for name, parameter in self._trained.items():
            gained = self._shift.get(name)
            if self._pull:
                pulled = (parameter - self._anchor[name]).mul_(self._pull)
                gained = pulled if gained is None else pulled.add_(gained)
            if gained is None:
                continue
            if parameter.grad is None:
                parameter.grad = gained.clone()
            else:
                parameter.grad.add_(gained)


def like(parameter: nn.Parameter, values: NDArray[np.float32]) -> Tensor:
    """Return numbers as a tensor beside a parameter, of its kind."""
    return torch.tensor(values, device=parameter.device, dtype=parameter.dtype)
