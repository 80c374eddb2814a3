"""OpacusEngine: Opacus' hooks and optimizer as they are, behind the seam of engines.

Slower than book-keeping on whole models, and an independent second opinion on it everywhere.
"""

import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final, Self

import torch
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from intramural.core.errors import TrainingError, Unclippable
from intramural.privacy import prompts
from intramural.privacy.clipped_sums import SLACK
from intramural.privacy.engine import NoiseSource
from intramural.privacy.norms import ROUNDING, squared_norms
from intramural.privacy.opacus_readable import check_readable
from intramural.privacy.tensors import check_same_tensors, trainable

PROBE_TOLERANCE: Final = {torch.float32: 0.01, torch.bfloat16: 0.1}
"""Relative distance between one row's gradient by Opacus and by autograd; wiring errors are ~1."""
LEFT_ON_MODULES: Final = ("activations", "max_batch_len")
"""What Opacus leaves on layers whose forward pass had no backward pass."""


class HookedOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus has no types
    """Opacus' optimizer with another source of noise; clipping is Opacus' own.

    Guarantees:
        Those of `Engine`, to float32 rounding of a norm: Opacus scales by
        clip_norm / (norm + 1e-6).
    """

    def __init__(self, optimizer: Any, *, noise: NoiseSource, **settings: Any) -> None:
        """Wrap an optimizer; the settings are those of `DPOptimizer`."""
        super().__init__(optimizer, **settings)
        self._noise = noise
        self.forget()

    @property
    def accumulated_iterations(self) -> int:
        """Always 1: parts of a batch are one batch, and the divisor is that of the batch."""
        return 1

    def add_noise(self) -> None:
        """Write each parameter's noised sum to `.grad`; an empty batch is noise alone."""
        std = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            total = getattr(parameter, "summed_grad", None)
            total = torch.zeros_like(parameter) if total is None else total
            if std > 0:
                draws = torch.from_numpy(self._noise.normal(parameter.numel(), std=std))
                total = total + draws.view_as(parameter).to(total.device)
            parameter.grad = total.view_as(parameter)

    def release(self) -> None:
        """Noise, divide, call the step hook: Opacus' `pre_step` without its clipping."""
        self.add_noise()
        self.scale_grad()
        if self.step_hook:
            self.step_hook(self)
        for parameter in self.params:
            parameter.summed_grad = None

    def forget(self) -> None:
        """Take the running sums off the parameters."""
        for parameter in self.params:
            vars(parameter).pop("summed_grad", None)


