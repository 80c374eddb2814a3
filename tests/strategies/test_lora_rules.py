"""LoRA rules: which are exact, what they keep, and that they need no order of arrival."""

from dataclasses import replace

import numpy as np
import pytest

from intramural.core.errors import AggregationError, ConfigError
from intramural.core.layout import Vector
from intramural.core.messages import Update
from intramural.core.route import RESIDUAL, uplink
from intramural.strategies.catalogue import KINDS
from intramural.strategies.lora import orthonormal
from intramural.strategies.lora_error import AggregationErrorMeter
from intramural.strategies.registry import make_rule
from intramural.strategies.rule import State
from tests.reference.lora_products import mean_change, relative_error
from tests.strategies.lora_rounds import HEAD, LAYERS, RANK, SCALE, Bench, a_of, b_of, config

EXACT = ["ffa-lora", "rolora", "fedsvd", "flora", "fedex-lora"]
EVERY = [*EXACT, "flexlora", "fedavg"]


def errors(rule: str, *, rounds: int = 4, sites: int = 5) -> list[tuple[float, float]]:
    """Return each round's aggregation error, by the second implementation and by the meter."""
    bench = Bench(rule)
    meter = AggregationErrorMeter(bench.config, bench.layout)
    current, found = bench.start(), []
    state: State = {}
    for round_ in range(1, rounds + 1):
        updates = bench.updates(sites, round_=round_)
        wanted = mean_change(
            [bench.adapters(current, u) for u in updates], [u.weight for u in updates], SCALE
        )
        meter.begin(current, round_)
        for update in updates:
            meter.add(update)
        following, state = bench.round(state, current, updates)
        made = {n: adapter.change(SCALE) for n, adapter in bench.adapters(following).items()}
        told = meter.finish(following)
        assert told is not None
        found.append((relative_error(made, wanted), told))
        current = following
    return found


@pytest.mark.parametrize("rule", EXACT)
def test_exact_rules_make_the_mean_of_the_sites_changes(rule: str) -> None:
    assert KINDS[rule].traits.exact_for_lora
    for by_reference, by_meter in errors(rule):
        assert by_reference <= 1e-6
        assert by_meter <= 1e-6


def test_averaging_the_factors_apart_does_not() -> None:
    assert not KINDS["fedavg"].traits.exact_for_lora
    for by_reference, by_meter in errors("fedavg"):
        assert by_reference > 1e-2
        assert by_meter == pytest.approx(by_reference, rel=1e-4)


def test_one_site_alone_is_exact_under_every_rule() -> None:
    for rule in EVERY:
        assert all(by_reference <= 1e-5 for by_reference, _ in errors(rule, sites=1))


def test_flexlora_is_the_best_approximation_of_its_rank() -> None:
    bench = Bench("flexlora")
    current = bench.start()
    updates = bench.updates(4)
    wanted = mean_change(
        [bench.adapters(current, u) for u in updates], [u.weight for u in updates], SCALE
    )
    following, _ = bench.round({}, current, updates)
    for layer, adapter in bench.adapters(following).items():
        sizes = np.linalg.svd(wanted[layer], compute_uv=False)
        # Eckart-Young: what is lost are the singular values beyond the rank
        lost = np.linalg.norm(wanted[layer] - adapter.change(SCALE))
        assert lost == pytest.approx(np.sqrt(np.sum(sizes[RANK:] ** 2)), rel=1e-5)
        assert lost > 0.01
        for rank in range(1, RANK):  # and so for a site that takes the first components alone
            first = SCALE * adapter.b[:, :rank] @ adapter.a[:rank]
            tail = np.sqrt(np.sum(sizes[rank:] ** 2))
            assert np.linalg.norm(wanted[layer] - first) == pytest.approx(tail, rel=1e-5)


@pytest.mark.parametrize("rule", EVERY)
def test_the_order_of_updates_changes_no_bit(rule: str) -> None:
    bench = Bench(rule)
    current, updates = bench.start(), bench.updates(5)
    one, _ = bench.round({}, current, updates)
    other, _ = bench.round({}, current, updates[::-1])
    assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("rule", EVERY)
def test_the_head_is_averaged_whatever_becomes_of_the_factors(rule: str) -> None:
    bench = Bench(rule)
    current, updates = bench.start(), bench.updates(3)
    following, _ = bench.round({}, current, updates)
    before = bench.layout.unflatten(current)[HEAD]
    weights = [1, 4, 7]  # 3 n + 1
    size = before.size
    mean = sum(
        w * u.delta[-size:].astype(np.float64) for w, u in zip(weights, updates, strict=True)
    )
    np.testing.assert_allclose(
        bench.layout.unflatten(following)[HEAD].reshape(-1),
        before.reshape(-1) + mean / 12,
        rtol=1e-5,
        atol=1e-6,
    )


