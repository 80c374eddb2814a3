"""Footprint: about how much memory a federation's training takes, told before a model is loaded."""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from intramural.core.errors import ModelError
from intramural.core.federation import FederationConfig
from intramural.models.base import Base

NUMBER_BYTES = 4
"""Weights, gradients and vectors are float32."""
HEADS = ("classifier.", "score.")
"""How the names of a classification head's parameters begin, in a file that holds one."""
FROZEN_ROWS = 64
"""Records that go through a frozen encoder at once, as `models/head.py` has it."""
PRIVATE_SHARE = 1.5
"""Memory of a book-keeping step over a plain one's, at most, in `benchmarks/dp_step.py`."""
MEMORY_FILE = Path("/proc/meminfo")

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of one site's training. An estimate, up to twice what a plain step of BERT keeps."""

    parameters: int
    """Numbers in the model."""
    trained: int
    """Numbers that are trained, and travel."""
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    """What one forward pass keeps for its backward pass, at the longest length allowed."""

    @property
    def vector_bytes(self) -> int:
        """Bytes of the parameters that travel, one way."""
        return self.trained * NUMBER_BYTES

    @property
    def device_bytes(self) -> int:
        """Bytes on the device that trains."""
        return (
            self.weights_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.activations_bytes
        )

    @property
    def host_bytes(self) -> int:
        """Bytes in main memory of the vectors that come, leave, and are compared."""
        return 3 * self.vector_bytes


def footprint(
    federation: FederationConfig, base: Base, *, micro_batch: int | None = None
) -> Footprint:
    """Estimate the memory of a federation's training from the headers of the base's files.

    Parameters are counted exactly but for a head that the base lacks, which is taken for one linear
    layer. A layer keeps 11 hidden + 2 intermediate + 3 heads x length numbers a token for its
    backward pass: within 2 % of MiniLM with dropout and all weights; an adapter keeps
    less. Under [privacy] half as much again, and Opacus a gradient a record besides.

    Args:
        federation: What is trained.
        base: The base model on this disk.
        micro_batch: As `compute.micro_batch`: records a forward pass.

    Raises:
        ModelError: The base's files cannot be read.
    """
    shapes, config = _shapes(base), _config(base)
    training, private = federation.training, federation.privacy
    parameters = sum(map(prod, shapes.values()))
    head = _head_size(federation, shapes, config)
    trained = _trained(federation, shapes, head)
    moments = {"adamw": 2, "sgd": 1 if training.momentum else 0}[training.optimizer]
    rows = min(micro_batch or training.batch_size, training.batch_size)
    activations = _activations(federation, config, rows)
    if private is not None:
        activations = round(activations * PRIVATE_SHARE)
        if private.engine == "opacus":
            activations += rows * trained * NUMBER_BYTES
    return Footprint(
        parameters=parameters + head,
        trained=trained,
        weights_bytes=(parameters + head + _adapter(federation, shapes)) * NUMBER_BYTES,
        gradients_bytes=trained * NUMBER_BYTES,
        optimizer_bytes=trained * moments * NUMBER_BYTES,
        activations_bytes=activations,
    )


def free_bytes(device: str) -> int | None:
    """Return the free memory of the device that `compute.device` means; None: nobody tells.

    Raises:
        ModelError: The device is not on this machine.
    """
    import torch

    from intramural.models.loading import pick_device

    place = pick_device(device)
    if place.type == "cuda":
        free: int = torch.cuda.mem_get_info(place)[0]
        return free
    return free_host_bytes()


def free_host_bytes() -> int | None:
    """Return the main memory that programs can still take; None: the system does not tell."""
    try:
        lines = MEMORY_FILE.read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _shapes(base: Base) -> Shapes:
    """Return the shapes of the base's float tensors, by name; no tensor is read."""
    from safetensors import SafetensorError, safe_open

    found: Shapes = {}
    for path in sorted(base.folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping: it cannot be iterated over)
                    piece = file.get_slice(name)
                    if "F" in str(piece.get_dtype()):  # F32, BF16: positions are integers
                        found[name] = tuple(piece.get_shape())
        except (OSError, SafetensorError):
            raise ModelError(
                f"model {base.name!r}: {path.name} is no whole safetensors file; copy it again"
            ) from None
    return found


def _config(base: Base) -> dict[str, Any]:
    try:
        found = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ModelError(f"model {base.name!r}: config.json is no JSON; copy it again") from None
    return found if isinstance(found, dict) else {}


def _size(config: dict[str, Any], *names: str) -> int:
    """Return a size by the first of its names that a model family uses; 0: by none of them."""
    found = [config[name] for name in names if isinstance(config.get(name), int)]
    return found[0] if found else 0


def _hidden(config: dict[str, Any]) -> int:
    return _size(config, "hidden_size", "n_embd", "d_model", "dim")


def _head_size(federation: FederationConfig, shapes: Shapes, config: dict[str, Any]) -> int:
    """Return the size of the head that the base lacks."""
    labels = len(federation.task.labels)
    if federation.task.kind != "classification" or any(n.startswith(HEADS) for n in shapes):
        return 0
    return (_hidden(config) + 1) * labels


def _trained(federation: FederationConfig, shapes: Shapes, head: int) -> int:
    exchange = federation.exchange
    if exchange.kind == "full":
        return sum(map(prod, shapes.values())) + head
    return _adapter(federation, shapes) + _whole(federation, shapes, head)


def _adapter(federation: FederationConfig, shapes: Shapes) -> int:
    """Return the size of the two factors at each target; 0 without an adapter."""
    exchange = federation.exchange
    if exchange.kind != "lora":
        return 0
    ends = tuple(f".{end}.weight" for end in exchange.target_modules)
    return sum(
        exchange.rank * sum(shape)
        for name, shape in shapes.items()
        if len(shape) == 2 and f".{name}".endswith(ends)
    )


def _whole(federation: FederationConfig, shapes: Shapes, head: int) -> int:
    """Return the size of what is trained whole beside an adapter, or alone."""
    ends = federation.exchange.trained_modules
    if ends is None:
        return head
    inside = [n for n in shapes if any(f".{end}." in f".{n}" for end in ends)]
    held = any(not any(f".{end}." in f".{n}" for n in shapes) for end in ends)
    return sum(prod(shapes[name]) for name in inside) + (head if held else 0)


def _activations(federation: FederationConfig, config: dict[str, Any], rows: int) -> int:
    """Return the bytes kept of one forward pass: those of training, or of evaluation if more."""
    hidden, length = _hidden(config), federation.model.max_length
    inner = _size(config, "intermediate_size", "n_inner", "hidden_dim", "ffn_dim") or 4 * hidden
    heads = _size(config, "num_attention_heads", "n_head", "n_heads")
    layers = _size(config, "num_hidden_layers", "n_layer", "n_layers")
    token = 11 * hidden + 2 * inner + 3 * heads * length
    outputs = 2 * _size(config, "vocab_size") if federation.task.kind == "generation" else 0
    evaluated = federation.evaluation.batch_size * length * (token + outputs)
    if federation.exchange.kind == "head":  # the encoder keeps nothing but the layer under way
        return NUMBER_BYTES * max(FROZEN_ROWS * length * token, evaluated)
    kept = hidden if federation.training.gradient_checkpointing else token
    trained = rows * length * (layers * kept + token + outputs)
    return NUMBER_BYTES * max(trained, evaluated)
