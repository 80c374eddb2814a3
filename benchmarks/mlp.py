"""A small perceptron as a transformers model, so that the real agent can train it in a benchmark.

Its input is a row of `WORDS` token ids, read as numbers in [-1, 1): 50,826 parameters with ten
labels, the size of the models that federated benchmarks simulate by the thousand.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import SequenceClassifierOutput

WORDS = 64
VOCABULARY = 256


class MlpConfig(PretrainedConfig):  # type: ignore[misc]
    """Nothing but the name; labels come from the federation."""

    model_type = "benchmark-mlp"


class MlpForSequenceClassification(PreTrainedModel):  # type: ignore[misc]
    """Linear 64-256, 256-128, 128-labels, with ReLU between."""

    config_class = MlpConfig
    base_model_prefix = "net"

    def __init__(self, config: MlpConfig) -> None:
        super().__init__(config)
        self.net = nn.Sequential(
            nn.Linear(WORDS, 256),
            nn.ReLU(),
            nn.Linear(256, 128),
            nn.ReLU(),
            nn.Linear(128, config.num_labels),
        )
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Return logits of shape (batch, labels)."""
        del attention_mask
        features = input_ids.float() * (2 / VOCABULARY) - 1
        return SequenceClassifierOutput(logits=self.net(features))


def register() -> None:
    """Tell transformers of the model; it is then a base like any other."""
    AutoConfig.register(MlpConfig.model_type, MlpConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(
        MlpConfig, MlpForSequenceClassification, exist_ok=True
    )


def write_base(folder: Path, *, labels: int) -> Path:
    """Write a base model's folder: weights, configuration, and a tokenizer of numbered words."""
    register()
    torch.manual_seed(0)
    model = MlpForSequenceClassification(MlpConfig(num_labels=labels))
    model.save_pretrained(folder)
    words = {f"w{number}": number for number in range(VOCABULARY)} | {"[PAD]": VOCABULARY}
    raw = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]").save_pretrained(folder)
    return folder
