"""The book-keeping engine equals the per-record loop, model by model."""

import pytest
import torch

from intramural.privacy import records
from tests.privacy.zoo import EXACT, MODELS, PEFT_ASKS, ROUNDED, agree

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
    assert agree(make, kind) < ROUNDED


@pytest.mark.parametrize("name", ["bert words, tied", "bert lora", "gpt2, tied", "llama"])
@pytest.mark.parametrize("part", [1, 8])
def test_parts_of_a_batch_add_up(name: str, part: int) -> None:
    make, kind = MODELS[name]
    units = [[row] for row in range(32)]
    assert agree(make, kind, units=units, part=part) < EXACT
    assert agree(make, kind, units=units) < EXACT
