"""Layer rules: which layers have an exact gradient a unit, and how their forward is swapped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter, functional

from intramural.core.errors import Unclippable
from intramural.privacy import prompts
from intramural.privacy.layer_functions import LookUp, Multiply, Normalize, Spread
from intramural.privacy.records import Recorder
from intramural.privacy.tensors import trainable
from intramural.privacy.unfit import check_fit

Forward = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one layer's parameters get their gradient a unit."""

    owned: list[Parameter]
    """The parameters it answers for."""
    forward: Callable[[Any, Recorder, Forward], Forward]
    """Makes the layer's forward from the layer, the recorder and its own forward."""
    method: str = "forward"
    """The name of what is swapped."""


def check_clippable(model: nn.Module) -> None:
    """Refuse a model with a trainable parameter that has no exact gradient a unit.

    Looks at the model alone: no data is needed, and none is seen.

    Raises:
        Unclippable: It names the parameter and its layer, or what `check_fit` refuses; or matrix
            products are set to less than float32, which norms do not reckon with.
    """
    if torch.get_float32_matmul_precision() != "highest":
        raise Unclippable(
            "float32 matrix products are set to "
            f"{torch.get_float32_matmul_precision()!r} precision, in which norms come out wrong; "
            "call torch.set_float32_matmul_precision('highest')"
        )
    find_layers(model)


def find_layers(model: nn.Module) -> list[tuple[nn.Module, Rule]]:
    """Return the layers that own trainable parameters, each with its rule, or refuse."""
    check_fit(model)
    layers: list[tuple[nn.Module, Rule]] = []
    owned: set[Parameter] = set()
    for layer in model.modules():
        rule = rule_of(layer)
        if rule is not None and (rule.method != "forward" or _any_trainable(rule.owned)):
            layers.append((layer, rule))
            owned.update(rule.owned)
    places: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter not in owned:
            raise Unclippable(
                f"{name} ({_owner(model, name)}) has no exact gradient a record; freeze it, "
                "or choose another adapter method"
            )
        place = parameter.data_ptr()
        if parameter.numel() and places.setdefault(place, name) != name:
            raise Unclippable(f"{name} and {places[place]} are two parameters in one memory")
    return layers


def _owner(model: nn.Module, name: str) -> str:
    """Return the class of the layer a parameter stands in; containers count as their parent."""
    path = name.split(".")[:-1]
    names: list[str] = []
    while True:
        layer = model.get_submodule(".".join(path))
        names.append(type(layer).__name__)
        containers = (nn.ParameterDict, nn.ParameterList, nn.ModuleDict, nn.ModuleList)
        if not path or not isinstance(layer, containers):
            return " of ".join(names)
        path = path[:-1]


def rule_of(layer: nn.Module) -> Rule | None:
    """Return the layer's rule, or None: then its own parameters must be frozen.

    A subclass with a forward of its own is another layer: it may do more than its parent.
    """
    kind, forward = type(layer), type(layer).forward
    if "forward" in vars(layer):  # a forward of this one layer, such as a hook of accelerate's
        return None
    own = [p for n, p in layer.named_parameters(recurse=False) if n in ("weight", "bias")]
    if forward is nn.Linear.forward:
        return Rule(owned=own, forward=_linear)
    if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        return Rule(owned=own, forward=_linear)
    if forward is nn.Embedding.forward and isinstance(layer, nn.Embedding):
        return Rule(owned=own, forward=_embedding) if _is_plain(layer) else None
    if forward is nn.LayerNorm.forward and isinstance(layer, nn.LayerNorm):
        return Rule(owned=own, forward=_layer_norm) if len(layer.normalized_shape) == 1 else None
    if kind.__name__.endswith("RMSNorm"):
        names = [name for name, _ in layer.named_parameters()]
        if names == ["weight"] and own[0].ndim == 1:
            return Rule(owned=own, forward=_rms_norm)
    if kind.__module__ == "peft.tuners.ia3.layer" and kind.__name__ == "Linear":
        return _ia3_rule(layer)
    if kind.__module__ == "peft.tuners.lora.layer" and kind.__name__ == "Embedding":
        return _lora_embedding_rule(layer)
    if prompts.learns_prompt(layer):  # the layers that make the prompt have rules themselves
        return Rule(owned=[], forward=_prompt, method=prompts.METHOD)
    return None


def _any_trainable(parameters: Iterable[Parameter]) -> bool:
    return any(parameter.requires_grad for parameter in parameters)


def _ia3_rule(layer: Any) -> Rule:
    """Return the rule of PEFT's IA3 on a linear layer."""
    return Rule(owned=list(layer.ia3_l.values()), forward=_ia3)


def _lora_embedding_rule(layer: Any) -> Rule | None:
    """Return the rule of PEFT's LoRA on an embedding, unless it is a variant (DoRA)."""
    if layer.lora_variant or layer.tp_layer is not None or not _is_plain(layer.get_base_layer()):
        return None
    owned = [*layer.lora_embedding_A.values(), *layer.lora_embedding_B.values()]
    return Rule(owned=owned, forward=_lora_embedding)


def _is_plain(table: nn.Embedding) -> bool:
    """Return whether a table is not read or written by how often the batch uses an entry."""
    return table.max_norm is None and not table.scale_grad_by_freq and not table.sparse


