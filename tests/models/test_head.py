"""Exchange 'head': a frozen encoder runs once a text; the head learns as behind a whole model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from intramural.core.errors import ModelError
from intramural.models.classification import Classification
from intramural.models.tasks import pad_inputs
from intramural.models.training import train_round
from tests.models.builders import Bench, bench, chapters, folder_of, plan
from tests.tiny import LABELS, Json, federation

RECORDS = chapters(24)
BEHIND = ["pooler", "classifier"]


@pytest.fixture(autouse=True)
def _nothing_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what encoders said in other tests."""
    monkeypatch.setattr("intramural.models.resident._features", {})


def head(base: Path, *, model: Json | None = None, **exchange: Any) -> Bench:
    config = federation(base, exchange={"kind": "head"} | exchange, model=model or {})
    return bench(config, RECORDS)


def with_dropout(base: Path, folder: Path) -> Path:
    """Return a copy of the base model that drops half of its hidden states in training."""
    copy = folder_of(base, folder / "dropping")
    config = json.loads((copy / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def whole_logits(on: Bench, rows: range) -> Tensor:
    batch = pad_inputs(on.tokens, rows, filler=on.loaded.tokenizer.pad_token_id)
    logits: Tensor = on.model(**batch).logits
    return logits


def remembered_logits(on: Bench, rows: range) -> Tensor:
    assert isinstance(on.task, Classification)
    return on.task._logits(on.model, on.task.pad(on.tokens, rows))


def rows_encoded(on: Bench) -> list[int]:
    """Return a list that grows by a number of rows each time the encoder's layers run."""
    counts: list[int] = []
    on.model.base_model.embeddings.register_forward_hook(
        lambda _, __, output: counts.append(len(output))
    )
    return counts


@pytest.mark.parametrize("pooler", ["base", "identity"])
def test_logits_of_remembered_features_are_the_whole_models(bert: Path, pooler: str) -> None:
    on = head(bert, model={"pooler": pooler}, trained_modules=BEHIND)
    on.model.eval()
    rows = range(len(RECORDS))
    with torch.no_grad():
        for _ in range(2):  # computed, then remembered
            torch.testing.assert_close(
                remembered_logits(on, rows), whole_logits(on, rows), atol=1e-5, rtol=0
            )
            on.model.base_model.pooler.dense.weight.mul_(-2)  # learnt, behind what is remembered


def test_gradients_are_those_of_the_whole_forward(bert: Path) -> None:
    on = head(bert, trained_modules=BEHIND)
    on.model.train()
    rows = range(8)
    plain = Classification(on.loaded.tokenizer, LABELS, length_max=32)
    torch.autograd.backward(on.task.losses(on.model, on.task.pad(on.tokens, rows)).sum())
    remembered = on.gradient()
    torch.autograd.backward(plain.losses(on.model, plain.pad(on.tokens, rows)).sum())
    for ours, theirs in zip(remembered, on.gradient(), strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_the_encoder_runs_once_a_text(bert: Path) -> None:
    assert len({record.text for record in RECORDS}) == 24
    on = head(bert)
    counts = rows_encoded(on)
    on.task.pad(on.tokens, range(16))
    # the first four texts are compared whole once: 4 + 4 rows; then each text
    assert sum(counts) == 4 + 4 + 16
    on.task.pad(on.tokens, range(8, 24))
    assert sum(counts) == 4 + 4 + 24
    train_round(on.loaded, on.task, on.tokens, plan(on.config))
    on.task.pad(on.tokens, range(24))
    assert sum(counts) == 4 + 4 + 24


def test_features_are_float32_whoever_asks_first(bert: Path) -> None:
    first = head(bert)
    exact = first.task.pad(first.tokens, range(4))["features"]
    first.task._body._seen.clear()  # type: ignore[attr-defined]
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):  # an evaluation
        first.task.pad(first.tokens, range(4))
    assert torch.equal(first.task.pad(first.tokens, range(4))["features"], exact)
    losses = first.task.losses(first.model, first.task.pad(first.tokens, range(4)))
    torch.autograd.backward(losses.sum())  # what an evaluation remembered can be learnt from


def test_a_model_built_anew_on_the_same_base_asks_the_encoder_nothing(bert: Path) -> None:
    first = head(bert)
    first.task.pad(first.tokens, range(24))
    second = head(bert, trained_modules=BEHIND)
    counts = rows_encoded(second)
    second.task.pad(second.tokens, range(24))
    assert counts == []


def test_the_encoder_drops_nothing_in_training_and_the_head_does(
    bert: Path, tmp_path: Path
) -> None:
    on = head(with_dropout(bert, tmp_path))
    on.model.train()
    assert not any(m.training for m in on.model.base_model.modules())
    assert on.model.dropout.training
    batch = pad_inputs(on.tokens, range(4), filler=on.loaded.tokenizer.pad_token_id)
    states = [on.model.base_model(**batch).last_hidden_state for _ in range(2)]
    assert torch.equal(*states)
    features = on.task.pad(on.tokens, range(4))["features"]
    torch.testing.assert_close(features, states[0][:, 0], atol=1e-5, rtol=0)


def test_the_layout_holds_the_trained_modules_alone(bert: Path) -> None:
    own = ["classifier.weight", "classifier.bias"]
    assert [name for name, _ in head(bert).loaded.exchange.layout.entries] == own
    both = head(bert, trained_modules=BEHIND).loaded.exchange.layout
    assert [n for n, _ in both.entries] == [
        "bert.pooler.dense.weight", "bert.pooler.dense.bias", *own
    ]  # fmt: skip
    # 32 * 32 + 32 of the pooler, 4 * 32 + 4 of the head
    assert both.size == 1056 + 132


def test_a_model_whose_head_reads_other_tokens_is_refused(llama: Path) -> None:
    on = head(llama)
    with pytest.raises(ModelError, match=r"exchange\.kind = 'head' needs a model whose head reads"):
        on.task.pad(on.tokens, range(4))


def test_a_trained_module_inside_the_encoder_is_refused(bert: Path) -> None:
    # its changes would be in no remembered feature
    with pytest.raises(ModelError, match=r"encoder\.layer\.1\..* is in it; change"):
        head(bert, trained_modules=["layer.1", "classifier"])


def test_an_identity_pooler_hands_the_first_state_through_tanh(bert: Path) -> None:
    on = head(bert, model={"pooler": "identity"})
    states = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(on.model.base_model.pooler(states), torch.tanh(states[:, 0]))


def test_a_model_without_a_pooler_cannot_have_an_identity_there(llama: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.pooler: .* has no pooler; leave the key out"):
        head(llama, model={"pooler": "identity"})
