"""Norms and sums of records equal what the gradients written out give, in every mixture."""

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from intramural.core.errors import TrainingError, Unclippable
from intramural.privacy import records
from intramural.privacy.clipped_sums import add_clipped
from intramural.privacy.norms import unit_norms
from intramural.privacy.records import Recorder, Rows

torch.set_num_threads(1)

SIDE, ROWS = 20, 5
OWNERS = [list(range(ROWS)), [0, 0, 1, 2, 2], [0, 0, 0, 0, 0]]
Use = Callable[[Recorder, Parameter], Tensor]
"""Records one use of the weight; returns each row's gradient, written out."""


def product(*, input_first: bool, length: int) -> Use:
    def use(recorder: Recorder, weight: Parameter) -> Tensor:
        x, g = torch.randn(ROWS, length, SIDE), torch.randn(ROWS, length, SIDE)
        recorder.add_product(weight, x, g, input_first=input_first)
        left, right = (x, g) if input_first else (g, x)
        return torch.einsum("rsa,rsb->rab", left.double(), right.double())

    return use


def lookup(*, column: bool) -> Use:
    def use(recorder: Recorder, weight: Parameter) -> Tensor:
        ids, g = torch.randint(0, SIDE, (ROWS, 4)), torch.randn(ROWS, 4, SIDE)
        recorder.add_lookup(weight, ids, g, column=column)
        hot = torch.nn.functional.one_hot(ids, SIDE).double()
        written = torch.einsum("rsa,rsb->rab", hot, g.double())
        return written.transpose(1, 2) if column else written

    return use


def whole(recorder: Recorder, weight: Parameter) -> Tensor:
    g = torch.randn(ROWS, SIDE, SIDE)
    recorder.add_rows(weight, g.flatten(1))
    return g.double()


USES: dict[str, Use] = {
    "rows": whole,
    "long": product(input_first=False, length=9),
    "short": product(input_first=False, length=3),
    "conv1d": product(input_first=True, length=3),
    "table": lookup(column=False),
    "columns": lookup(column=True),
}
MIXTURES = [names for count in (1, 2, 3) for names in combinations(USES, count)]


