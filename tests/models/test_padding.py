"""Models that heed no attention mask let a long record move the others: refused under [privacy]."""

from pathlib import Path
from typing import Any

import pytest
import torch

from intramural.core.config import check_config
from intramural.core.errors import ModelError, Unclippable
from intramural.core.federation import FederationConfig
from intramural.models.loading import Loaded
from intramural.models.padding import check_padding
from intramural.models.resident import resident_model
from tests.models.builders import base_of


def federation(base: Path, *, private: bool = True, **sections: Any) -> FederationConfig:
    table: dict[str, Any] = {
        "federation": {"name": "padded", "rounds": 1},
        "model": {"base": str(base), "max_length": 48},
        "task": {"kind": "classification", "labels": ["a", "b", "c"]},
        "exchange": {"kind": "full"},
        "training": {"learning_rate": 0.1, "local_steps": 1, "batch_size": 4},
        "sites": {"min": 1},
    }
    if private:
        table["privacy"] = {
            "unit": "record",
            "noise_multiplier": 1.0,
            "delta": 1e-4,
            "clip_norm": 1.0,
            "nominal_records": 100,
        }
        table["strategy"] = {"weights": "equal"}
    return check_config(table | sections, FederationConfig, source="test")


def loaded(config: FederationConfig) -> Loaded:
    return resident_model(config, places={}, device="cpu", fresh=True).loaded


@pytest.mark.parametrize("kind", ["fnet", "convbert"])
def test_a_model_that_padding_moves_is_refused_under_privacy_alone(
    kind: str, bert: Path, tmp_path: Path
) -> None:
    base = base_of(kind, bert, tmp_path / "base")
    assert loaded(federation(base, private=False)).model is not None
    with pytest.raises(Unclippable, match="of padding change what it says of a record, by"):
        loaded(federation(base))


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta"])
def test_a_model_that_heeds_its_mask_is_not(kind: str, bert: Path, tmp_path: Path) -> None:
    found = loaded(federation(base_of(kind, bert, tmp_path / "base")))
    assert not found.model.training  # as it was


def test_a_head_of_zeros_neither_hides_a_fault_nor_makes_one(bert: Path, tmp_path: Path) -> None:
    check_padding(headless(federation(bert, private=False)), length_max=48)
    base = base_of("fnet", bert, tmp_path / "base")
    with pytest.raises(Unclippable):
        check_padding(headless(federation(base, private=False)), length_max=48)


def headless(config: FederationConfig) -> Loaded:
    found = loaded(config)
    torch.nn.init.zeros_(found.model.classifier.weight)
    torch.nn.init.zeros_(found.model.classifier.bias)
    return found


def test_more_tokens_than_the_model_has_positions_for_are_a_mistake_of_configuration(
    bert: Path,
) -> None:
    with pytest.raises(ModelError, match=r"model\.max_length = 128: .* lower it"):
        loaded(federation(bert, model={"base": str(bert), "max_length": 128}))


def test_a_causal_model_is_not(llama: Path) -> None:
    task = {"kind": "generation"}
    loaded(federation(llama, task=task))


def test_a_model_that_a_run_without_privacy_left_is_checked_all_the_same(
    bert: Path, tmp_path: Path
) -> None:
    base = base_of("fnet", bert, tmp_path / "base")
    resident_model(federation(base, private=False), places={}, device="cpu")
    with pytest.raises(Unclippable):
        resident_model(federation(base), places={}, device="cpu")


def test_the_mode_and_the_random_state_stay_as_they_are(bert: Path) -> None:
    found = loaded(federation(bert, private=False))
    found.model.train()
    state = torch.get_rng_state()
    check_padding(found, length_max=48)
    assert found.model.training
    assert torch.equal(torch.get_rng_state(), state)
