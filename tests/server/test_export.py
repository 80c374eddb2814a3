"""Export: what lies in the model's folder says what the federation's model says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from intramural.core.federation import FederationConfig
from intramural.core.layout import Vector
from intramural.core.route import RESIDUAL
from intramural.models.resident import resident_model
from intramural.server.export import beginning, save_final
from tests.models.builders import chapters
from tests.tiny import federation


def logits_of(model: Any, config: FederationConfig) -> Tensor:
    task = resident_model(config, places={}, device="auto").task
    tokens = task.tokenise(chapters(4))
    batch = task.pad(tokens, range(4))
    model.eval()
    with torch.no_grad():
        found: Tensor = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits
    return found


def said(config: FederationConfig, vector: Vector) -> Tensor:
    """Return the federation's model's logits of four records."""
    resident = resident_model(config, places={}, device="auto")
    resident.loaded.exchange.write(vector)
    return logits_of(resident.loaded.model, config)


@pytest.mark.parametrize("rule", ["flora", "fedex-lora"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_model_whose_base_weights_moved_is_saved_whole(
    bert: Path, tmp_path: Path, rule: str
) -> None:
    from transformers import AutoModelForSequenceClassification

    config = federation(bert, strategy={"rule": rule})
    layout = beginning(config, {}).layout
    vector = np.random.default_rng(0).normal(0, 0.3, layout.size).astype(np.float32)
    expected = said(config, vector)
    plain = vector.copy()
    for slot in layout.slots():
        if slot.name.startswith(RESIDUAL):
            plain[slot.start : slot.stop] = 0
    assert (said(config, plain) - expected).abs().max() > 0.01  # residuals count
    save_final(config, {}, vector, tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits_of(model, config), expected, rtol=0, atol=1e-5)
    assert "whole model" in (tmp_path / "model" / "README.md").read_text()
    assert not (tmp_path / "model" / "adapter_config.json").exists()
    torch.testing.assert_close(said(config, vector), expected)  # and the process goes on


def test_what_stays_at_the_sites_is_not_in_the_model_s_folder(bert: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    config = federation(bert, strategy={"rule": "fedsa-lora"})
    vector = np.array(beginning(config, {}).vector)
    exchange = resident_model(config, places={}, device="auto").loaded.exchange
    mark = np.full(exchange.own_layout.size, 7.0, dtype=np.float32)
    exchange.write(vector, mark)  # as a site of a simulation leaves the shared model
    save_final(config, {}, vector, tmp_path / "model")
    saved = load_file(tmp_path / "model" / "adapter_model.safetensors")
    factors = [values for name, values in saved.items() if "lora_B" in name]
    assert len(factors) == 4
    assert not any(values.any() for values in factors)
    assert "stay at each site" in (tmp_path / "model" / "README.md").read_text()
