"""Which exchange kind is worth its noise? Accuracy by kind, epsilon and size of sites.

The federation is examples/icd10's private one: five hospitals by Dirichlet 0.3, ICD-10-CM titles,
test split grouped by category. Trials that are in the JSON file already are not run again.

    python -m benchmarks.private_utility --all ALL.csv --json FILE.json
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import machine_facts
from examples.icd10.private_demo import Trial, row_of, run
from intramural.core.files import write_json

LORA = {
    "kind": "lora",
    "rank": 8,
    "alpha": 16,
    "target_modules": ["query", "value"],
    "trained_modules": ["classifier"],
}
FULL = {"kind": "full", "trained_modules": []}
HEAD_MANY: dict[str, Any] = {"batch_size": 1024, "local_steps": 10}
NOT_PRIVATE_MANY: dict[str, Any] = {"learning_rate": 2.0, "local_steps": 4}
MANY = {"nominal_records": 11_000}


def head(*, every_title: bool, epsilon: float | None, seed: int) -> Trial:
    """Return a trial of examples/icd10/private_demo.py, by its settings."""
    privacy = None if epsilon is None else {"epsilon": epsilon} | (MANY if every_title else {})
    many: dict[str, Any] = (
        {"learning_rate": 2.0, "local_steps": 4} if epsilon is None else HEAD_MANY
    )
    few = {} if epsilon == 8.0 else {"learning_rate": 2.0}
    rounds = (100 if epsilon is None else 40) if every_title else 20
    return Trial(
        name="head",
        every_title=every_title,
        rounds=rounds,
        changes=many if every_title else few,
        privacy=privacy,
        seed=seed,
    )


def noised(name: str, exchange: dict[str, Any], rate: float) -> Trial:
    """Return a trial on short titles that runs the encoder at each step: some 20 minutes."""
    return Trial(
        name=name,
        every_title=False,
        rounds=10,
        changes={"learning_rate": rate, "local_steps": 4},
        exchange=exchange,
        privacy={"epsilon": 8.0},
    )


def plain_lora() -> Trial:
    """Return LoRA without privacy, by the settings of `make demo`."""
    changes = {"optimizer": "adamw", "momentum": None, "learning_rate": 8e-3, "batch_size": 16}
    return Trial(
        name="lora",
        every_title=False,
        rounds=32,
        changes=changes,
        exchange=LORA,
        privacy=None,
    )


def plans() -> list[Trial]:
    """Return the trials, the quick ones first."""
    heads = [
        head(every_title=every, epsilon=epsilon, seed=seed)
        for every in (False, True)
        for epsilon in (None, 8.0, 3.0)
        for seed in (7, 8, 9)
    ]
    return [
        *heads,
        noised("lora", LORA, 2.0),
        plain_lora(),
        noised("full", FULL, 0.1),
    ]


def main() -> None:
    """Run what is not in the file yet, and print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.private_utility", description=__doc__)
    parser.add_argument("--all", type=Path, required=True, help="all titles, by make_data.py")
    parser.add_argument("--json", type=Path, required=True, help="results, read and added to")
    parser.add_argument("--kind", nargs="+", default=["head", "lora", "full"])
    options = parser.parse_args()
    found = json.loads(options.json.read_text()) if options.json.is_file() else {"rows": []}
    found["machine"] = machine_facts()
    for trial in plans():
        key = asdict(trial)
        if trial.name in options.kind and key not in [row["trial"] for row in found["rows"]]:
            with tempfile.TemporaryDirectory() as folder:
                row = row_of(trial, run(trial, options.all, Path(folder) / "run"))
            found["rows"].append({"trial": key} | row)
            write_json(options.json, found)
    _print(found["rows"])


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Accuracy on the pooled test split; a record, add-remove, delta 1e-5, PLD")
    for column in ("titles", "exchange", "epsilon", "noise", "rounds x steps", "accuracy, by seed"):
        table.add_column(column)
    cells: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        trial = row["trial"]
        steps = trial["changes"].get("local_steps", 5)
        noise = row["noise_multiplier"]
        cell = (
            "all" if trial["every_title"] else "short",
            trial["name"],
            "none" if row["epsilon"] is None else f"{row['epsilon']:.2f}",
            "-" if noise is None else f"{noise:.3g}",
            f"{trial['rounds']} x {steps}",
        )
        cells.setdefault(cell, []).append(row["accuracy"])
    for cell, scores in cells.items():
        table.add_row(*cell, "  ".join(f"{score:.3f}" for score in scores))
    Console().print(table)


if __name__ == "__main__":
    main()
