"""NormBound: a longer update is cut to the bound, a shorter one is untouched."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intramural.core.errors import AggregationError
from intramural.core.layout import Vector
from intramural.core.messages import Update
from intramural.strategies.fedavg import FedAvg
from intramural.strategies.norm_bound import NormBound
from intramural.strategies.robust import Robust
from intramural.strategies.robust_coordinate import Median
from intramural.strategies.rule import Fold, State
from tests.strategies.updates import run_round, update


class Seen(FedAvg):
    """Keeps what it is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.updates: list[Update] = []

    def add(self, fold: Fold, update: Update) -> None:
        self.updates.append(update)
        super().add(fold, update)


def after(delta: Vector, bound: float) -> Vector:
    inner = Seen()
    rule = NormBound(inner, bound)
    rule.add(rule.begin({}, np.zeros(delta.size, np.float32), round=1), update(delta, weight=3))
    (got,) = inner.updates
    assert (got.site, got.weight) == ("a", 3)
    return got.delta


@given(seed=st.integers(0, 2**32), exponent=st.integers(-10, 12), bound=st.floats(1e-3, 1e3))
def test_no_update_is_longer_than_the_bound(seed: int, exponent: int, bound: float) -> None:
    delta = np.random.default_rng(seed).standard_normal(50).astype(np.float32)
    delta *= np.float32(10.0**exponent)
    before, got = np.linalg.norm(delta.astype(float)), after(delta, bound).astype(float)
    assert np.linalg.norm(got) <= bound
    if before <= bound:
        assert got.tolist() == delta.tolist()
    else:
        assert np.linalg.norm(got) >= bound * (1 - 1e-6)
        assert got @ delta.astype(float) >= (1 - 1e-6) * np.linalg.norm(got) * before


def test_the_update_that_came_is_not_changed() -> None:
    delta = np.array([6, 8], np.float32)
    after(delta, 1.0)
    assert delta.tolist() == [6, 8]


def test_the_mean_moves_by_no_more_than_the_bound() -> None:
    # Two honest sites at 1, one hostile at 1e6 cut to 2: (1 + 1 + 2) / 3.
    updates = [update([1], site="a"), update([1e6], site="b"), update([1], site="c")]
    got, _ = run_round(NormBound(FedAvg(), 2.0), {}, np.zeros(1, np.float32), updates)
    assert got[0] == pytest.approx(4 / 3, rel=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    rule = NormBound(FedAvg(), 1.0)
    fold = rule.begin({}, np.zeros(1, np.float32), round=1)
    with pytest.raises(AggregationError, match="not finite"):
        rule.add(fold, update([bad]))
    assert fold.sites == []


def test_it_sees_single_updates_and_keeps_the_rules_other_traits() -> None:
    assert FedAvg.traits.sums_only
    bounded = NormBound(FedAvg(), 1.0)
    assert not bounded.traits.sums_only
    assert bounded.traits.asynchronous
    median = NormBound(Robust("median", Median(), hostile_max=1), 1.0)
    assert median.traits == Robust.traits


def test_the_rules_memory_passes_through() -> None:
    rule = NormBound(FedAvg(momentum=0.5), 1.0)
    state: State = {"velocity": np.array([1.0], np.float32)}
    # 0.5 * 1 + 0.25
    _, state = run_round(rule, state, np.zeros(1, np.float32), [update([0.25])])
    assert state["velocity"].tolist() == [0.75]
