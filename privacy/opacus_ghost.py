"""OpacusGhostEngine: Opacus' ghost clipping, behind the seam of engines.

Two backward passes over one forward pass: the first for each record's norm, from what layers take
in and get back; the second for the sum of the losses, each scaled by its record's clip factor.
Less memory than hooks on whole models, and a third opinion on the clipped sum.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from opacus.grad_sample import GradSampleHooksFastGradientClipping
from opacus.optimizers import DPOptimizerFastGradientClipping
from torch import Tensor, nn

from intramural.core.errors import TrainingError, Unclippable
from intramural.privacy.engine import NoiseSource
from intramural.privacy.ghost_norms import Grads, norms_of, written_out
from intramural.privacy.opacus_engine import HookedOptimizer, OpacusEngine
from intramural.privacy.opacus_readable import check_readable
from intramural.privacy.tensors import trainable

OTHER: Final = "use privacy.engine = 'bookkeeping', or 'opacus'"
NORM_MAX: Final = 2.0**64
"""Norm / clip_norm from which a record counts as not finite: its factor would lose bits."""
PROBE_TOLERANCE: Final = 1e-3
"""Relative distance between a row's norm by Opacus and by autograd; wiring errors are ~1."""


class GhostOptimizer(HookedOptimizer, DPOptimizerFastGradientClipping):  # type: ignore[misc]  # no types
    """Opacus' optimizer for ghost clipping, with another source of noise."""


class GhostHooks(GradSampleHooksFastGradientClipping):  # type: ignore[misc]  # no types
    """Opacus' hooks for ghost clipping, with norms that no rounding hides: `ghost_norms`."""

    def __init__(self, model: nn.Module, *, clip_norm: float) -> None:
        """Attach to the model."""
        self.NORM_SAMPLERS = {type(layer): norms_of for layer in model.modules()}
        self.inputs: dict[nn.Module, list[Tensor]] = {}
        """What each layer took in, in this pass; autograd holds the same tensors."""
        self.factors: list[float] | None = None
        """Each row's factor while sums are written out; None while norms are taken."""
        self.sums: Grads = {}
        super().__init__(model, loss_reduction="sum", max_grad_norm=clip_norm)

    def capture_activations_hook(
        self, module: nn.Module, forward_input: list[Tensor], _forward_output: Any
    ) -> None:
        """Keep what a layer takes in.

        Raises:
            Unclippable: The layer is used twice in the pass.
        """
        try:
            super().capture_activations_hook(module, forward_input, _forward_output)
        except NotImplementedError:  # Opacus' text names no layer
            raise Unclippable(
                f"{self._name(module)}: used twice in a pass, which ghost clipping cannot add up; "
                f"{OTHER}"
            ) from None
        if kept := vars(module).get("activations"):
            self.inputs[module] = kept[-1]

    def capture_backprops_hook(
        self, module: nn.Module, _forward_input: Any, forward_output: Any, **settings: Any
    ) -> None:
        """Take a layer's norms, or add its rows' scaled gradients up.

        Raises:
            Unclippable: The layer computes in less than float32.
        """
        if not self.hooks_enabled:
            return
        if forward_output[0].dtype not in (torch.float32, torch.float64):
            raise Unclippable(
                f"{self._name(module)}: ghost clipping would add the records up in "
                f"{forward_output[0].dtype}; set training.precision = 'float32', or {OTHER}"
            )
        if self.factors is None:
            super().capture_backprops_hook(module, _forward_input, forward_output, **settings)
            return
        for row, factor in enumerate(self.factors):
            if factor > 0:
                self._write(module, forward_output[0].detach(), row, factor)

    def forget(self) -> None:
        """Forget a pass."""
        self.inputs, self.sums, self.factors = {}, {}, None

    def _write(self, layer: nn.Module, grads: Tensor, row: int, factor: float) -> None:
        one = slice(row, row + 1)
        inputs = [tensor[one] for tensor in self.inputs[layer]]
        for parameter, gradient in written_out(layer, inputs, grads[one]).items():
            if parameter.requires_grad:
                term = gradient[0] * factor
                held = self.sums.get(parameter)
                self.sums[parameter] = term if held is None else held + term

    def _name(self, layer: nn.Module) -> str:
        """Return the name of a layer's first trained parameter."""
        names = {module: name for name, module in self._module.named_modules()}
        own = [name for name, p in layer.named_parameters(recurse=False) if p.requires_grad]
        return ".".join(filter(None, (names.get(layer, ""), own[0] if own else "")))


