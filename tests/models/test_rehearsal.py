"""A private pass over public sentences refuses what only a pass shows, and leaves no trace."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from intramural.core.errors import ModelError, Unclippable
from intramural.core.federation import FederationConfig
from intramural.models.loading import Loaded
from intramural.models.rehearsal import rehearse
from intramural.models.resident import Resident, resident_model
from intramural.models.tasks import Batch
from tests.models.builders import base_of
from tests.models.test_padding import federation
from tests.tiny import LABELS

RELATIVE = {
    "deberta, relative": r"deberta\.encoder\.layer\.0\.attention\.self\.pos_key_proj\.weight",
    "mpnet": r"mpnet\.encoder\.relative_attention_bias\.weight",
}
"""What reads relative positions, one table for all rows: no look at the layers shows that."""
TARGETS = {"deberta, relative": ["query_proj"], "mpnet": ["q"]}
ENGINE = pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])


def by(engine: str, base: Path, **sections: Any) -> FederationConfig:
    """Return a federation under [privacy] with this engine."""
    privacy = {
        "unit": "record",
        "noise_multiplier": 1.0,
        "delta": 1e-4,
        "clip_norm": 1.0,
        "nominal_records": 100,
        "engine": engine,
    }
    return federation(base, privacy=privacy, **sections)


def resident(config: FederationConfig, *, fresh: bool = True) -> Resident:
    return resident_model(config, places={}, device="cpu", fresh=fresh)


@ENGINE
@pytest.mark.parametrize("kind", RELATIVE)
def test_a_table_of_relative_positions_is_refused_by_name_where_it_is_trained(
    kind: str, engine: str, bert: Path, tmp_path: Path
) -> None:
    base = base_of(kind, bert, tmp_path / "base")
    resident(federation(base, private=False))
    with pytest.raises(Unclippable, match=f"^{RELATIVE[kind]}[: ]"):
        resident(by(engine, base))
    resident(by(engine, base, exchange={"kind": "lora", "target_modules": TARGETS[kind]}))


def test_an_engine_that_takes_a_model_does_not_speak_for_the_other(bert: Path) -> None:
    sections: dict[str, Any] = {
        "exchange": {"kind": "lora", "rank": 2},
        "training": {"learning_rate": 0.1, "local_steps": 1, "gradient_checkpointing": True},
    }
    mine = resident(by("bookkeeping", bert, **sections), fresh=False)
    assert resident(by("bookkeeping", bert, **sections), fresh=False) is mine
    with pytest.raises(Unclippable, match="Opacus cannot follow non-reentrant checkpointing"):
        resident(by("opacus", bert, **sections), fresh=False)


@ENGINE
@pytest.mark.parametrize("task", ["classification", "generation"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_the_engines_clip_is_left_as_it_was(
    request: pytest.FixtureRequest, engine: str, task: str, precision: str
) -> None:
    base = request.getfixturevalue("bert" if task == "classification" else "llama")
    sections: dict[str, Any] = {
        "training": {"learning_rate": 0.1, "local_steps": 1, "precision": precision}
    }
    if task == "generation":
        sections["task"] = {"kind": "generation"}
    config = by(engine, base, **sections)
    found = resident(config)
    first = next(found.loaded.model.modules())
    first.training = True  # whatever it is, it stays
    given = torch.ones_like(next(iter(found.loaded.exchange.parameters.values())))
    next(iter(found.loaded.exchange.parameters.values())).grad = given
    before = state_of(found.loaded)
    rehearse(found.loaded, found.task, config)
    after = state_of(found.loaded)
    assert before.keys() == after.keys()
    assert all(equal(before[name], after[name]) for name in before)
    assert next(iter(found.loaded.exchange.parameters.values())).grad is given


def state_of(loaded: Loaded) -> dict[str, Any]:
    """Return what a pass could leave behind: values, gradients, modes, attributes, chance."""
    found: dict[str, Any] = {"chance": torch.get_rng_state()}
    for name, parameter in loaded.model.named_parameters():
        grad = parameter.grad
        found[f"{name} value"] = parameter.detach().clone()
        found[f"{name} grad"] = None if grad is None else grad.clone()
        found[f"{name} attributes"] = sorted(vars(parameter))
    for name, layer in loaded.model.named_modules():
        found[f"{name} layer"] = (layer.training, sorted(vars(layer)))
        found[f"{name} hooks"] = (len(layer._forward_hooks), len(layer._forward_pre_hooks))
    return found


def equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


class Bent:
    """A task whose losses are bent; the rest is the task's own."""

    def __init__(self, task: Any, bend: Callable[[Tensor], Tensor]) -> None:
        self._task, self._bend = task, bend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def losses(self, model: Any, batch: Batch) -> Tensor:
        return self._bend(self._task.losses(model, batch))


def failing(losses: Tensor) -> Tensor:
    raise RuntimeError("stack expects each tensor to be equal size")


@pytest.mark.parametrize(
    ("bend", "error", "message"),
    [
        (lambda losses: losses - losses.mean(), Unclippable, "row.* depends on other rows"),
        (failing, ModelError, r"^Bert\w+ fails in a private pass of two sentences .RuntimeError."),
    ],
    ids=["coupled", "failing"],
)
def test_losses_that_mix_rows_and_passes_that_fail_are_refused(
    bert: Path, bend: Any, error: type[Exception], message: str
) -> None:
    config = by("bookkeeping", bert, task={"kind": "classification", "labels": list(LABELS)})
    found = resident(config)
    task: Any = Bent(found.task, bend)
    before = state_of(found.loaded)
    with pytest.raises(error, match=message):
        rehearse(found.loaded, task, config)
    after = state_of(found.loaded)
    assert all(equal(before[name], after[name]) for name in before)
