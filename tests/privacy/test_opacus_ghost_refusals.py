"""What OpacusGhostEngine refuses, by name: at planning, by its layers, or in its first pass."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from intramural.core.errors import ConfigError, TrainingError, Unclippable
from intramural.core.federation import FederationConfig
from intramural.privacy.opacus_ghost import OpacusGhostEngine
from intramural.privacy.plan import PrivacyPlan
from tests.models.builders import base_of
from tests.models.test_rehearsal import RELATIVE, TARGETS, by, resident
from tests.privacy import toys
from tests.privacy.test_opacus_engine import Coupled, Functional, Unseen, linear_losses
from tests.privacy.test_opacus_ghost import TIED, make
from tests.privacy.test_opacus_models import REFUSED
from tests.privacy.zoo import MODELS, PEFT_ASKS, checkpoint

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings(PEFT_ASKS)


@pytest.mark.parametrize("name", REFUSED | TIED)
def test_what_ghost_clipping_cannot_follow_is_refused_by_name(name: str) -> None:
    with pytest.raises(Unclippable, match=(REFUSED | TIED)[name]):
        make(MODELS[name][0]())


class Twice(nn.Module):
    """Uses a layer twice in a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer twice."""
        out: Tensor = self.layer(self.layer(x))
        return out


def checkpointed() -> Any:
    model = toys.bert("SequenceClassification")
    checkpoint(model, reentrant=False)
    return model


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (partial(nn.Embedding, 5, 3, scale_grad_by_freq=True), "^weight .*the batch's words"),
        (partial(nn.Embedding, 5, 3, max_norm=1.0), "^weight .*max_norm"),
        (partial(nn.LayerNorm, 3, bias=False), "^weight .*without bias"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "^1 .BatchNorm1d. mixes the"),
        (checkpointed, "non-reentrant checkpointing"),
    ],
)
def test_layers_that_it_would_not_bound_are_refused_by_name(build: Any, words: str) -> None:
    with pytest.raises(Unclippable, match=words):
        make(build())


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (Functional, r"layer\.weight: rows of a batch reach one another, or Opacus misreads"),
        (Unseen, r"layer\.weight: Opacus finds no norm a row"),
        (Coupled, "rows of a batch reach one another"),
        (Twice, r"layer\.weight: used twice in a pass"),
    ],
)
def test_what_only_a_pass_shows_is_refused_in_the_first(build: Any, words: str) -> None:
    torch.manual_seed(0)
    model = build().train()
    with make(model) as engine:
        engine.open(range(3))
        with pytest.raises(Unclippable, match=words):
            engine.fold(model(torch.randn(3, 3)).square().sum(1))
        assert all(getattr(p, "summed_grad", None) is None for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_a_use_outside_its_layer_is_refused_in_parts_of_one_row_too() -> None:
    # which have nothing to compare the first row with, and would train unclipped
    torch.manual_seed(0)
    model = Functional().train()
    with torch.no_grad():
        model.layer.weight.copy_(0.1 * torch.eye(3))  # the unseen use weighs 10 times the seen
    with make(model) as engine:
        engine.open(range(1))
        losses = linear_losses(model, torch.randn(1, 3), [0])
        with pytest.raises(Unclippable, match=r"layer\.weight: its gradient is longer"):
            engine.fold(losses)


def test_less_than_float32_persons_and_other_wrong_use_are_refused() -> None:
    model, x = nn.Linear(3, 2).train(), torch.randn(2, 3)
    with make(model) as engine:
        engine.open(range(2))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = linear_losses(model, x, range(2))
        with pytest.raises(Unclippable, match=r"^weight: .*bfloat16; set training\.precision"):
            engine.fold(losses)
        with pytest.raises(TrainingError, match="none for a person's rows"):
            engine.open([0, 0])
        engine.open(range(2))
        with pytest.raises(TrainingError, match=r"expected 2 losses, one a row, got \(\)"):
            engine.fold(linear_losses(model, x, range(2)).mean())
    settings: dict[str, Any] = {"clip_norm": 1.0, "noise_multiplier": 1.0, "divisor": 1.0}
    other = torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=0.1)
    with pytest.raises(Unclippable, match="not in the optimizer"):
        OpacusGhostEngine(model, other, noise=toys.Zeros(), **settings)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"precision": "bfloat16"}}, "'bfloat16' rounds the sum of records"),
        ({"training": {"gradient_checkpointing": True}}, "privacy.engine = 'opacus-ghost'; set"),
        (
            {"privacy": {"unit": "person", "nominal_persons": 90, "records_per_person": 2}},
            "'opacus-ghost' has one norm a record, none for a person",
        ),
    ],
)
def test_planning_refuses_what_it_cannot_clip(
    bert: Path, changes: dict[str, Any], words: str
) -> None:
    whole = by("opacus-ghost", bert).to_json()
    assert PrivacyPlan.of(FederationConfig.model_validate(whole)).engine == "opacus-ghost"
    for table, keys in changes.items():
        whole[table] |= keys
    with pytest.raises((ConfigError, ValidationError), match=words):
        PrivacyPlan.of(FederationConfig.model_validate(whole))


@pytest.mark.parametrize("kind", RELATIVE)
def test_a_table_read_once_for_all_rows_is_refused_before_a_record_is_read(
    kind: str, bert: Path, tmp_path: Path
) -> None:
    base = base_of(kind, bert, tmp_path / "base")
    with pytest.raises(Unclippable, match=f"^{RELATIVE[kind]}[: ]"):
        resident(by("opacus-ghost", base))
    lora = {"kind": "lora", "target_modules": TARGETS[kind]}
    found = resident(by("opacus-ghost", base, exchange=lora))
    assert all("summed_grad" not in vars(p) for p in found.loaded.model.parameters())
