"""Footprint: about how much memory a federation's training takes, told before a model is loaded."""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from intramural.core.errors import ModelError
from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout
from intramural.core.route import CONTROL_RULES, RESIDUAL, downlink, is_trained, up_bytes_max
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
Entry = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of one site's training. An estimate, up to twice what a plain step of BERT keeps."""

    parameters: int
    """Numbers in the model."""
    trained: int
    """Numbers that are trained; those of a smaller rank than exchange.rank are fewer."""
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    """What one forward pass keeps for its backward pass, at the longest length allowed."""
    down: int | None = None
    """Numbers that come: of what travels, and what goes with it; None: the trained ones."""
    up: int | None = None
    """Numbers of a site's largest update; None: as many as come."""

    @property
    def vector_bytes(self) -> int:
        """Bytes of the vector that comes."""
        return NUMBER_BYTES * (self.trained if self.down is None else self.down)

    @property
    def up_bytes(self) -> int:
        """Bytes of a site's largest update."""
        return self.vector_bytes if self.up is None else NUMBER_BYTES * self.up

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
        return 2 * self.vector_bytes + self.up_bytes


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
    layout = _layout(federation, shapes, head)
    trained, down = layout.size, downlink(federation, layout)
    turns = [_moving(federation, layout, round) for round in (1, 2)]
    added = sum(prod(shape) for name, shape in down.entries if name.startswith(RESIDUAL))
    moments = {"adamw": 2, "sgd": 1 if training.momentum else 0}[training.optimizer]
    rows = min(micro_batch or training.batch_size, training.batch_size)
    activations = _activations(federation, config, rows)
    if private is not None:
        activations = round(activations * PRIVATE_SHARE)
        if private.engine == "opacus":
            activations += rows * max(turns) * NUMBER_BYTES
    adapter = sum(size for _, size in _factors(federation, shapes))
    added += max(turns) * _copies(federation)
    return Footprint(
        parameters=parameters + head,
        trained=trained,
        weights_bytes=(parameters + head + adapter + added) * NUMBER_BYTES,
        gradients_bytes=max(turns) * NUMBER_BYTES,
        optimizer_bytes=max(turns) * moments * NUMBER_BYTES,
        activations_bytes=activations,
        down=down.size,
        up=up_bytes_max(federation, down) // NUMBER_BYTES,
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


def _layout(federation: FederationConfig, shapes: Shapes, head: int) -> Layout:
    """Return what is trained, by names close enough to the built model's to be told apart."""
    if federation.exchange.kind == "full":
        entries = [(name, shape) for name, shape in shapes.items()]
        return Layout((*entries, *_head(federation, shapes, head)))
    factors = [entry for entry, _ in _factors(federation, shapes)]
    return Layout((*factors, *_whole(federation, shapes, head)))


def _moving(federation: FederationConfig, layout: Layout, round: int) -> int:
    """Return how many numbers a round trains."""
    return sum(prod(s) for n, s in layout.entries if is_trained(federation, n, round=round))


def _copies(federation: FederationConfig) -> int:
    """Return how many more copies of what is trained a step reads: anchors and corrections."""
    ditto = federation.personal is not None and federation.personal.kind == "ditto"
    is_pulled = federation.training.proximal > 0 or ditto
    return is_pulled + (federation.strategy.rule in CONTROL_RULES)


def _factors(federation: FederationConfig, shapes: Shapes) -> list[tuple[Entry, int]]:
    """Return the two factors at each target, with their sizes; none without an adapter."""
    exchange, found = federation.exchange, list[tuple[Entry, int]]()
    if exchange.kind != "lora":
        return []
    ends = tuple(f".{end}.weight" for end in exchange.target_modules)
    for name, shape in shapes.items():
        if len(shape) == 2 and f".{name}".endswith(ends):
            module = name.removesuffix(".weight")
            outputs, inputs = shape
            for factor, sides in (
                ("A", (exchange.rank, inputs)),
                ("B", (outputs, exchange.rank)),
            ):
                found.append(((f"{module}.lora_{factor}.default.weight", sides), prod(sides)))
    return found


def _whole(federation: FederationConfig, shapes: Shapes, head: int) -> list[Entry]:
    """Return what is trained whole beside an adapter, or alone."""
    ends = federation.exchange.trained_modules
    if ends is None:
        return _head(federation, shapes, head)
    inside = [n for n in shapes if any(f".{end}." in f".{n}" for end in ends)]
    held = any(not any(f".{end}." in f".{n}" for n in shapes) for end in ends)
    return [(n, shapes[n]) for n in inside] + (_head(federation, shapes, head) if held else [])


def _head(federation: FederationConfig, shapes: Shapes, head: int) -> list[Entry]:
    """Return the head that the base lacks, under the name that the federation has for it."""
    exchange = federation.exchange
    named = (*exchange.personal, *(exchange.trained_modules or ()))
    new = [end for end in named if not any(f".{end}." in f".{n}" for n in shapes)]
    return [(f"{(new or ['head'])[0]}.weight", (head,))] if head else []


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
