"""Where the unit is a person, the book-keeping engine equals the per-person loop."""

import pytest
import torch

from intramural.privacy import records
from tests.privacy.zoo import EXACT, MODELS, PEFT_ASKS, PEOPLE, assert_rounded_up, compare

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings(PEFT_ASKS)


@pytest.mark.parametrize("share", [0, 2])
@pytest.mark.parametrize("name", MODELS)
def test_a_persons_rows_are_clipped_as_one(
    name: str, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, kind = MODELS[name]
    monkeypatch.setattr(records, "DENSE_SHARE", share)
    found = compare(make, kind, units=PEOPLE)
    if share:
        assert found.error < EXACT
    else:
        assert_rounded_up(found)
