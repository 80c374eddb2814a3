"""Exchange: parameters to one vector and back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from intramural.core.errors import WireError
from intramural.models.exchange import Exchange
from tests.models.builders import bench, chapters
from tests.tiny import federation


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
