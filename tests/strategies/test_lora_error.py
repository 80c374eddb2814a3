"""The aggregation error that a round's record tells: by whose weights, and when there is none."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from intramural.core.messages import Update
from intramural.strategies import lora_error
from intramural.strategies.lora_error import AggregationErrorMeter
from tests.reference.lora_products import mean_change, relative_error
from tests.strategies.lora_rounds import SCALE, Bench


def told(bench: Bench, *, round_: int = 2, late: int = 0) -> tuple[float, float]:
    """Return a round's error by the meter, and by the second implementation with equal weights."""
    current, _ = bench.round({}, bench.start(), bench.updates(3))
    updates = bench.updates(4, round_=round_)
    updates[0] = replace(updates[0], round=round_ - late)
    meter = AggregationErrorMeter(bench.config, bench.layout)
    meter.begin(current, round_)
    fold = bench.rule.begin({}, current, round=round_)
    for update in updates:
        bench.rule.add(fold, update)
        meter.add(update)
    following, _ = bench.rule.finish(fold)
    by_meter = meter.finish(following)
    assert by_meter is not None
    wanted = mean_change([bench.adapters(current, u) for u in updates], [1] * len(updates), SCALE)
    made = {n: adapter.change(SCALE) for n, adapter in bench.adapters(following).items()}
    return by_meter, relative_error(made, wanted)


@pytest.fixture(autouse=True, params=[0.0, 1e9, 3.0])
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """Measure by each update's products, by all factors at once, or by first these, then those."""
    monkeypatch.setattr(lora_error, "KEPT_MAX", request.param)
    return float(request.param)


@pytest.mark.parametrize("setting", [{"weights": "equal"}, {"weight_cap": 1}])
def test_it_weighs_sites_as_the_rule_does(setting: dict[str, Any]) -> None:
    by_meter, by_reference = told(Bench("ffa-lora", strategy=setting))
    assert by_meter <= 1e-6
    assert by_reference <= 1e-6
    by_meter, by_reference = told(Bench("fedavg", strategy=setting))
    assert by_meter == pytest.approx(by_reference, rel=1e-4)
    assert by_meter > 1e-2


def test_late_updates_count_less_for_it_too() -> None:
    bench = Bench("ffa-lora", asynchrony={"buffer": 1, "staleness_power": 1.0})
    by_meter, without_discount = told(bench, late=1)
    assert by_meter <= 1e-6  # A is one for all, so discounting B discounts the product
    assert without_discount > 1e-2


def test_a_round_of_no_change_has_no_error_to_tell() -> None:
    bench = Bench("fedavg")
    current = bench.start()  # B is zero
    meter = AggregationErrorMeter(bench.config, bench.layout)
    assert meter.finish(current) is None  # nothing was begun
    meter.begin(current, 1)
    assert meter.finish(current) is None  # nobody answered
    meter.begin(current, 1)
    meter.add(_still(bench))
    assert meter.finish(current) is None  # nothing to divide by


def test_nothing_is_measured_beyond_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench("fedavg")
    products = 7 * 5 + 4 * 6
    monkeypatch.setattr(lora_error, "PRODUCTS_MAX", products)
    assert AggregationErrorMeter(bench.config, bench.layout).applies
    monkeypatch.setattr(lora_error, "PRODUCTS_MAX", products - 1)
    meter = AggregationErrorMeter(bench.config, bench.layout)
    assert not meter.applies
    meter.begin(bench.start(), 1)
    meter.add(bench.updates(1)[0])
    assert meter.finish(bench.start()) is None


def test_an_update_too_large_to_multiply_ends_the_measuring_of_its_round_alone() -> None:
    bench = Bench("fedavg")
    current, updates = bench.start(), bench.updates(2)
    huge = replace(updates[1], delta=np.full_like(updates[1].delta, 1e30))
    meter = AggregationErrorMeter(bench.config, bench.layout)
    meter.begin(current, 1)
    for update in (huge, updates[0]):
        meter.add(update)
    assert meter.finish(current) is None
    meter.begin(current, 1)
    meter.add(updates[0])
    assert meter.finish(current) == pytest.approx(1.0)  # all that the site did is missing


@pytest.mark.parametrize("weight", [0, -10])
def test_an_update_of_no_weight_ends_the_measuring_of_its_round_alone(weight: int) -> None:
    bench = Bench("fedavg")
    current, updates = bench.start(), bench.updates(2)
    meter = AggregationErrorMeter(bench.config, bench.layout)
    meter.begin(current, 1)
    for update in (updates[0], replace(updates[1], weight=weight), updates[0]):
        meter.add(update)
    assert meter.finish(current) is None
    meter.begin(current, 1)
    meter.add(updates[0])
    assert meter.finish(current) == pytest.approx(1.0)


def test_arrays_too_large_to_multiply_have_no_error_to_tell() -> None:
    bench = Bench("fedavg")
    current = np.full(bench.layout.size, 1e30, dtype=np.float32)
    meter = AggregationErrorMeter(bench.config, bench.layout)
    meter.begin(current, 1)
    meter.add(_still(bench))
    assert meter.finish(current) is None


def _still(bench: Bench) -> Update:
    (update,) = bench.updates(1)
    return replace(update, delta=np.zeros_like(update.delta))


def test_the_order_of_updates_changes_no_bit_of_it() -> None:
    bench = Bench("fedavg")
    current, _ = bench.round({}, bench.start(), bench.updates(3))
    updates = bench.updates(5)
    following, _ = bench.round({}, current, updates)
    found = set()
    for order in (updates, updates[::-1], [updates[i] for i in (2, 0, 4, 1, 3)]):
        meter = AggregationErrorMeter(bench.config, bench.layout)
        meter.begin(current, updates[0].round)
        for update in order:
            delta = update.delta.copy()
            meter.add(replace(update, delta=delta))
            delta[:] = np.nan  # a reply's memory is soon another's
        found.add(meter.finish(following))
    assert len(found) == 1
    assert found.pop() is not None


def test_factors_are_kept_as_long_as_they_are_fewer_numbers_than_their_products(
    kept: float,
) -> None:
    bench = Bench("fedavg")
    meter = AggregationErrorMeter(bench.config, bench.layout)
    meter.begin(bench.start(), 1)
    products = (7 * 5 + 4 * 6) * kept
    for number, update in enumerate(bench.updates(3), start=1):
        meter.add(update)
        is_kept = number * update.delta.size <= products
        assert (len(meter._kept), meter._fold is None) == (number * is_kept, is_kept)
