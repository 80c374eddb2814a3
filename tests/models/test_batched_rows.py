"""All clients' rows in one plain pass: where a model allows it, and no further."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from intramural.models import batched, batched_losses, batched_rows
from intramural.models.batched import train_jobs
from intramural.models.batched_fit import fit_of
from tests.models.batched_builders import (
    LENGTH,
    WORDS,
    Bag,
    Mlp,
    by_hand,
    clients,
    start_of,
)
from tests.models.test_batched import alone, assert_equal, config_of, jobs_of
from tests.tiny import LABELS


class Sorting(nn.Module):
    """Runs its layers on the rows in the order of their lengths, the longest first."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(1, 8)
        self.top = nn.Linear(8, len(LABELS))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        lengths = attention_mask.sum(-1, keepdim=True)
        means = (input_ids * attention_mask).sum(-1, keepdim=True) / lengths / WORDS
        order = lengths.squeeze(-1).argsort(descending=True, stable=True)
        logits = self.top(torch.tanh(self.hidden(means[order])))
        return SimpleNamespace(logits=logits[order.argsort()])


class Turning(Mlp):
    """Runs its layers on the rows in another order."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        logits = super().forward(input_ids.flip(0), attention_mask).logits
        return SimpleNamespace(logits=logits.flip(0))


class Overwriting(Mlp):
    """Writes over what its last layer says; nothing that the rows are changes that."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        logits = super().forward(input_ids, attention_mask).logits
        return SimpleNamespace(logits=logits.mul_(1.0))


class OverwritingFirst(Mlp):
    """Writes over what its first layer says, which no gradient has reached."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.top(self.hidden(input_ids.float() / WORDS).tanh_()))


class Deep(Mlp):
    """Has layers of rows of positions, one without a bias, and one that does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(2, 3)
        self.narrow = nn.Linear(3, 2, bias=False)
        self.idle = nn.Linear(2, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        pairs = (input_ids.float() / WORDS).view(*input_ids.shape[:-1], LENGTH // 2, 2)
        pairs = self.narrow(torch.tanh(self.wide(pairs)))
        return SimpleNamespace(logits=self.top(torch.tanh(self.hidden(pairs.flatten(-2)))))


@pytest.mark.parametrize("keeps_factors", [True, False])
@pytest.mark.parametrize(
    ("model", "in_rows"),
    [
        (Mlp, True),
        (Deep, True),
        (Sorting, False),
        (Turning, False),
        (Overwriting, False),
        (OverwritingFirst, False),
        (Bag, False),
    ],
)
def test_rows_share_a_pass_where_that_changes_nothing(
    bert: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: type[nn.Module],
    in_rows: bool,
    keeps_factors: bool,
) -> None:
    loaded, task = by_hand(model())
    config = config_of(bert, local_steps=3, optimizer="sgd")
    fit_of(loaded, task, config.training, length=LENGTH)  # which tries it
    passes: list[int] = []
    row_factors = batched_rows.row_factors

    def noted(*arguments: Any, **more: Any) -> Any:
        passes.append(1)
        return row_factors(*arguments, **more)

    monkeypatch.setattr(batched_losses, "row_factors", noted)
    if model is not Bag:
        monkeypatch.setattr(batched, "pays", lambda *_, **__: keeps_factors)
    kind = "bag" if model is Sorting else "mlp"  # of different lengths
    jobs = jobs_of(config, clients(kind, task, [4, 4, 4]))
    start = start_of(loaded)
    for got, job in zip(train_jobs(loaded, task, jobs, start), jobs, strict=True):
        assert_equal(got, alone(loaded, task, job, start))
    # a stack's clients share their parameters in the first step alone
    assert len(passes) == (0 if not in_rows else 3 if keeps_factors else 1)
