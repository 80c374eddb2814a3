"""Random models of two layers, batches with padding, and one call that runs the engine."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import numpy as np
import peft
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from intramural.privacy import clipped_sums
from intramural.privacy.bookkeeping import BookkeepingEngine
from intramural.privacy.norms import unit_norms
from intramural.privacy.records import Pass
from tests.privacy.naive import Losses

ROWS, LENGTH, WORDS, LABELS = 6, 12, 97, 3
IGNORED = -100
SIZES = {"vocab_size": WORDS, "num_labels": LABELS, "pad_token_id": 0}


class Zeros:
    """A noise source for exact comparisons; it counts its draws."""

    def __init__(self) -> None:
        self.draws: list[int] = []

    def normal(self, size: int, *, std: float) -> NDArray[np.float32]:
        self.draws.append(size)
        return np.zeros(size, dtype=np.float32)


class Ones:
    """Noise of one standard deviation everywhere; it counts its draws."""

    def __init__(self) -> None:
        self.draws: list[int] = []

    def normal(self, size: int, *, std: float) -> NDArray[np.float32]:
        self.draws.append(size)
        return np.full(size, std, dtype=np.float32)


def bert(head: str, **more: Any) -> Any:
    """Return a BERT with a head: SequenceClassification, TokenClassification or MaskedLM."""
    config = transformers.BertConfig(
        **SIZES,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **more,
    )
    return getattr(transformers, f"BertFor{head}")(config)


def gpt2(*, tied: bool) -> Any:
    """Return a GPT-2 language model."""
    config = transformers.GPT2Config(
        **SIZES,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=1,
    )
    return transformers.GPT2LMHeadModel(config)


def llama(*, tied: bool) -> Any:
    """Return a Llama language model with grouped queries."""
    config = transformers.LlamaConfig(
        **SIZES,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def adapt(model: Any, config: Any) -> Any:
    """Return the model under PEFT, with LoRA's B away from zero."""
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    return adapted


def lora(model: Any, *targets: str, **more: Any) -> Any:
    """Return the model with LoRA of rank 4 on the target layers."""
    wanted = targets[0] if targets == ("all-linear",) else list(targets)
    return adapt(model, peft.LoraConfig(r=4, target_modules=wanted, lora_dropout=0.0, **more))


def losses_of(
    *,
    rows: int = ROWS,
    length: int = LENGTH,
    kind: str = "words",
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Losses:
    """Return the losses of random rows, every second one padded, by the kind of their targets.

    A row's loss is the mean over its own tokens: of its label, or of its next words.
    """
    chance = torch.Generator().manual_seed(7)
    ids = torch.randint(3, WORDS, (rows, length), generator=chance)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[1::2, length - 3 :] = 0
    ids[mask == 0] = 0
    if kind == "label":
        targets = torch.randint(0, LABELS, (rows,), generator=chance)
    elif kind == "labels":
        targets = torch.randint(0, LABELS, (rows, length), generator=chance)
    else:
        targets = ids.roll(-1, dims=1)
        targets[:, -1] = 0
    if kind != "label":
        targets[mask == 0] = IGNORED

    def losses(model: nn.Module, which: Sequence[int]) -> Tensor:
        chosen = list(which)
        with around():
            logits = model(input_ids=ids[chosen], attention_mask=mask[chosen]).logits.float()
        wanted = targets[chosen]
        if wanted.ndim == 1:
            return functional.cross_entropy(logits, wanted, reduction="none")
        each = functional.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), reduction="none", ignore_index=IGNORED
        ).view(wanted.shape)
        return each.sum(1) / (wanted != IGNORED).sum(1)

    return losses


def make_engine(model: nn.Module, *, clip_norm: float, **more: Any) -> BookkeepingEngine:
    """Return an engine whose release is the clipped sum itself."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    settings: dict[str, Any] = {"noise_multiplier": 0.0, "divisor": 1.0, "noise": Zeros()}
    return BookkeepingEngine(model, optimizer, clip_norm=clip_norm, **{**settings, **more})


def engine_sum(
    model: nn.Module,
    losses: Losses,
    units: Sequence[Sequence[int]],
    *,
    clip_norm: float,
    part: int | None = None,
) -> dict[str, Tensor]:
    """Return the engine's clipped sum over the units, in parts of so many units."""
    engine = make_engine(model, clip_norm=clip_norm)
    with engine:
        for start in range(0, len(units), part or len(units)):
            these = units[start : start + (part or len(units))]
            engine.open([number for number, rows in enumerate(these) for _ in rows])
            engine.fold(losses(model, [row for rows in these for row in rows]))
        engine.release()
    return gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of what is in `.grad`."""
    named = model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.requires_grad and p.grad is not None}


@contextmanager
def norms_noted() -> Iterator[list[float]]:
    """Note the norm of each unit as the book-keeping engine takes it, in the order of passes."""
    noted: list[float] = []

    def noting(done: Pass) -> Tensor:
        found = unit_norms(done)
        noted.extend(found.tolist())
        return found

    with patch.object(clipped_sums, "unit_norms", noting):
        yield noted
