"""Footprint: what is counted from files' headers is what the built model has."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from intramural.core.errors import ModelError
from intramural.core.federation import FederationConfig
from intramural.core.route import uplink
from intramural.models import footprint as footprint_module
from intramural.models.base import resolve_base
from intramural.models.footprint import footprint, free_bytes, free_host_bytes
from intramural.models.loading import load_model
from tests.tiny import federation, generation

CASES: list[tuple[str, dict[str, Any]]] = [
    ("lora", {}),
    ("lora", {"trained_modules": ["classifier", "pooler"]}),
    ("head", {}),
    ("head", {"trained_modules": ["classifier", "pooler.dense"]}),
    ("full", {}),
]


def saved_bytes(model: Any, run: Callable[[], torch.Tensor]) -> int:
    """Return the bytes that a forward pass keeps for its backward pass, by autograd."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(("kind", "keys"), CASES)
def test_numbers_are_those_of_the_built_model(bert: Path, kind: str, keys: dict[str, Any]) -> None:
    config = federation(bert, exchange={"kind": kind, **keys})
    base = resolve_base(str(bert))
    loaded = load_model(config, base, device="cpu")
    found = footprint(config, base)
    assert found.trained == loaded.exchange.layout.size
    assert found.vector_bytes == 4 * loaded.exchange.layout.size
    built = sum(p.numel() for p in loaded.model.parameters())
    copies = 0  # PEFT keeps the frozen original beside a module that is trained whole
    if kind == "lora":
        copies = sum(p.numel() for n, p in loaded.model.named_parameters() if "original" in n)
    assert found.weights_bytes == 4 * (built - copies)


@pytest.mark.parametrize(
    ("rule", "keys"),
    [
        ("ffa-lora", {}),
        ("rolora", {"rank": 3}),
        ("flora", {}),
        ("fedex-lora", {"target_modules": ["query", "dense"]}),
        ("fedsa-lora", {}),
        ("scaffold", {}),
        ("scaffold", {"kind": "full"}),
        ("fedavg", {"personal": ["classifier"]}),
    ],
)
def test_what_comes_and_leaves_follows_from_the_rule(
    bert: Path, rule: str, keys: dict[str, Any]
) -> None:
    config = federation(bert, strategy={"rule": rule}, exchange=keys)
    base = resolve_base(str(bert))
    down = load_model(config, base, device="cpu").exchange.layout
    found = footprint(config, base)
    assert found.vector_bytes == down.nbytes
    assert found.up_bytes == max(uplink(config, down, round=r).nbytes for r in (1, 2))


def test_a_factor_that_is_not_trained_has_no_moments_and_a_residual_has_its_base_s_copy(
    bert: Path,
) -> None:
    base = resolve_base(str(bert))
    adam = {"optimizer": "adamw"}
    plain, half, moved = (
        footprint(federation(bert, strategy={"rule": rule}, training=adam), base)
        for rule in ("fedavg", "ffa-lora", "flora")
    )
    frozen = 4 * 2 * 32  # A of query and value in two layers, rank 2
    assert plain.optimizer_bytes - half.optimizer_bytes == 4 * 2 * frozen
    assert moved.weights_bytes - plain.weights_bytes == 4 * 4 * 32 * 32


def test_numbers_of_a_language_model(llama: Path) -> None:
    config = generation(llama)
    base = resolve_base(str(llama))
    loaded = load_model(config, base, device="cpu")
    assert footprint(config, base).trained == loaded.exchange.layout.size


@pytest.mark.parametrize(
    ("training", "numbers"),
    [
        ({"optimizer": "sgd"}, 0),
        ({"optimizer": "sgd", "momentum": 0.9}, 1),
        ({"optimizer": "adamw"}, 2),
    ],
)
def test_an_optimizer_keeps_so_many_numbers_for_each_trained_one(
    bert: Path, training: dict[str, Any], numbers: int
) -> None:
    found = footprint(federation(bert, training=training), resolve_base(str(bert)))
    assert found.optimizer_bytes == numbers * found.vector_bytes
    assert found.gradients_bytes == found.vector_bytes
    assert found.host_bytes == 3 * found.vector_bytes


@pytest.mark.parametrize("length", [16, 48])
def test_activations_are_at_most_twice_what_is_kept_and_never_less(bert: Path, length: int) -> None:
    config = federation(
        bert,
        exchange={"kind": "full"},
        model={"max_length": length},
        evaluation={"batch_size": 1},
    )
    base = resolve_base(str(bert))
    loaded = load_model(config, base, device="cpu")
    loaded.model.train()
    for module in loaded.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1  # with dropout attention keeps its weights, as real encoders do
    ids = torch.full((8, length), 7)

    def run() -> torch.Tensor:
        logits: torch.Tensor = loaded.model(input_ids=ids, attention_mask=ids * 0 + 1).logits
        return logits.sum()

    kept = saved_bytes(loaded.model, run)
    assert kept < footprint(config, base).activations_bytes < 2 * kept


def test_what_saves_memory_lowers_the_estimate_and_what_costs_some_raises_it(bert: Path) -> None:
    base = resolve_base(str(bert))

    def activations(config: FederationConfig, micro_batch: int | None = None) -> int:
        return footprint(config, base, micro_batch=micro_batch).activations_bytes

    small = {"evaluation": {"batch_size": 1}}
    plain = federation(bert, **small)
    assert (
        activations(plain, 2)
        < activations(plain, 8)
        == activations(plain)
        == activations(plain, 64)
    )
    saving = federation(bert, training={"gradient_checkpointing": True}, **small)
    assert activations(saving) < activations(plain)
    privacy = {"unit": "record", "noise_multiplier": 1.0, "delta": 1e-5, "clip_norm": 1.0}
    private = privacy | {"nominal_records": 2000}
    book = activations(federation(bert, privacy=private, **small))
    opacus = activations(federation(bert, privacy=private | {"engine": "opacus"}, **small))
    assert activations(plain) < book < opacus


def test_evaluation_counts_where_it_takes_more(bert: Path) -> None:
    base = resolve_base(str(bert))
    small, large = (
        footprint(federation(bert, evaluation={"batch_size": size}), base).activations_bytes
        for size in (1, 4096)
    )
    assert large > small


def test_a_damaged_model_is_named_without_its_content(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((bert / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 32)
    base = resolve_base(str(tmp_path))
    with pytest.raises(ModelError, match=r"model\.safetensors is no whole safetensors file"):
        footprint(federation(tmp_path), base)
    (tmp_path / "model.safetensors").write_bytes((bert / "model.safetensors").read_bytes())
    footprint(federation(tmp_path), base)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is no JSON"):
        footprint(federation(tmp_path), base)


def test_free_memory_is_told_where_the_system_tells_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "meminfo"
    monkeypatch.setattr(footprint_module, "MEMORY_FILE", table)
    assert free_host_bytes() is None
    table.write_text("MemTotal:  100 kB\nMemAvailable:     64 kB\n")
    assert free_host_bytes() == free_bytes("cpu") == 64 * 1024
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="not on this machine"):
            free_bytes("cuda:3")
