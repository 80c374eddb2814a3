"""Loading: what is refused, and what is left for transformers and PEFT to load."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from intramural.core.errors import ModelError
from intramural.core.federation import FederationConfig
from intramural.models import loading as under_test
from intramural.models.base import resolve_base
from intramural.models.loading import pick_device
from intramural.models.resident import Resident, resident_model, save_model
from tests.models.builders import Bench, bench, chapters, plan, titles
from tests.tiny import LABELS, federation, generation

PEFT_WARNS = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
"""PEFT uses a name that transformers 5.23 calls old; `models/loading.py` silences it for us."""


@pytest.mark.parametrize("key", ["target_modules", "trained_modules"])
def test_an_adapter_that_matches_nothing_names_the_linear_layers(bert: Path, key: str) -> None:
    config = federation(bert, exchange={key: ["query", "q_proj"]})
    with pytest.raises(ModelError) as caught:
        bench(config, chapters(1))
    message = str(caught.value)
    assert "ends with ['q_proj']" in message
    assert "its linear layers are ['classifier', 'dense', 'key', 'query', 'value']" in message


def test_batch_normalisation_is_refused_by_name(llama: Path) -> None:
    # no text model of transformers that is small enough has such a layer: one is added
    build = under_test._load_base

    def with_batch_norm(*arguments: Any) -> Any:
        made, tokenizer, invented = build(*arguments)
        made.norm_between = torch.nn.BatchNorm1d(4)
        return made, tokenizer, invented

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(under_test, "_load_base", with_batch_norm)
        with pytest.raises(ModelError, match="has batch normalisation; use another base"):
            bench(generation(llama), titles(1))


def test_a_device_that_is_not_here_is_refused() -> None:
    if torch.backends.mps.is_available():
        pytest.skip("this machine has MPS")
    with pytest.raises(ModelError, match="'mps' is not on this machine; use 'auto' or 'cpu'"):
        pick_device("mps")
    assert pick_device("cpu").type == "cpu"


def test_the_model_is_built_once_and_anew_when_asked(bert: Path) -> None:
    config = federation(bert)
    first = resident_model(config, places={}, device="cpu", fresh=True)
    start = first.loaded.exchange.read()
    first.loaded.exchange.write(start + 1)
    assert resident_model(config, places={}, device="cpu") is first
    longer = federation(bert, federation={"rounds": 9})
    assert resident_model(longer, places={}, device="cpu") is first
    fresh = resident_model(config, places={}, device="cpu", fresh=True)
    assert fresh is not first
    assert fresh.loaded.exchange.read().tobytes() == start.tobytes()
    # a coordinator asks for 'auto', its simulated sites for what site.toml says
    assert resident_model(config, places={}, device=str(pick_device("auto"))) is (
        resident_model(config, places={}, device="auto")
    )


def resident(config: FederationConfig, on: Bench) -> Resident:
    return Resident(
        base=resolve_base(config.model.base), loaded=on.loaded, task=on.task, tokens_key=""
    )


def shaken(on: Bench) -> None:
    """Move all travelling parameters away from where they start."""
    vector = on.loaded.exchange.read()
    noise = np.random.default_rng(0).normal(scale=0.1, size=vector.size)
    on.loaded.exchange.write(vector + noise.astype(np.float32))
    on.model.eval()


@PEFT_WARNS
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_saved_classifier_loads_with_transformers_and_peft_alone(
    tmp_path: Path, bert: Path, kind: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    config = federation(bert, exchange={"kind": kind})
    on = bench(config, chapters(4))
    shaken(on)
    save_model(resident(config, on), tmp_path)
    assert list(tmp_path.glob("*.bin")) == []
    if kind == "full":
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert model.config.id2label == dict(enumerate(LABELS))
    else:
        base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=4)
        model = PeftModel.from_pretrained(base, tmp_path)
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    inputs = tokenizer([c.text for c in chapters(4)], padding=True, return_tensors="pt")
    batch = on.task.pad(on.tokens, [0, 1, 2, 3])
    torch.testing.assert_close(inputs["input_ids"], batch["input_ids"])
    names = ("input_ids", "attention_mask")
    with torch.no_grad():
        theirs = model(**{name: inputs[name] for name in names}).logits
        ours = on.model(**{name: batch[name] for name in names}).logits
    assert theirs.std() > 0.01
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)


@PEFT_WARNS
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_saved_language_model_loads_with_transformers_and_peft_alone(
    tmp_path: Path, llama: Path, kind: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = generation(llama, exchange={"kind": kind})
    on = bench(config, titles(4))
    shaken(on)
    save_model(resident(config, on), tmp_path)
    if kind == "full":
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    else:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path)
    model.eval()
    batch = on.task.pad(on.tokens, [0, 1, 2, 3])
    names = ("input_ids", "attention_mask")
    with torch.no_grad():
        theirs = model(**{name: batch[name] for name in names}).logits
        ours = on.model(**{name: batch[name] for name in names}).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)


def test_a_round_s_plan_takes_what_the_federation_says(bert: Path) -> None:
    made = plan(federation(bert, federation={"rounds": 5}), round=3, micro_batch=2)
    assert (made.round, made.rounds, made.seed, made.site, made.micro_batch) == (3, 5, 7, "a", 2)
