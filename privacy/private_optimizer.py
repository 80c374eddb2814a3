"""make_private: the book-keeping clipper in a plain Opacus training loop, by itself.

It takes the optimizer's place: `optimizer = make_private(model, optimizer, ...)`. An accountant
attaches with `optimizer.attach_step_hook`, and the loop is `losses.sum().backward()` and
`optimizer.step()`. An empty batch has no backward pass and steps all the same.
"""

from typing import Any

import torch
from torch import Tensor, nn

from intramural.core.errors import TrainingError
from intramural.privacy.bookkeeping import BookkeepingOptimizer
from intramural.privacy.engine import NoiseSource
from intramural.privacy.layer_rules import Attachment, check_clippable
from intramural.privacy.records import Recorder
from intramural.privacy.tensors import check_same_tensors, trainable


class PrivateOptimizer(BookkeepingOptimizer):
    """A `BookkeepingOptimizer` that keeps its model attached until `detach`."""

    def attach_model(self, model: nn.Module) -> None:
        """Swap the layers' forwards; each forward pass of the whole model starts a new pass."""
        self._attachment = Attachment(model, self._recorder)
        self._opening = model.register_forward_pre_hook(self._open, with_kwargs=True)

    def detach(self) -> None:
        """Leave the model as it was, and forget a batch that was not stepped on."""
        self.forget()
        self._opening.remove()
        self._attachment.detach()

    def _open(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.ndim > 0:
                self._recorder.open(range(len(value)))
                return
        raise TrainingError("the model was called without a tensor whose first dimension is rows")


def make_private(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    noise_multiplier: float,
    max_grad_norm: float,
    expected_batch_size: float,
    noise: NoiseSource | None = None,
) -> PrivateOptimizer:
    """Attach to the module, and return an Opacus optimizer to use in place of the given one.

    The loop sums the losses: `losses.sum().backward()`, with `losses[i]` of row i alone. A large
    batch goes in parts with `signal_skip_step`, as Opacus's BatchMemoryManager does. Batches must
    be Poisson samples, and an empty one still steps.

    Args:
        module: The model to train. Its type stays; only layers' forwards are swapped.
        optimizer: Any torch optimizer over exactly the module's trainable parameters.
        noise_multiplier: Noise standard deviation divided by `max_grad_norm`.
        max_grad_norm: L2 bound on each row's gradient.
        expected_batch_size: What the noised sum is divided by; a public constant.
        noise: By default cryptographic noise, keyed by the operating system.

    Guarantees:
        Those of `BookkeepingOptimizer`, with one row a unit. Sampling and the privacy it gives
        are the caller's, as is a loss that does not mix rows. So is dropout's generator: its seed
        must be secret, for a row more or less shifts the masks of the others.

    Raises:
        Unclippable: A trainable parameter has no exact rule, or is not in the optimizer.
    """
    check_clippable(module)
    check_same_tensors(module, optimizer)
    if noise is None:
        from intramural.privacy.random import SecureRandom  # needs the cryptography library

        noise = SecureRandom.secret()
    private = PrivateOptimizer(
        optimizer,
        recorder=Recorder({p: name for name, p in trainable(module).items()}),
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        expected_batch_size=expected_batch_size,
        noise=noise,
    )
    private.attach_model(module)
    return private
