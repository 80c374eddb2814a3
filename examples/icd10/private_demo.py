"""What does privacy cost here? The same federation without and with it, on many and few titles.

    python examples/icd10/private_demo.py --all ALL.csv --out runs/demo-private

The settings below were tuned on these public titles by another split. A site cannot tune on its own
records for free: each trial is charged.
"""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from intramural import Deal, FederationConfig, Simulation, load_site, simulate
from intramural.core.config import check_config, read_table
from intramural.server.screen import Screen

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One federation: what differs from private.toml."""

    name: str
    every_title: bool
    """All 97,579 titles; False: the 11,982 of codes up to four characters."""
    rounds: int
    changes: dict[str, Any] = field(default_factory=dict)
    """Keys of [training]; None takes one out."""
    exchange: dict[str, Any] | None = None
    """The table [exchange]; None: that of private.toml."""
    privacy: dict[str, Any] | None
    """Keys of [privacy]; None: without it."""
    seed: int = 7


def plans() -> list[Trial]:
    """Return the trials, in the order of the table."""
    many = {"nominal_records": 11_000}
    large = {"batch_size": 1024, "local_steps": 10}
    person = {"unit": "person", "nominal_persons": 200, "records_per_person": 32}
    return [
        Trial(
            name="all titles, no privacy",
            every_title=True,
            rounds=100,
            changes={"learning_rate": 2.0, "local_steps": 4},
            privacy=None,
        ),
        Trial(name="all titles", every_title=True, rounds=40, changes=large, privacy=many),
        Trial(
            name="all titles",
            every_title=True,
            rounds=40,
            changes=large,
            privacy=many | {"epsilon": 3.0},
        ),
        Trial(
            name="short titles, no privacy",
            every_title=False,
            rounds=20,
            changes={"learning_rate": 2.0},
            privacy=None,
        ),
        Trial(name="short titles", every_title=False, rounds=20, privacy={}),
        Trial(
            name="short titles",
            every_title=False,
            rounds=20,
            changes={"learning_rate": 2.0},
            privacy={"epsilon": 3.0},
        ),
        Trial(
            name="all titles, a category as a person",
            every_title=True,
            rounds=20,
            changes={"batch_size": 100, "learning_rate": 2.0},
            privacy=many | person,
        ),
    ]


def federation_of(trial: Trial) -> FederationConfig:
    """Return private.toml with the trial's changes."""
    table = read_table(HERE / "private.toml")
    table["federation"] |= {"rounds": trial.rounds, "seed": trial.seed}
    table["training"] |= trial.changes
    table["training"] = {k: v for k, v in table["training"].items() if v is not None}
    if trial.exchange is not None:
        table["exchange"] = trial.exchange
    if trial.privacy is None:
        del table["privacy"]
        table["evaluation"] = {"every": trial.rounds}
    else:
        table["privacy"] |= trial.privacy
    return check_config(table, FederationConfig, source="private.toml")


def run(trial: Trial, data: Path, folder: Path) -> dict[str, Any]:
    """Run one trial and return its report."""
    federation, template = federation_of(trial), load_site(HERE / "site.toml")
    columns: dict[str, Any] = {"path": data.resolve()} if trial.every_title else {}
    if federation.privacy is not None and federation.privacy.unit == "person":
        columns |= {"person": "category", "group": None}
    template = template.model_copy(
        update={
            "data": template.data.model_copy(update=columns),
            # a head's steps are so small that a second thread costs more than it brings
            "compute": template.compute.model_copy(update={"threads": 1}),
        }
    )
    deal = Deal(
        federation=federation, template=template, sites=5, partition="dirichlet:0.3", folder=folder
    )
    with Screen(Console(), rounds=trial.rounds) as screen:
        return simulate(Simulation(deal=deal, compare=frozenset()), watcher=screen)


def row_of(trial: Trial, report: dict[str, Any]) -> dict[str, Any]:
    """Return what the table shows of a trial."""
    federated, told = report["final"]["federated"], list((report["privacy"] or {}).values())
    return {
        "name": trial.name,
        "unit": told[0]["unit"] if told else None,
        "epsilon": max(site["epsilon"] for site in told) if told else None,
        "delta": told[0]["delta"] if told else None,
        "relation": told[0]["relation"] if told else None,
        "noise_multiplier": told[0]["noise_multiplier"] if told else None,
        "sites": sorted(site["train"] for site in report["sites"]),
        "accuracy": federated["accuracy"],
        "interval": federated["interval"]["accuracy"],
        "macro_f1": federated["macro_f1"],
        "seconds": report["seconds"],
    }


def main() -> None:
    """Run all trials in one process, so that each title goes through the encoder once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", type=Path, required=True, help="all titles, by make_data.py")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    options = parser.parse_args()
    table = Table(title="Accuracy on the pooled test split; delta 1e-5, Poisson sampling, PLD")
    for column in ("records", "unit", "epsilon", "noise", "accuracy", "lost (points)", "macro-F1"):
        table.add_column(column)
    rows: list[dict[str, Any]] = []
    for number, trial in enumerate(plans(), start=1):
        rows.append(row_of(trial, run(trial, options.all, options.out / f"run-{number}")))
        rows[-1]["every_title"] = trial.every_title
        (options.out / "table.json").write_text(json.dumps(rows, indent=1))
    best = {row["every_title"]: row["accuracy"] for row in rows if row["epsilon"] is None}
    for row in rows:
        private = row["epsilon"] is not None
        table.add_row(
            row["name"],
            f"{row['unit']}, {row['relation']}" if private else "-",
            f"{row['epsilon']:.3g}" if private else "none",
            f"{row['noise_multiplier']:.3g}" if private else "-",
            f"{row['accuracy']:.3f} [{row['interval'][0]:.3f}, {row['interval'][1]:.3f}]",
            f"{100 * (best[row['every_title']] - row['accuracy']):.1f}" if private else "",
            f"{row['macro_f1']:.3f}",
        )
    Console().print(table)
    Console().print(f"statements: {options.out}/run-2/privacy.md; reports: run-*/report.html")


if __name__ == "__main__":
    main()
