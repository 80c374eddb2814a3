"""Book-keeping: exact per-unit clipping at about the cost of plain training.

One forward, one backward. Backward computes no weight's gradient: layers leave behind the factors
of it, from which every unit's norm follows, and then the clipped sum is one matrix product a
weight, the one plain training would have computed.

Source: Bu et al. 2023, https://arxiv.org/abs/2210.00038.
"""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.nn import Parameter

from intramural.core.errors import TrainingError
from intramural.privacy.clipped_sums import add_clipped
from intramural.privacy.engine import NoiseSource
from intramural.privacy.layer_rules import Attachment, check_clippable
from intramural.privacy.records import Recorder, full_precision
from intramural.privacy.tensors import check_same_tensors, trainable


class BookkeepingOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus has no types
    """An Opacus optimizer whose clipped sums come from records, not from per-sample gradients.

    Step hooks, `signal_skip_step`, `state_dict` and the properties of `DPOptimizer` work as in
    Opacus. A step without a backward pass before it is an empty batch: pure noise.

    Guarantees:
        Each unit of a logical batch adds a vector of L2 norm at most `max_grad_norm` to the sum;
        noise of standard deviation noise_multiplier * max_grad_norm is added to it once, whatever
        the batch holds. Then a public constant divides. A unit is clipped in the pass it is in:
        one whose rows are in two passes of a logical batch may add twice.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        recorder: Recorder,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        noise: NoiseSource,
    ) -> None:
        """Wrap the optimizer; `expected_batch_size` divides and must not come from the data."""
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
        )
        for parameter in self.params:
            del parameter.summed_grad  # Opacus leaves it on the tensors; the sums are kept here
        self._recorder = recorder
        self._noise = noise
        self._sums: dict[Parameter, Tensor] = {}

    @property
    def accumulated_iterations(self) -> int:
        """Logical batches in a step: always 1. A second one before the step is refused."""
        return 1

    @torch.no_grad()
    def clip_and_accumulate(self) -> None:
        """Add each unit's clipped gradient of the last pass, if there was one, to the sums."""
        done = self._recorder.take()
        if done is None:
            return
        try:
            with full_precision(self.params[0].device):
                add_clipped(done, self._sums, clip_norm=self.max_grad_norm)
        except BaseException:
            self.forget()  # some weights of the part are in, others not
            raise

    @torch.no_grad()
    def add_noise(self) -> None:
        """Write each parameter's noised sum to its `.grad` and start the next sums at zero."""
        std = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            total = self._sums.pop(parameter, None)
            if total is None:
                total = torch.zeros_like(
                    parameter, dtype=torch.promote_types(parameter.dtype, torch.float32)
                )
            if std > 0:
                draws = torch.from_numpy(self._noise.normal(parameter.numel(), std=std))
                total += draws.view(parameter.shape).to(total.device)
            parameter.grad = total.to(parameter.dtype)

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Clip, and unless this step is to be skipped, noise, scale and call the step hook."""
        self.clip_and_accumulate()
        if self._check_skip_next_step():
            self._is_last_step_skipped = True
            return False
        self.release()
        self._is_last_step_skipped = False
        return True

    def release(self) -> None:
        """Write the noised, divided sum to the gradients and call the step hook."""
        self.add_noise()
        self.scale_grad()
        if self.step_hook:
            self.step_hook(self)

    def forget(self) -> None:
        """Forget the sums of a logical batch underway, and the open pass: its units may come again.

        Otherwise a unit of a batch that failed half way would add twice to the next.
        """
        self._sums.clear()
        self._recorder.drop()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear `.grad` and what the last backward left; sums of a logical batch underway stay."""
        self._recorder.clear()
        self.original_optimizer.zero_grad(set_to_none=True)


class BookkeepingEngine:
    """The engine for every model the layer rules cover; see `Engine`.

    Guarantees:
        Those of `Engine`, to float32 rounding: units are clipped 1e-6 of the clip norm below it,
        a norm from Gram matrices is rounded up by what they may have lost, and where that is too
        much of it, because positions cancel, the unit's gradient is written out.

        On the first pass of two rows or more that has gradients, two backward passes of half
        check that the losses of even rows leave no gradient in odd rows, nor those of odd rows in
        even, at any layer with trainable parameters. They do not see losses scaled by something of
        the batch, as its number of tokens: that is the caller's to avoid.
    """

    name = "bookkeeping"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float,
        noise_multiplier: float,
        divisor: float,
        noise: NoiseSource,
    ) -> None:
        """Check the model and the optimizer; no data is needed. The model is not changed yet.

        Raises:
            Unclippable: A trainable parameter has no exact rule, or model and optimizer do not
                hold the same tensors.
        """
        check_clippable(model)
        check_same_tensors(model, optimizer)
        self._model = model
        self._recorder = Recorder({p: name for name, p in trainable(model).items()})
        self._attachment: Attachment | None = None
        self._isolated = False
        self.optimizer: Any = BookkeepingOptimizer(
            optimizer,
            recorder=self._recorder,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clip_norm,
            expected_batch_size=divisor,
            noise=noise,
        )

    def __enter__(self) -> Self:
        """Swap the forwards of the layers that own trainable parameters."""
        self._attachment, self._isolated = Attachment(self._model, self._recorder), False
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the layers their own forwards back, and forget a batch that was not released."""
        self.optimizer.forget()
        if self._attachment is not None:
            self._attachment.detach()
            self._attachment = None

    def open(self, owners: Sequence[int]) -> None:
        """Announce the next forward pass: row i belongs to unit `owners[i]`."""
        if self._attachment is None:
            raise TrainingError("the engine is not attached to its model; use it in a with block")
        self._recorder.open(owners)

    def fold(self, losses: Tensor) -> None:
        """Run backward on the sum of the losses; add each unit's clipped gradient to the sum."""
        rows = self._recorder.rows_open
        if losses.shape != (rows,):
            raise TrainingError(f"expected {rows} losses, one a row, got {tuple(losses.shape)}")
        try:
            if not self._isolated and rows > 1:
                self._check_isolation(losses)
            losses.sum().backward()  # type: ignore[no-untyped-call]
            self.optimizer.clip_and_accumulate()
        except BaseException:
            self.optimizer.forget()
            raise

    def release(self) -> None:
        """Write (sum + noise) / divisor to each parameter's `.grad` and start the next sum."""
        self.optimizer.release()

    def _check_isolation(self, losses: Tensor) -> None:
        """Refuse losses through which one row reaches another, by two backward passes of half."""
        heard = []
        for speaking in (0, 1):
            self._recorder.expect_silence(torch.arange(1 - speaking, len(losses), 2))
            losses[speaking::2].sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
            self._recorder.expect_silence(None)
            heard.append(self._recorder.heard)
        self._isolated = all(heard)  # else there was nothing to check yet