@pytest.mark.parametrize("owners", OWNERS)
@pytest.mark.parametrize("share", [0, 1, 2])
@pytest.mark.parametrize("names", MIXTURES, ids="+".join)
def test_any_mixture_of_uses_is_exact(
    names: tuple[str, ...], share: int, owners: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "DENSE_SHARE", share)
    torch.manual_seed(0)
    weight, other = Parameter(torch.zeros(SIDE, SIDE)), Parameter(torch.zeros(7))
    recorder = Recorder({weight: "weight", other: "other"})
    recorder.open(owners)
    alone = torch.randn(ROWS, 7)
    recorder.add_rows(other, alone)
    written = torch.stack([USES[name](recorder, weight) for name in names]).sum(0)
    per_row = torch.cat([written.flatten(1), alone.double()], dim=1)
    units = torch.zeros(max(owners) + 1, per_row.shape[1], dtype=torch.float64)
    units.index_add_(0, torch.tensor(owners), per_row)
    done = recorder.take()
    assert done is not None
    norms, true = unit_norms(done), units.norm(dim=1)
    assert bool((norms > true * (1 - 3e-7)).all())  # never too small
    assert bool((norms <= true * (1 + 1e-5)).all())
    clip_norm = float(true.median())
    sums: dict[Parameter, Tensor] = {}
    add_clipped(done, sums, clip_norm=clip_norm)
    assert not done.records
    factors = (clip_norm * (1 - 1e-6) / norms).clamp(max=1.0)
    expected = (factors.unsqueeze(1) * units).sum(0)
    got = torch.cat([sums[weight].flatten(), sums[other]])
    assert float((got - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("gap", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("length", [16, 256])
def test_positions_that_cancel_do_not_escape_the_clip(
    length: int, gap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Half of the positions undo the other half but for `gap`. From 1e-3 on, float32 loses the
    # squared norm in its Gram matrix's rounding, even its sign; unclipped, units would be 1e5
    # times too long.
    monkeypatch.setattr(records, "DENSE_SHARE", 0)
    torch.manual_seed(0)
    weight = Parameter(torch.zeros(SIDE, 200))
    x = torch.randn(6, 1, 200).expand(6, length, 200)
    one = torch.randn(6, 1, SIDE)
    other = one + gap * torch.randn(6, 1, SIDE)
    half = length // 2
    g = torch.cat([one.expand(6, half, SIDE), -other.expand(6, half, SIDE)], dim=1)
    recorder = Recorder({weight: "weight"})
    for row in range(6):
        recorder.open([0])
        recorder.add_product(weight, x[row : row + 1], g[row : row + 1], input_first=False)
        done = recorder.take()
        assert done is not None
        sums: dict[Parameter, Tensor] = {}
        add_clipped(done, sums, clip_norm=1e-3)
        assert 0.9e-3 < float(sums[weight].double().norm()) <= 1e-3 * (1 + 1e-3)


def test_a_norm_from_gram_matrices_is_rounded_up_and_never_below_the_true_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(records, "DENSE_SHARE", 0)
    torch.manual_seed(0)
    units, length, out, into = 500, 8, 30, 200
    weight = Parameter(torch.zeros(out, into))
    x, g = torch.randn(units, length, into), torch.randn(units, length, out)
    recorder = Recorder({weight: "weight"})
    recorder.open(range(units))
    recorder.add_product(weight, x, g, input_first=False)
    done = recorder.take()
    assert done is not None
    assert done.records[weight].dense is None
    true = torch.einsum("rsa,rsb->rab", g.double(), x.double()).flatten(1).norm(dim=1)
    # float32 Gram matrices alone come out below it for about half of the units
    gram = torch.bmm(g, g.transpose(1, 2)) * torch.bmm(x, x.transpose(1, 2))
    assert 0.2 < float((gram.double().sum((1, 2)).sqrt() < true).double().mean()) < 0.8
    # positions do not cancel: the rounding, 2**-22 of their sizes, is within 2e-5 of the square
    sizes = (g.double().norm(dim=2) * x.double().norm(dim=2)).sum(1)
    assert float((sizes / true).square().max()) < 2e-5 * 2**22
    norms = unit_norms(done)
    assert bool((norms >= true).all())
    assert bool((norms <= true * (1 + 1e-5 + 1e-6)).all())  # too large by half of 2e-5 at most


def test_a_table_that_undoes_its_output_layer_does_not_escape_the_clip(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(records, "DENSE_SHARE", 0)
    torch.manual_seed(0)
    weight = Parameter(torch.zeros(500, SIDE))
    recorder = Recorder({weight: "weight"})
    recorder.open([0])
    ids, x = torch.arange(40).view(1, 40), torch.randn(1, 40, SIDE)
    out = torch.nn.functional.one_hot(ids, 500).float()
    recorder.add_product(weight, x, out, input_first=False)
    recorder.add_lookup(weight, ids, -x * (1 + 1e-4))
    done = recorder.take()
    assert done is not None
    sums: dict[Parameter, Tensor] = {}
    add_clipped(done, sums, clip_norm=1e-4)
    assert 0.9e-4 < float(sums[weight].double().norm()) <= 1e-4 * (1 + 1e-2)


def test_rows_of_units_are_laid_end_to_end() -> None:
    rows = Rows([0, 0, 1, 2, 2])
    table = torch.arange(10.0).view(5, 2, 1)
    pieces = {tuple(units.tolist()): piece for units, [piece] in rows.grouped(table)}
    assert pieces.keys() == {(1,), (0, 2)}
    assert pieces[1,].flatten().tolist() == [4, 5]
    assert pieces[0, 2][:, :, 0].tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]
    assert rows.unit_sums(table).flatten().tolist() == [2, 4, 4, 5, 14, 16]
    assert rows.spread(torch.tensor([5, 6, 7])).tolist() == [5, 5, 6, 7, 7]


def test_a_unit_a_row_is_not_copied() -> None:
    rows, table = Rows(range(4)), torch.zeros(4, 3, 2)
    [(_, [piece])] = rows.grouped(table)
    assert piece.data_ptr() == table.data_ptr()
    assert rows.unit_sums(table) is rows.spread(table) is table


def test_what_was_not_announced_is_refused() -> None:
    weight, stranger = Parameter(torch.zeros(2, 2)), Parameter(torch.zeros(2))
    recorder = Recorder({weight: "weight"})
    recorder.open(range(3))
    with pytest.raises(Unclippable, match="replaced after the engine was made"):
        recorder.add_rows(stranger, torch.zeros(3, 2))
    with pytest.raises(TrainingError, match="another forward pass than the last"):
        recorder.add_rows(weight, torch.zeros(2, 4))
    assert recorder.take() is None