def test_ffa_never_moves_a_and_rolora_moves_one_factor_a_round() -> None:
    for rule, turns in (("ffa-lora", "BBB"), ("rolora", "BAB")):
        bench = Bench(rule)
        current = bench.start()
        state: State = {}
        for round_, turn in enumerate(turns, start=1):
            following, state = bench.round(state, current, bench.updates(3, round_=round_))
            old, new = bench.layout.unflatten(current), bench.layout.unflatten(following)
            for layer in LAYERS:
                assert np.array_equal(old[a_of(layer)], new[a_of(layer)]) == (turn == "B")
                assert np.array_equal(old[b_of(layer)], new[b_of(layer)]) == (turn == "A")
            current = following


def test_fedsvd_has_orthonormal_rows_and_keeps_products() -> None:
    bench = Bench("fedsvd")
    plain = Bench("ffa-lora")
    current, updates = bench.start(), bench.updates(4)
    following, _ = bench.round({}, current, updates)
    kept, _ = plain.round({}, current, updates)
    for layer, adapter in bench.adapters(following).items():
        np.testing.assert_allclose(adapter.a @ adapter.a.T, np.eye(RANK), atol=1e-6)
        old = plain.adapters(kept)[layer]
        np.testing.assert_allclose(adapter.b @ adapter.a, old.b @ old.a, atol=1e-5)


def test_fedsvd_leaves_a_while_b_is_zero_and_bears_a_product_of_lower_rank() -> None:
    bench = Bench("fedsvd")
    current = bench.start()
    (update,) = bench.updates(1)
    nothing = replace(update, delta=np.zeros_like(update.delta))
    same, _ = bench.round({}, current, [nothing])
    assert same.tobytes() == current.tobytes()
    flat = update.delta.copy()
    part = flat[: 7 * RANK].reshape(7, RANK)  # B of the first layer leads the uplink
    part[:] = np.outer(np.arange(7), [1.0, 0.0, 0.0])
    following, _ = bench.round({}, current, [replace(update, delta=flat)])
    adapter = bench.adapters(following)["m.query"]
    np.testing.assert_allclose(adapter.a @ adapter.a.T, np.eye(RANK), atol=1e-6)
    assert np.linalg.matrix_rank(adapter.b, tol=1e-5) == 1


@pytest.mark.parametrize("outputs", [1, 2, 3, 9])
def test_fedsvd_keeps_products_of_layers_with_fewer_outputs_than_the_rank(outputs: int) -> None:
    rng = np.random.default_rng(outputs)
    old_b, old_a = rng.normal(size=(outputs, 3)), rng.normal(size=(3, 5))
    b, a = orthonormal(old_b, old_a)
    assert (b.shape, a.shape) == (old_b.shape, old_a.shape)
    np.testing.assert_allclose(b @ a, old_b @ old_a, atol=1e-12)
    np.testing.assert_allclose(a @ a.T, np.eye(3), atol=1e-12)
    assert (a[np.arange(3), np.abs(a).argmax(axis=1)] > 0).all()


def test_flexlora_keeps_a_while_products_are_zero_or_nothing_could_be_learnt_again() -> None:
    bench = Bench("flexlora")
    current = bench.start()
    (update,) = bench.updates(1)
    nothing = replace(update, delta=np.zeros_like(update.delta))
    same, _ = bench.round({}, current, [nothing])
    assert same.tobytes() == current.tobytes()


@pytest.mark.parametrize("rule", ["flora", "flexlora"])
def test_sites_of_a_smaller_rank_count_with_the_rank_they_have(rule: str) -> None:
    assert KINDS[rule].traits.mixed_ranks
    bench = Bench(rule)
    current, _ = bench.round({}, bench.start(), bench.updates(3))
    updates = [
        _of_rank(bench, current, update, rank)
        for update, rank in zip(bench.updates(2, round_=2), (1, 2), strict=True)
    ]
    sites = [bench.adapters(current, u) for u in updates]
    for site, rank in zip(sites, (1, 2), strict=True):
        for adapter in site.values():
            assert np.linalg.matrix_rank(adapter.b @ adapter.a) == rank
    wanted = mean_change(sites, [u.weight for u in updates], SCALE)
    following, _ = bench.round({}, current, updates)
    made = {n: adapter.change(SCALE) for n, adapter in bench.adapters(following).items()}
    assert relative_error(made, wanted) <= 1e-6  # the ranks add up to the federation's


def _of_rank(bench: Bench, current: Vector, update: Update, rank: int) -> Update:
    """Return the update of a site that has the first `rank` rows of A and columns of B alone."""
    values, delta = bench.layout.unflatten(current), update.delta.copy()
    up = uplink(bench.config, bench.layout, round=update.round)
    for name, part in up.unflatten(delta).items():
        if ".lora_A." in name:
            part[rank:] = -values[name][rank:]
        elif ".lora_B." in name:
            part[:, rank:] = -values[name][:, rank:]
    return replace(update, delta=delta)


