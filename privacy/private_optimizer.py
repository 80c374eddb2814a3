"""make_private: the book-keeping clipper in a plain Opacus training loop, by itself.

It takes the optimizer's place: `optimizer = make_private(model, optimizer, ...)`. An accountant
attaches with `optimizer.attach_step_hook`, and the loop is `losses.sum().backward()` and
`optimizer.step()`. An empty batch has no backward pass and steps all the same.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from intramural.core.errors import TrainingError, Unclippable
from intramural.privacy.bookkeeping import BookkeepingOptimizer
from intramural.privacy.engine import NoiseSource
from intramural.privacy.layer_rules import Attachment, check_clippable
from intramural.privacy.moved import MovedCheck
from intramural.privacy.records import Recorder
from intramural.privacy.tensors import check_same_tensors, trainable


class PrivateOptimizer(BookkeepingOptimizer):
    """A `BookkeepingOptimizer` that keeps its model attached until `detach`.

    Its first step with noise and learning rates above 0 also checks that the model's own tensors
    moved, all of them: https://github.com/meta-pytorch/opacus/issues/820.
    """

    def attach_model(self, model: nn.Module) -> None:
        """Swap the layers' forwards; each forward pass of the whole model starts a new pass."""
        self._attachment = Attachment(model, self._recorder)
        self._opening = model.register_forward_pre_hook(self._open, with_kwargs=True)
        self._model = model
        self._unproved = True

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Clip, noise and step; the first step checks that the model moved.

        Raises:
            Unclippable: The optimizer no longer holds the tensors that the model trains.
            TrainingError: A tensor of the model did not move.
        """
        moved = MovedCheck(trainable(self._model)) if self._unproved else None
        result: float | None = super().step(closure)
        if moved is not None and not self._is_last_step_skipped:
            check_same_tensors(self._model, self.original_optimizer)
            if self.noise_multiplier > 0 and self._may_move():
                moved.check()
                self._unproved = False
        return result

    def _may_move(self) -> bool:
        """Return whether every learning rate is above 0, as one that warms up is not at first."""
        rates = [group.get("lr") for group in self.param_groups]
        return all(rate is None or float(rate) > 0 for rate in rates)

    def detach(self) -> None:
        """Leave the model as it was, and forget a batch that was not stepped on."""
        self.forget()
        self._opening.remove()
        self._attachment.detach()

    def _open(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        if kwargs.get("output_router_logits"):
            raise Unclippable(
                "output_router_logits adds a loss that balances experts over the records of a "
                "batch; leave it out"
            )
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

    Not covered:
        Packing, several records laid end to end in one row. It cannot be seen here: the row is
        then the unit, a record moves all rows that it is packed into, and whoever is packed
        beside it moves with it, so no claim holds for a record. Give each record a row of its
        own. Nor the loss that transformers computes from `labels`: its mean over the batch's
        tokens scales each record's gradient by the others' lengths. Take losses from the logits.

    Raises:
        Unclippable: A trainable parameter has no exact rule, or is not in the optimizer; or the
            model mixes records, as batch normalisation and the balancing of experts do.
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