def _linear(layer: Any, recorder: Recorder, plain: Forward) -> Forward:
    input_first = type(layer).__name__ == "Conv1D"

    def forward(input: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return plain(input)  # type: ignore[no-any-return]
        recorder.rows(input, layer)
        return _apply(Multiply, input, layer.weight, layer.bias, recorder, input_first)

    return forward


def _embedding(layer: Any, recorder: Recorder, plain: Forward) -> Forward:
    def forward(input: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return plain(input)  # type: ignore[no-any-return]
        ids = _one_a_row(input, layer, recorder)
        return _apply(LookUp, ids, layer.weight, layer.padding_idx, recorder, False)

    return forward


def _layer_norm(layer: Any, recorder: Recorder, plain: Forward) -> Forward:
    def forward(input: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return plain(input)  # type: ignore[no-any-return]
        recorder.rows(input, layer)
        return _apply(Normalize, input, layer.weight, layer.bias, layer.eps, recorder)

    return forward


def _rms_norm(layer: Any, recorder: Recorder, plain: Forward) -> Forward:
    """Run the layer's own forward with one copy of its weight a row: models differ in detail."""

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(hidden_states, *args, **kwargs)
        rows = recorder.rows(hidden_states, layer)
        weight = _apply(Spread, layer.weight, rows, hidden_states.ndim, recorder)
        if type(layer).forward is nn.RMSNorm.forward:  # it takes a weight of one shape only
            return functional.rms_norm(hidden_states, layer.normalized_shape, None, layer.eps) * (
                weight
            )
        layer.__dict__["weight"] = weight  # found before the parameter of that name
        try:
            return plain(hidden_states, *args, **kwargs)
        finally:
            del layer.__dict__["weight"]

    return forward


def _ia3(layer: Any, recorder: Recorder, plain: Forward) -> Forward:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [layer.ia3_l[name] for name in layer.active_adapters if name in layer.ia3_l]
        if not torch.is_grad_enabled() or layer.disable_adapters or layer.merged or not active:
            return plain(x, *args, **kwargs)  # type: ignore[no-any-return]
        rows = recorder.rows(x, layer)
        scale = _apply(Spread, active[0], rows, x.ndim, recorder)
        for vector in active[1:]:
            scale = scale * _apply(Spread, vector, rows, x.ndim, recorder)
        if layer.is_feedforward:
            x = (x.to(active[-1].dtype) * scale).to(x.dtype)
            return layer.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        result = layer.base_layer(x, *args, **kwargs)
        return (result * scale).to(result.dtype)  # type: ignore[no-any-return]

    return forward


def _lora_embedding(layer: Any, recorder: Recorder, plain: Forward) -> Forward:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled() or layer.disable_adapters or layer.merged:
            return plain(x, *args, **kwargs)  # type: ignore[no-any-return]
        result = layer.base_layer(x, *args, **kwargs)
        ids, padding = _one_a_row(x, layer, recorder), layer.get_base_layer().padding_idx
        base_scale = layer._get_embed_scale()
        added = result
        for name in layer.active_adapters:
            if name not in layer.lora_embedding_A:
                continue
            low = _apply(LookUp, ids, layer.lora_embedding_A[name], padding, recorder, True)
            high = _apply(Multiply, low, layer.lora_embedding_B[name], None, recorder, False)
            high = high * layer.scaling[name]
            added = added + (high if base_scale is None else high * base_scale.to(high.dtype))
        return added.to(result.dtype)  # type: ignore[no-any-return]

    return forward


def _prompt(model: Any, recorder: Recorder, plain: Forward) -> Forward:
    """Make the prompt once a row, by the rule of its embedding."""
    return prompts.prompt_a_row(model, plain)


def _one_a_row(ids: Tensor, layer: Any, recorder: Recorder) -> Tensor:
    """Return the ids with one entry a row; models give positions once for all rows."""
    rows = recorder.rows_open
    if ids.ndim > 1 and ids.shape[0] == 1:
        ids = ids.expand(rows, *ids.shape[1:])
    recorder.rows(ids, layer)
    return ids


def _apply(function: Any, *args: Any) -> Tensor:
    """Call an autograd function; torch gives `apply` no type."""
    out: Tensor = function.apply(*args)
    return out


class Attachment:
    """A model with its layers' forwards swapped, until `detach`."""

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        """Swap the forwards; refuses what `check_clippable` refuses, and then changes nothing."""
        layers = find_layers(model)
        self._swapped = [(layer.__dict__, rule.method) for layer, rule in layers]
        self._before = [space.get(method) for space, method in self._swapped]
        for layer, rule in layers:
            plain = getattr(layer, rule.method)
            layer.__dict__[rule.method] = rule.forward(layer, recorder, plain)
        self._hooks = [
            parameter.register_hook(_refusing(parameter, recorder))  # type: ignore[no-untyped-call]
            for parameter in trainable(model).values()
        ]

    def detach(self) -> None:
        """Leave the model as it was."""
        for (space, method), before in zip(self._swapped, self._before, strict=True):
            if before is None:
                del space[method]
            else:
                space[method] = before
        for hook in self._hooks:
            hook.remove()
        self._swapped, self._before, self._hooks = [], [], []


def _refusing(parameter: Parameter, recorder: Recorder) -> Callable[[Tensor | None], None]:
    """Return a hook that refuses a gradient which autograd itself brings to the parameter."""
    return lambda grad: recorder.refuse_elsewhere(parameter, grad)
