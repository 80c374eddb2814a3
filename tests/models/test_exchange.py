"""Exchange: parameters to one vector and back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from intramural.core.errors import ModelError, WireError
from intramural.core.layout import lent_by
from intramural.core.route import Part, uplink
from intramural.models.base import resolve_base
from intramural.models.exchange import Exchange
from intramural.models.loading import Loaded, load_model
from tests.models.builders import bench, chapters, folder_of
from tests.tiny import federation, generation


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_is_written_is_read(bert: Path, kind: str) -> None:
    exchange = bench(federation(bert, exchange={"kind": kind}), chapters(2)).loaded.exchange
    vector = np.random.default_rng(0).normal(size=exchange.layout.size).astype(np.float32)
    vector.flags.writeable = False  # as it comes from the wire
    exchange.write(vector)
    found = exchange.read().copy()
    assert found.tobytes() == vector.tobytes()
    assert found.dtype == np.float32
    found[:] = 0  # a copy: the model keeps what was written
    assert exchange.read().tobytes() == vector.tobytes()


def test_names_and_places_are_those_of_the_layout() -> None:
    weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))
    bias = nn.Parameter(torch.tensor([9.0]))
    exchange = Exchange({"weight": weight, "bias": bias})
    assert exchange.layout.entries == (("weight", (2, 3)), ("bias", (1,)))
    np.testing.assert_array_equal(exchange.read(), [0, 1, 2, 3, 4, 5, 9])
    exchange.write(np.arange(7, dtype=np.float32) * 2)
    np.testing.assert_array_equal(weight.detach().numpy(), [[0, 2, 4], [6, 8, 10]])
    np.testing.assert_array_equal(bias.detach().numpy(), [12])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parameter_that_was_given_other_memory_is_read_and_written_there(
    dtype: torch.dtype,
) -> None:
    weight = nn.Parameter(torch.ones(2))
    exchange = Exchange({"weight": weight})
    exchange.write(np.array([3.0, 4.0], dtype=np.float32))
    before = weight.data
    weight.data = torch.tensor([5.0, 6.0], dtype=dtype)  # as `.to` another device or type does
    np.testing.assert_array_equal(exchange.read(), [5, 6])
    exchange.write(np.array([7.0, 8.0], dtype=np.float32))
    assert weight.tolist() == [7, 8]
    assert before.tolist() == [3, 4]


def test_half_precision_weights_travel_as_float32() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    exchange = Exchange({"weight": weight})
    exchange.write(np.array([1.5, -2.0], dtype=np.float32))
    assert weight.dtype == torch.bfloat16
    np.testing.assert_array_equal(exchange.read(), np.array([1.5, -2.0], dtype=np.float32))


def test_a_vector_of_another_size_is_refused_and_nothing_is_written() -> None:
    exchange = Exchange({"weight": nn.Parameter(torch.ones(3))})
    with pytest.raises(WireError, match="does not fit a layout of 3"):
        exchange.write(np.zeros(4, dtype=np.float32))
    np.testing.assert_array_equal(exchange.read(), [1, 1, 1])


def test_an_adapter_carries_the_new_head_and_nothing_of_the_base(bert: Path) -> None:
    exchange = bench(federation(bert), chapters(2)).loaded.exchange
    names = [name for name, _ in exchange.layout.entries]
    # 2 layers of query and value with A (2, 32) and B (32, 2); a head of (4, 32) and (4,)
    assert exchange.layout.size == 2 * 2 * (2 * 32 + 32 * 2) + 4 * 32 + 4
    assert all("lora_" in name or "classifier" in name for name in names)


def test_two_sites_derive_the_same_layout_and_start(bert: Path) -> None:
    one, two = (bench(federation(bert), chapters(2)).loaded.exchange for _ in range(2))
    assert one.layout.digest == two.layout.digest
    assert one.read().tobytes() == two.read().tobytes()
    other = bench(federation(bert, federation={"seed": 8}), chapters(2)).loaded.exchange
    assert other.layout.digest == one.layout.digest
    assert other.read().tobytes() != one.read().tobytes()


def of_rule(base: Path, rule: str, *, rank: int | None = None, **exchange: Any) -> Loaded:
    config = federation(base, strategy={"rule": rule}, exchange={"rank": 4, **exchange})
    return load_model(config, resolve_base(str(base)), device="cpu", rank=rank)


def test_what_stays_at_the_site_is_in_no_vector_and_is_itself_again_when_nobody_says_what(
    bert: Path,
) -> None:
    exchange = of_rule(bert, "fedsa-lora").exchange
    names = [name for name, _ in exchange.layout.entries]
    assert len(names) == 4 + 2  # A of query and value in two layers, and the head
    assert not any("lora_B" in name for name in names)
    assert all("lora_B" in name for name, _ in exchange.own_layout.entries)
    assert exchange.own_layout.size == 4 * 32 * 4
    own = np.arange(exchange.own_layout.size, dtype=np.float32)
    vector = np.ones(exchange.layout.size, dtype=np.float32)
    exchange.write(vector, own)
    assert exchange.read_own().tobytes() == own.tobytes()
    assert exchange.read().tobytes() == vector.tobytes()
    exchange.write(vector)
    assert not exchange.read_own().any()  # B begins at zero, and not as the last site left it


def test_a_head_that_stays_is_named_in_the_exchange(bert: Path) -> None:
    exchange = of_rule(bert, "fedavg", personal=["classifier"]).exchange
    assert not any("classifier" in name for name, _ in exchange.layout.entries)
    assert exchange.own_layout.size == 4 * 32 + 4
    assert not exchange.is_plain


def test_control_variates_come_with_the_parameters_and_go_into_none(bert: Path) -> None:
    exchange = of_rule(bert, "scaffold").exchange
    size = sum(p.numel() for p in exchange.parameters.values())
    assert exchange.layout.size == 2 * size
    assert not exchange.read()[size:].any()
    vector = np.arange(2 * size, dtype=np.float32)
    exchange.write(vector)
    np.testing.assert_array_equal(exchange.read()[:size], vector[:size])
    found = np.concatenate([c.reshape(-1) for c in exchange.controls(vector).values()])
    np.testing.assert_array_equal(found, vector[size:])


def test_what_no_parameter_fills_is_zeros_in_lent_memory_too(bert: Path) -> None:
    def used(nbytes: int) -> memoryview:
        return memoryview(bytearray(b"\x7f" * nbytes))

    for loaded in (of_rule(bert, "scaffold"), of_rule(bert, "flora", rank=3)):
        expected = loaded.exchange.read().tobytes()
        with lent_by(used):
            assert loaded.exchange.read().tobytes() == expected


def test_a_smaller_rank_takes_the_first_rows_and_columns_and_gives_zeros_for_the_rest(
    bert: Path,
) -> None:
    whole, small = of_rule(bert, "flora"), of_rule(bert, "flora", rank=3)
    exchange = small.exchange
    assert exchange.layout.digest == whole.exchange.layout.digest
    current = np.random.default_rng(0).normal(size=exchange.layout.size).astype(np.float32)
    exchange.write(current)
    views = exchange.layout.unflatten(current)
    for name, parameter in exchange.parameters.items():
        seen = views[name]
        seen = seen[:3] if "lora_A" in name else seen[:, :3] if "lora_B" in name else seen
        np.testing.assert_array_equal(parameter.detach().numpy(), seen)
    with torch.no_grad():
        for parameter in exchange.parameters.values():
            parameter.add_(0.25)
    up = uplink(federation(bert, strategy={"rule": "flora"}), exchange.layout, round=1)
    after = Part(exchange.layout, up).gather(current) + exchange.delta(current, up)
    for name, values in up.unflatten(after).items():
        if "lora_A" in name or "lora_B" in name:
            unused = values[3:] if "lora_A" in name else values[:, 3:]
            used = values[:3] if "lora_A" in name else values[:, :3]
            assert unused.size
            assert not unused.any()  # exactly
        else:
            used = values
        np.testing.assert_allclose(used, exchange.parameters[name].detach(), atol=1e-6)


def test_the_scale_of_an_adapter_is_the_federation_s_at_every_rank(bert: Path) -> None:
    scales = {
        layer.scaling["default"]
        for rank in (None, 1, 3)
        for layer in of_rule(bert, "flora", rank=rank).model.modules()
        if isinstance(getattr(layer, "scaling", None), dict)
    }
    assert scales == {4.0 / 4}  # alpha / exchange.rank


def test_a_residual_is_added_to_the_base_weight_and_never_to_the_last_one(bert: Path) -> None:
    loaded = of_rule(bert, "fedex-lora")
    layer = "base_model.model.bert.encoder.layer.1.attention.self.value"
    weight = loaded.model.get_submodule(layer).base_layer.weight
    before = weight.detach().clone()
    exchange, rng = loaded.exchange, np.random.default_rng(0)
    assert not exchange.read()[-4 * 32 * 32 :].any()
    for _ in range(3):
        vector = rng.normal(size=exchange.layout.size).astype(np.float32)
        exchange.write(vector)
        residual = torch.tensor(exchange.layout.unflatten(vector)[f"residual/{layer}"])
        assert torch.equal(weight.detach(), before + residual)
        assert exchange.is_base_moved
    vector[-4 * 32 * 32 :] = 0
    exchange.write(vector)
    assert torch.equal(weight.detach(), before)
    assert not exchange.is_base_moved


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT tells that it turned fan_in_fan_out on
def test_a_weight_that_cannot_take_a_residual_is_refused_by_name(
    tmp_path: Path, bert: Path
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"vocab_size": 300, "n_embd": 32, "n_layer": 1, "n_head": 2}
    folder = folder_of(bert, tmp_path / "gpt2")
    GPT2LMHeadModel(GPT2Config(**sizes, n_positions=64)).save_pretrained(folder)
    for target, why in (
        ("c_attn", r"h\.0\.attn\.c_attn \(Conv1D\).*transposed.*fedsvd"),
        ("lm_head", r"lm_head.*used elsewhere too"),
    ):
        exchange = {"target_modules": [target]}
        config = generation(folder, strategy={"rule": "flora"}, exchange=exchange)
        with pytest.raises(ModelError, match=why):
            load_model(config, resolve_base(str(folder)), device="cpu")