def check_ghostly(model: nn.Module) -> None:
    """Refuse, by name, what ghost clipping would not bound; no data is needed.

    Raises:
        Unclippable: The first such parameter, and why; or what `check_readable` refuses.
    """
    check_readable(model)
    owners: dict[nn.Parameter, str] = {}
    for name, layer in model.named_modules():
        for own, parameter in layer.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            place = f"{name}.{own}".lstrip(".")
            if parameter in owners:
                raise Unclippable(
                    f"{place}: tied to {owners[parameter]}, and ghost clipping has no norm of both "
                    f"together; {OTHER}"
                )
            owners[parameter] = place
            if why := _unghostly(layer):
                raise Unclippable(f"{place} ({type(layer).__name__}): {why}; {OTHER}")


def _unghostly(layer: nn.Module) -> str:
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        if layer.scale_grad_by_freq:
            return "scale_grad_by_freq divides a record's gradient by the batch's words"
        if layer.max_norm is not None or layer.sparse:
            return "max_norm and sparse gradients are not followed"
    if type(layer) is nn.LayerNorm and layer.bias is None:
        return "Opacus fails on a LayerNorm without bias"
    return ""


class OpacusGhostEngine(OpacusEngine):
    """The engine that is Opacus' ghost clipping; see `Engine`. A unit is one record, and one row.

    Layers for which Opacus has no norm without the gradient (normalisation, Conv1D) have theirs
    written out, a layer at a time. A part with a record that is not finite has its sum written out,
    row by row: a factor of 0 would not take a NaN out of the second pass.

    Refused by name: what `OpacusEngine` refuses, tied parameters, layers used twice in a pass,
    embeddings whose gradients are scaled by the batch, less than float32 (also by autocast: the
    second pass would round the sum of records, not each), and units of several rows.

    Guarantees:
        Those of `Engine`, to float32 rounding of a norm: Opacus scales by
        clip_norm / (norm + 1e-6). The sum is autograd's own, so what hooks do not see would enter
        it unclipped. Hence on the first part of two rows or more, the first row's norms are
        compared with autograd's; and in every part a parameter without norms is refused, and one
        whose sum is longer than its rows' clipped norms together. A record whose norm is 2^64
        times the clip norm counts as not finite.
    """

    name = "opacus-ghost"

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
            Unclippable: A trainable parameter has no exact norm, or model and optimizer do not
                hold the same tensors.
        """
        check_ghostly(model)
        settings: Mapping[str, Any] = {"noise_multiplier": noise_multiplier, "noise": noise}
        super().__init__(model, optimizer, clip_norm=clip_norm, divisor=divisor, **settings)
        self.optimizer = GhostOptimizer(
            optimizer, max_grad_norm=clip_norm, expected_batch_size=divisor, **settings
        )

    def open(self, owners: Sequence[int]) -> None:
        """Announce the next forward pass: row i is record i."""
        super().open(owners)
        if self._owners is not None:
            raise TrainingError(
                "ghost clipping has one norm a row, and none for a person's rows together"
            )

    def fold(self, losses: Tensor) -> None:
        """Run backward twice; add each record's clipped gradient to the sum."""
        if losses.shape != (self._rows,):
            raise TrainingError(
                f"expected {self._rows} losses, one a row, got {tuple(losses.shape)}"
            )
        try:
            expected = self._first_row(losses) if self._rows > 1 and not self._probed else {}
            self._through(losses.sum(), keep=True)
            self._check_rows()
            self._drop_gradients()
            self._probed = self._probed or self._agrees(expected)
            self._add(losses)
        finally:
            self._clear()
            self._drop_gradients()  # they are not noised

    def _hook(self) -> Any:
        return GhostHooks(self._model, clip_norm=self.optimizer.max_grad_norm)

    def _through(self, loss: Tensor, *, keep: bool = False) -> None:
        try:
            self._backward(loss, keep=keep)
        except ValueError as error:  # Opacus' own; its text names a layer's type
            raise Unclippable(f"Opacus cannot follow this model: {error}") from None

    def _add(self, losses: Tensor) -> None:
        """Add the clipped sum to the running one, by Opacus' factors and optimizer."""
        norms = self._hooks.get_norm_sample()
        factors = self._hooks.get_clipping_coef()
        sound = norms < NORM_MAX * self.optimizer.max_grad_norm  # false for NaN
        factors = torch.where(sound, factors, 0.0)
        if bool(sound.all()):
            self._hooks.disable_hooks()
            try:
                self._backward((factors.to(losses.device) * losses).sum())
            finally:
                self._hooks.enable_hooks()
            self._check_bounded(factors)
        else:
            self._hooks.factors = factors.tolist()
            self._through(losses.sum())
            for parameter in self.optimizer.params:
                parameter.grad = self._hooks.sums.get(parameter)
        for parameter in self.optimizer.params:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.accumulate()

    def _check_rows(self) -> None:
        """Refuse parameters that have a gradient and no norm a row."""
        for name, parameter in trainable(self._model).items():
            norms = getattr(parameter, "_norm_sample", None)
            if norms is None and parameter.grad is None:  # not used in this pass
                zeros = torch.zeros(self._rows, dtype=torch.float64, device=parameter.device)
                vars(parameter)["_norm_sample"] = zeros
            elif norms is None or norms.shape != (self._rows,):
                raise Unclippable(
                    f"{name}: Opacus finds no norm a row for it (used outside its layer, or with "
                    f"one input for all rows); {OTHER}"
                )

    def _agrees(self, expected: Grads) -> bool:
        """Return whether there was something to compare, and it was alike.

        Raises:
            Unclippable: It was not alike; the parameter is named.
        """
        lengths = {p: float(gradient.double().norm()) for p, gradient in expected.items()}
        size = sum(length**2 for length in lengths.values()) ** 0.5
        if not 0.0 < size < float("inf"):
            return False
        for name, parameter in trainable(self._model).items():
            length = lengths.get(parameter, 0.0)
            wrong = abs(float(_norms(parameter)[0]) - length)
            # its own size alone is no scale: an attention key's bias has a gradient of zero
            if not wrong <= PROBE_TOLERANCE * (length + 0.1 * size):
                raise Unclippable(
                    f"{name}: rows of a batch reach one another, or Opacus misreads the layer; "
                    f"{OTHER}"
                )
        return True

    def _check_bounded(self, factors: Tensor) -> None:
        """Refuse a sum that is longer than its rows' clipped norms: hooks then missed a use."""
        spare = 0.1 * PROBE_TOLERANCE * float(factors @ self._hooks.get_norm_sample())
        for name, parameter in trainable(self._model).items():
            if parameter.grad is None:
                continue
            bound = float(factors @ _norms(parameter).to(factors.device))
            if not float(parameter.grad.norm()) <= (1 + PROBE_TOLERANCE) * bound + spare:
                raise Unclippable(
                    f"{name}: its gradient is longer than its layer's norms say (used outside its "
                    f"layer as well); {OTHER}"
                )

    def _clear(self) -> None:
        """Forget what Opacus keeps of a pass."""
        super()._clear()
        self._hooks.forget()
        for parameter in self.optimizer.params:
            vars(parameter).pop("_norm_sample", None)


def _norms(parameter: nn.Parameter) -> Tensor:
    found: Tensor = vars(parameter)["_norm_sample"]
    return found