class OpacusEngine:
    """The engine that is Opacus; see `Engine`.

    Worked around: embeddings called with one row of ids for all rows (BERT's and GPT-2's
    positions) get a row each, and so do PEFT's prompts; a unit whose gradient is not finite is
    zeroed, where Opacus would spoil the sum; a person's rows are added up before clipping.

    Refused by name: what `check_fit` refuses, layers with buffers, parameters used outside a
    forward of their own (IA3, AdaLoRA, VeRA, LoRA on embeddings), layers with layers inside (a
    masked language model's tied bias), layers of more than one input (DoRA), trainable parameters
    that are not float32, non-reentrant gradient checkpointing.

    Guarantees:
        Those of `Engine`. On the first part of two rows or more, the first row's gradient is
        compared with autograd's own: a model whose rows reach one another, or a layer that
        Opacus reads wrongly, is refused then. It costs one backward pass each time the engine is
        entered. Losses scaled by something of the batch are not seen: the caller avoids those.
    """

    name = "opacus"

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
        check_readable(model)
        check_same_tensors(model, optimizer)
        self._model = model
        self._hooks: Any = None
        self._spread: list[Any] = []
        self._prompted: list[nn.Module] = []
        self._owners: Tensor | None = None
        self._rows = 0
        self._probed = False
        self.optimizer: Any = HookedOptimizer(
            optimizer,
            noise=noise,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clip_norm,
            expected_batch_size=divisor,
        )

    def __enter__(self) -> Self:
        """Attach Opacus' hooks; the model's type stays."""
        self._hooks = self._hook()
        self._probed = False
        self._spread = [
            module.register_forward_pre_hook(self._a_row_each)
            for module in self._model.modules()
            if isinstance(module, nn.Embedding) and module.weight.requires_grad
        ]
        self._prompted = [layer for layer in self._model.modules() if prompts.learns_prompt(layer)]
        for layer in self._prompted:
            plain = getattr(layer, prompts.METHOD)
            layer.__dict__[prompts.METHOD] = prompts.prompt_a_row(layer, plain)
        for parameter in self.optimizer.params:
            parameter.summed_grad = None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take hooks, per-unit gradients and sums off the model."""
        self._clear()
        self._hooks.cleanup()
        self._hooks = None
        for handle in self._spread:
            handle.remove()
        for layer in self._prompted:
            del layer.__dict__[prompts.METHOD]
        self.optimizer.forget()

    def open(self, owners: Sequence[int]) -> None:
        """Announce the next forward pass: row i belongs to unit `owners[i]`."""
        if self._hooks is None:
            raise TrainingError("the engine is not attached to its model; use it in a with block")
        steps = [b - a for a, b in zip([-1, *owners], owners, strict=False)]
        if not owners or steps[0] != 1 or not set(steps) <= {0, 1}:
            raise TrainingError("units must be numbered from 0 without gaps, rows of one together")
        if not self._model.training:
            raise TrainingError("Opacus sees nothing in eval mode; call model.train() first")
        self._clear()
        self._drop_gradients()
        self._rows = len(owners)
        self._owners = torch.tensor(list(owners)) if owners[-1] + 1 < len(owners) else None

    def fold(self, losses: Tensor) -> None:
        """Run backward on the sum of the losses; add each unit's clipped gradient to the sum."""
        if losses.shape != (self._rows,):
            raise TrainingError(
                f"expected {self._rows} losses, one a row, got {tuple(losses.shape)}"
            )
        try:
            expected = self._first_row(losses) if self._rows > 1 and not self._probed else {}
            try:
                self._backward(losses.sum())
            except ValueError as error:  # Opacus' own; its text names a layer's type
                raise Unclippable(f"Opacus cannot follow this model: {error}") from None
            self._check_rows()
            self._probed = self._probed or self._agrees(expected)
            self._make_units()
            self.optimizer.clip_and_accumulate()
        finally:
            self._clear()
            self._drop_gradients()  # they are not noised

    def release(self) -> None:
        """Write (sum + noise) / divisor to each parameter's `.grad` and start the next sum."""
        self.optimizer.release()

    def _hook(self) -> Any:
        return GradSampleHooks(self._model, loss_reduction="sum")

    def _a_row_each(self, layer: nn.Module, args: tuple[Any, ...]) -> Any:
        """Give an embedding ids of shape (rows, ...) where it got (1, ...) for all rows."""
        ids = args[0]
        if self._rows and torch.is_grad_enabled() and layer.training:
            if ids.ndim > 1 and ids.shape[0] == 1:
                ids = ids.expand(self._rows, *ids.shape[1:])
            return (ids.contiguous(), *args[1:])
        return None

    def _backward(self, loss: Tensor, *, keep: bool = False) -> None:
        with warnings.catch_warnings():
            # an embedding's input has no gradient; Opacus needs its output's only
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            loss.backward(retain_graph=keep)  # type: ignore[no-untyped-call]

    def _first_row(self, losses: Tensor) -> dict[nn.Parameter, Tensor]:
        """Return autograd's gradients of the first row's loss."""
        self._hooks.disable_hooks()
        try:
            self._backward(losses[0], keep=True)
        finally:
            self._hooks.enable_hooks()
        found = {p: p.grad for p in self.optimizer.params if p.grad is not None}
        self._drop_gradients()
        return found

    def _agrees(self, expected: dict[nn.Parameter, Tensor]) -> bool:
        """Return whether there was something to compare, and it was alike.

        Raises:
            Unclippable: It was not alike; the parameter is named.
        """
        size = torch.stack([g.norm() for g in expected.values()]).norm() if expected else 0.0
        if not (expected and 0.0 < float(size) < float("inf")):
            return False
        for name, parameter in trainable(self._model).items():
            got = getattr(parameter, "grad_sample", None)
            if got is None or parameter not in expected:
                continue
            allowed = PROBE_TOLERANCE.get(got.dtype, max(PROBE_TOLERANCE.values()))
            wrong = (got[0].float() - expected[parameter]).norm()
            # its own size alone is no scale: an attention key's bias has a gradient of zero
            if wrong > allowed * (expected[parameter].norm() + 0.1 * size):
                raise Unclippable(
                    f"{name}: rows of a batch reach one another, or Opacus misreads the layer; "
                    "use privacy.engine = 'bookkeeping', or another model"
                )
        return True

    def _check_rows(self) -> None:
        """Refuse parameters whose gradient did not come apart into rows."""
        for name, parameter in trainable(self._model).items():
            got = getattr(parameter, "grad_sample", None)
            if got is None and parameter.grad is None:
                continue  # not used in this pass
            if not isinstance(got, Tensor) or len(got) != self._rows:
                raise Unclippable(
                    f"{name}: Opacus finds no gradient a row for it (used outside its layer, or "
                    "with one input for all rows); use privacy.engine = 'bookkeeping'"
                )

    @torch.no_grad()
    def _make_units(self) -> None:
        """Turn rows' gradients into units', in float32; a unit that is not finite becomes zero."""
        units = self._rows if self._owners is None else int(self._owners[-1]) + 1
        squares: Any = 0.0
        for parameter in self.optimizer.params:
            found = getattr(parameter, "grad_sample", None)
            if found is None:
                flat = parameter.new_zeros((units, *(1 for _ in parameter.shape)))
                parameter.grad_sample = flat.expand(units, *parameter.shape)
                continue
            found = found.float()
            if self._owners is not None:
                owners = self._owners.to(found.device)
                whole = found.new_zeros((units, *parameter.shape))
                found = whole.index_add_(0, owners, found)
            parameter.grad_sample = found
            squares = squares + squared_norms(found.flatten(1))
        squares = torch.as_tensor(squares).expand(units)
        factors = torch.where(torch.isfinite(squares), self._corrections(squares), 0.0)
        for parameter in self.optimizer.params if bool((factors != 1).any()) else ():
            factor = factors.view(-1, *(1 for _ in parameter.shape)).to(parameter.device)
            scaled = parameter.grad_sample * factor.float()
            parameter.grad_sample = scaled.where(factor != 0, 0.0)  # 0 times NaN is NaN

    def _corrections(self, squares: Tensor) -> Tensor:
        """Return what clips the units whose norm Opacus, adding in float32, would find too small.

        Four million elements in a row lose it up to 2e-3; where it loses nothing, the rest is its.
        """
        clip_norm = self.optimizer.max_grad_norm
        each = [p.grad_sample.flatten(1).norm(dim=1) for p in self.optimizer.params]
        by_opacus, norms = torch.stack(each).norm(dim=0), squares.sqrt()
        escapes = (norms > clip_norm) & (by_opacus < norms * (1 - ROUNDING))
        return torch.where(escapes, clip_norm * (1 - SLACK) / norms, 1.0)

    def _drop_gradients(self) -> None:
        for parameter in self.optimizer.params:
            parameter.grad = None

    def _clear(self) -> None:
        """Forget what Opacus keeps of a pass."""
        for module in self._model.modules():
            for name in LEFT_ON_MODULES:
                vars(module).pop(name, None)
        for parameter in self.optimizer.params:
            vars(parameter).pop("_current_grad_sample", None)
            parameter.grad_sample = None
            parameter._forward_counter = 0
        self._rows = 0
