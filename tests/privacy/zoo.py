"""The models that the book-keeping engine must be exact on, and the comparison itself."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import peft
import torch
from torch import nn

from tests.privacy import toys
from tests.privacy.naive import clipped_sum, norms, relative_error, unit_gradients

PEFT_ASKS = "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
"""PEFT asks transformers for it."""

EXACT = 1e-6
"""Largest relative error of a clipped sum."""
ROUNDED = 1e-5
"""Share by which a norm from Gram matrices may be too large: it is rounded up."""
FLOAT32 = 1e-7
"""Share by which the norm of a gradient that autograd wrote out in float32 is itself wrong."""

PEOPLE = [[0], [1, 2, 3], [4, 5], [6], [7, 8]]
"""Units of one, two and three rows."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What the engine said of a batch, held against the loop."""

    error: float
    """Relative error of the clipped sum."""
    error_beside_norms: float
    """The same, where the loop clips by the engine's norms."""
    ratios: list[float]
    """The engine's norm of each unit over the loop's."""


def compare(
    make: Callable[[], Any],
    kind: str,
    *,
    units: list[list[int]] | None = None,
    part: int | None = None,
    **options: Any,
) -> Agreement:
    """Run engine and loop with a clip norm that half of the units meet.

    The engine's model may differ from the loop's in what must not matter: `prepare` is its own.
    """
    prepare = options.pop("prepare", lambda model: None)
    units = units if units is not None else [[row] for row in range(toys.ROWS)]
    torch.manual_seed(0)
    model = make().train()
    losses = toys.losses_of(kind=kind, rows=sum(map(len, units)), **options)
    alone = unit_gradients(model, losses, units)
    lengths = norms(alone)
    clip_norm = median(lengths)
    prepare(model)
    with toys.norms_noted() as noted:
        got = toys.engine_sum(model, losses, units, clip_norm=clip_norm, part=part)
    by_engines = clipped_sum(alone, clip_norm=clip_norm, lengths=noted)
    return Agreement(
        error=relative_error(got, clipped_sum(alone, clip_norm=clip_norm)),
        error_beside_norms=relative_error(got, by_engines),
        ratios=[mine / true for mine, true in zip(noted, lengths, strict=True)],
    )


def agree(make: Callable[[], Any], kind: str, **options: Any) -> float:
    """Return the relative error of the clipped sum; see `compare`."""
    return compare(make, kind, **options).error


def assert_rounded_up(found: Agreement) -> None:
    """Assert what holds where norms come from Gram matrices."""
    assert found.error_beside_norms < EXACT
    assert min(found.ratios) >= 1 - FLOAT32
    assert max(found.ratios) <= 1 + ROUNDED


def checkpoint(model: Any, *, reentrant: bool) -> None:
    """Turn on gradient checkpointing of either kind."""
    name = "activation_checkpointing_enable"  # since transformers 5.2x; before, the other
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()  # else a frozen embedding cuts the graph


class Bottleneck(nn.Module):
    """A layer followed by an adapter: down, nonlinearity, up, residual."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(width, 4), nn.Linear(4, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        added: torch.Tensor = self.up(torch.relu(self.down(out)))
        return out + added


def adapters() -> Any:
    model = toys.bert("SequenceClassification").requires_grad_(False)
    model.classifier.requires_grad_(True)
    for layer in model.bert.encoder.layer:
        layer.output.dense = Bottleneck(layer.output.dense, 32)
    return model


def ia3() -> Any:
    model = toys.adapt(
        toys.bert("SequenceClassification"),
        peft.IA3Config(
            task_type="SEQ_CLS",
            target_modules=["key", "value", "output.dense"],
            feedforward_modules=["output.dense"],
        ),
    )
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model


def bias_only() -> Any:
    model = toys.bert("SequenceClassification")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("bias") or "classifier" in name
    return model


SEQ, TOK, MLM = "SequenceClassification", "TokenClassification", "MaskedLM"
LM, SEQUENCES = {"task_type": "CAUSAL_LM"}, {"task_type": "SEQ_CLS"}

MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "bert sequences": (lambda: toys.bert(SEQ), "label"),
    "bert tokens": (lambda: toys.bert(TOK), "labels"),
    "bert words, tied": (lambda: toys.bert(MLM), "words"),
    "bert biases": (bias_only, "label"),
    "bert lora": (lambda: toys.lora(toys.bert(SEQ), "query", "value", **SEQUENCES), "label"),
    "bert rslora with biases": (
        lambda: toys.lora(
            toys.bert(SEQ),
            "query",
            use_rslora=True,
            lora_bias=True,
            bias="all",
            task_type="SEQ_CLS",
        ),
        "label",
    ),
    "bert tokens lora": (
        lambda: toys.lora(toys.bert(TOK), "query", "value", task_type="TOKEN_CLS"),
        "labels",
    ),
    "bert ia3": (ia3, "label"),
    "bert adapters": (adapters, "label"),
    "bert prefix": (
        lambda: toys.adapt(
            toys.bert(SEQ), peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
        ),
        "label",
    ),
    "bert prefix with a network": (
        lambda: toys.adapt(
            toys.bert(SEQ),
            peft.PrefixTuningConfig(
                task_type="SEQ_CLS",
                num_virtual_tokens=4,
                prefix_projection=True,
                encoder_hidden_size=8,
            ),
        ),
        "label",
    ),
    "bert prompt": (
        lambda: toys.adapt(
            toys.bert(SEQ), peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
        ),
        "label",
    ),
    "bert p-tuning": (
        lambda: toys.adapt(
            toys.bert(SEQ),
            peft.PromptEncoderConfig(
                task_type="SEQ_CLS", num_virtual_tokens=20, encoder_hidden_size=8
            ),
        ),
        "label",
    ),
    "gpt2, tied": (lambda: toys.gpt2(tied=True), "words"),
    "gpt2": (lambda: toys.gpt2(tied=False), "words"),
    "gpt2 lora": (
        lambda: toys.lora(toys.gpt2(tied=True), "c_attn", fan_in_fan_out=True, **LM),
        "words",
    ),
    "gpt2 prefix": (
        lambda: toys.adapt(
            toys.gpt2(tied=True), peft.PrefixTuningConfig(num_virtual_tokens=4, **LM)
        ),
        "words",
    ),
    "llama, tied": (lambda: toys.llama(tied=True), "words"),
    "llama": (lambda: toys.llama(tied=False), "words"),
    "llama lora everywhere": (
        lambda: toys.lora(toys.llama(tied=False), "all-linear", **LM),
        "words",
    ),
    "llama rslora": (
        lambda: toys.lora(toys.llama(tied=False), "q_proj", use_rslora=True, **LM),
        "words",
    ),
    "llama lora on words": (
        lambda: toys.lora(toys.llama(tied=False), "q_proj", "embed_tokens", **LM),
        "words",
    ),
    "llama lora, words and head saved": (
        lambda: toys.lora(
            toys.llama(tied=False),
            "q_proj",
            modules_to_save=["embed_tokens", "lm_head"],
            **LM,
        ),
        "words",
    ),
}