def test_after_a_round_of_small_sites_flexlora_leaves_larger_ones_something_to_learn() -> None:
    bench = Bench("flexlora")
    current, _ = bench.round({}, bench.start(), bench.updates(3))
    alike = bench.updates(1, round_=2)[0]  # one site's, so that the product has rank 1
    updates = [replace(_of_rank(bench, current, alike, 1), site=name) for name in "ab"]
    wanted = mean_change(
        [bench.adapters(current, u) for u in updates], [u.weight for u in updates], SCALE
    )
    following, _ = bench.round({}, current, updates)
    for layer, adapter in bench.adapters(following).items():
        np.testing.assert_allclose(adapter.change(SCALE), wanted[layer], atol=1e-6)
        assert np.all(adapter.b[:, 1:] == 0.0)  # as PEFT begins: B zero, A drawn within the bound
        bound = 1 / np.sqrt(adapter.a.shape[1])
        assert np.all(np.abs(adapter.a[1:]) <= bound)
        assert np.linalg.norm(adapter.a[1:], axis=1).min() > 0.1 * bound
    again, _ = bench.round({}, current, updates[::-1])
    assert again.tobytes() == following.tobytes()


@pytest.mark.parametrize("rule", EVERY)
def test_a_rule_made_anew_goes_on_at_the_same_bits(rule: str) -> None:
    found = []
    for is_anew in (False, True):
        bench = Bench(rule, strategy={"momentum": 0.5} if rule in ("rolora", "fedavg") else {})
        current = bench.start()
        state: State = {}
        for round_ in (1, 2, 3, 4):
            if is_anew:  # as after a checkpoint
                state = {name: array.copy() for name, array in state.items()}
                bench.rule = make_rule(bench.config, bench.layout)
            current, state = bench.round(state, current, bench.updates(3, round_=round_))
        found.append(current.tobytes())
    assert found[0] == found[1]


def test_floras_new_factors_follow_from_seed_round_and_layer() -> None:
    bench = Bench("flora")
    current = bench.start()
    updates = [bench.updates(2, round_=n) for n in (1, 2)]
    first, _ = bench.round({}, current, updates[0])
    again, _ = bench.round({}, current, [replace(u, delta=-u.delta) for u in updates[0]])
    second, _ = bench.round({}, current, updates[1])
    for layer, (_, inputs) in LAYERS.items():
        a = [bench.layout.unflatten(v)[a_of(layer)] for v in (first, again, second)]
        assert np.array_equal(a[0], a[1])
        assert not np.array_equal(a[0], a[2])
        assert np.abs(a[0]).max() <= 1 / np.sqrt(inputs)
        assert not bench.layout.unflatten(first)[b_of(layer)].any()
        assert bench.layout.unflatten(first)[RESIDUAL + layer].any()
    drawn = [  # entries within 1 / sqrt(inputs), brought to one size so that draws compare
        bench.layout.unflatten(first)[a_of(layer)].reshape(-1)[:5] * np.sqrt(inputs)
        for layer, (_, inputs) in LAYERS.items()
    ]
    assert not np.allclose(*drawn)  # layers are not copies of one another


@pytest.mark.parametrize("rule", ["flora", "flexlora", "fedex-lora"])
def test_an_update_that_is_refused_leaves_nothing_in_the_sums(rule: str) -> None:
    bench = Bench(rule)
    current, updates = bench.start(), bench.updates(3)
    bad = replace(updates[0], site="bad", delta=np.full_like(updates[0].delta, 1e30))
    fold = bench.rule.begin({}, current, round=1)
    for update in updates:
        bench.rule.add(fold, update)
        with pytest.raises(AggregationError):
            bench.rule.add(fold, bad)
    found, _ = bench.rule.finish(fold)
    alone, _ = bench.round({}, current, updates)
    assert found.tobytes() == alone.tobytes()


def test_a_rule_for_adapters_is_refused_without_them() -> None:
    for rule in (*EXACT, "flexlora", "fedsa-lora"):
        with pytest.raises(ConfigError, match=r"is for exchange\.kind = 'lora'"):
            Bench(rule, exchange={"kind": "full"})


def test_fedsa_sends_a_and_leaves_b_at_home() -> None:
    bench = Bench("fedsa-lora")
    names = [name for name, _ in bench.layout.entries]
    assert names == ["m.query.lora_A.default.weight", "m.value.lora_A.default.weight", HEAD]
    meter = AggregationErrorMeter(bench.config, bench.layout)
    assert not meter.applies
    meter.begin(bench.start(), 1)
    assert meter.finish(bench.start()) is None


def test_the_scale_is_that_of_the_federations_rank() -> None:
    assert config("fedavg").exchange.alpha / config("fedavg").exchange.rank == SCALE
