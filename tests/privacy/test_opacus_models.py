"""OpacusEngine equals the loop over units on every model it does not refuse by name."""

from functools import partial
from statistics import median
from typing import Any

import pytest
import torch

from intramural.core.errors import Unclippable
from intramural.privacy.opacus_engine import OpacusEngine
from tests.privacy import toys
from tests.privacy.naive import norms, opacus_sum, relative_error, unit_gradients
from tests.privacy.zoo import EXACT, MODELS, PEFT_ASKS, PEOPLE, checkpoint

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings(PEFT_ASKS)

RECORDS = [[row] for row in range(toys.ROWS)]
UNITS = pytest.mark.parametrize("units", [RECORDS, PEOPLE], ids=["records", "persons"])
REFUSED = {
    "bert words, tied": r"cls\.predictions\.bias .*layers inside",
    "bert ia3": r"key\.ia3_l\.default .*outside a forward pass of its own",
    "llama lora on words": r"embed_tokens\.lora_embedding_A\.default .*outside a forward pass",
}
"""Models that book-keeping clips and Opacus cannot, and what names the parameter."""
TAKEN = [name for name in MODELS if name not in REFUSED]


def engine_of(model: Any, *, clip_norm: float = 1.0) -> OpacusEngine:
    """Return an engine whose release is the clipped sum itself."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return OpacusEngine(
        model, optimizer, clip_norm=clip_norm, noise_multiplier=0.0, divisor=1.0, noise=toys.Zeros()
    )


def agree(
    name: str,
    units: list[list[int]],
    *,
    parts: tuple[int, ...] = (0,),
    prepare: Any = None,
    **options: Any,
) -> float:
    """Return the relative error of the clipped sum, where half of the units are clipped.

    Parts begin at the units of these places.
    """
    make, kind = MODELS[name]
    torch.manual_seed(0)
    model = make().train()
    losses = toys.losses_of(kind=kind, rows=sum(map(len, units)), **options)
    alone = unit_gradients(model, losses, units)
    clip_norm = median(norms(alone))
    if prepare is not None:
        prepare(model)
    with engine_of(model, clip_norm=clip_norm) as engine:
        for start, end in zip(parts, (*parts[1:], len(units)), strict=True):
            these = units[start:end]
            engine.open([number for number, rows in enumerate(these) for _ in rows])
            engine.fold(losses(model, [row for rows in these for row in rows]))
        engine.release()
        return relative_error(toys.gradients(model), opacus_sum(alone, clip_norm=clip_norm))


@pytest.mark.parametrize("name", TAKEN)
@UNITS
def test_the_clipped_sum_is_the_loops(name: str, units: list[list[int]]) -> None:
    assert agree(name, units) < EXACT
    assert agree(name, units, parts=(0, 1)) < EXACT


@pytest.mark.parametrize("name", REFUSED)
def test_what_opacus_cannot_follow_is_refused_by_name(name: str) -> None:
    make, _ = MODELS[name]
    with pytest.raises(Unclippable, match=REFUSED[name]):
        engine_of(make())


@pytest.mark.parametrize("name", [name for name in TAKEN if "prefix" not in name])
def test_checkpoints_change_nothing_or_are_refused(name: str) -> None:
    assert agree(name, PEOPLE, prepare=partial(checkpoint, reentrant=True)) < EXACT
    make, _ = MODELS[name]
    model = make()
    checkpoint(model, reentrant=False)
    with pytest.raises(Unclippable, match="non-reentrant checkpointing"):
        engine_of(model)


@pytest.mark.parametrize("name", TAKEN)
def test_bfloat16_autocast_agrees_to_its_own_precision(name: str) -> None:
    def around() -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    assert agree(name, RECORDS, around=around) < 8e-3  # a bfloat16 has 8 bits: 2^-7
