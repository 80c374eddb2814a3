"""A sweep's results: cells by their validation metric, seeds together, and what tuning cost."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from intramural.core.canonical import canonical_json
from intramural.core.federation import FederationConfig
from intramural.core.files import write_json
from intramural.server.checkpoint import load_checkpoint
from intramural.server.run import CHECKPOINTS
from intramural.simulations.sweep import CELLS, Result
from intramural.simulations.sweep_config import SweepConfig, metric_of

SWEEP_VERSION = 1
SEED = "federation.seed"
VALIDATION = "validation.json"
"""Metrics that the simulator measured at a cell's end, where no site sends any."""
JUDGED_WORDS = (
    "Cells are judged on the sites' validation records. No test record was looked at to choose "
    "one; each cell's own report tells its test metrics, and only the winner's mean anything."
)
EXACT_WORDS = (
    "The sites send no such metric under [privacy]: the simulator, which holds all records, "
    "measured it exactly. A choice by it is outside the privacy claim; privacy.metrics_noise "
    "gives one that is inside."
)

Row = dict[str, Any]
Measure = Callable[[FederationConfig, Path], Mapping[str, float]]
"""Measures a cell's final model on its sites' validation records."""


def sweep_report(
    config: SweepConfig, results: Sequence[Result], *, folder: Path, measure: Measure | None = None
) -> dict[str, Any]:
    """Return the content of sweep.json.

    Args:
        config: What was swept.
        results: Of every cell, in order.
        folder: The sweep's folder.
        measure: Another way to measure a cell that was told no metric; None: `measure_validation`.
    """
    federation = results[0].cell.federation
    metric, rises = metric_of(config, federation)
    rows = [_row(result, metric, measure or measure_validation) for result in results]
    rows.sort(key=lambda row: _rank(row["metric"], rises=rises))
    groups = _groups(rows, rises=rises)
    winner = _winner(rows, groups)
    best = None if winner is None else winner["cell"]
    privacy = None
    if any(result.cell.federation.privacy is not None for result in results):
        from intramural.simulations.sweep_privacy import tuning_cost  # accounting loads slowly

        spent = sorted((folder / CELLS).iterdir()) if (folder / CELLS).is_dir() else []
        # a cell that sweep.toml no longer asks for was trained on the same records too
        privacy = tuning_cost({path.name: path for path in spent if path.is_dir()}, best=best)
    notes = [JUDGED_WORDS]
    if any(row["measured_by"] == "simulator" for row in rows):
        notes.append(EXACT_WORDS)
    return {
        "version": SWEEP_VERSION,
        "name": federation.federation.name,
        "task": federation.task.kind,
        "kind": config.sweep.kind,
        "metric": metric,
        "rises": rises,
        "split": "validation",
        "parameters": list(config.choices),
        "cells": rows,
        "groups": groups,
        "best": winner,
        "privacy": privacy,
        "notes": notes,
    }


def measure_validation(federation: FederationConfig, folder: Path) -> Mapping[str, float]:
    """Return the final model's metrics on the validation records of a cell's sites, kept on disk.

    For cells under [privacy], whose sites send none: see `EXACT_WORDS`.
    """
    from intramural.core.journal import scan
    from intramural.server.commits import JOURNAL
    from intramural.server.report import result_of
    from intramural.server.run import run_id
    from intramural.simulations.comparison import open_agent, open_form, sums_by_site

    kept = folder / VALIDATION
    if not kept.is_file():
        from intramural.core.metrics import add_sums

        checkpoint, _ = load_checkpoint(folder / CHECKPOINTS)
        assert checkpoint is not None, "a finished cell has a checkpoint"
        form = open_form(federation)
        files = sorted(folder.glob("sites/*/site.toml"))
        agents = [open_agent(file, form, memory_of=federation) for file in files]
        run = run_id(scan(folder / JOURNAL).entries)
        sums = sums_by_site(agents, checkpoint.vector, "validation", run=run)
        write_json(kept, result_of(form, add_sums(list(sums.values()))))
    found: dict[str, float] = json.loads(kept.read_text())
    return found


def validation_of(report: Mapping[str, Any], metric: str) -> float | None:
    """Return a metric of the last round on validation records; None where sites told none."""
    rounds = report.get("rounds") or []
    value = (rounds[-1].get("metrics") or {}).get(metric) if rounds else None
    return None if value is None else float(value)


def _row(result: Result, metric: str, measure: Measure) -> Row:
    cell = result.cell
    row: Row = {
        "cell": result.folder.name,
        "parameters": cell.parameters,
        "state": result.state,
        "reason": result.reason,
        "metric": None,
        "measured_by": None,
        "seconds": None,
        "bytes_up": None,
        "bytes_down": None,
    }
    if result.state != "done":
        return row
    report = result.report
    value, measured_by = validation_of(report, metric), "sites"
    if value is None and cell.federation.privacy is not None:
        value, measured_by = measure(cell.federation, result.folder).get(metric), "simulator"
    return row | {
        "metric": value,
        "measured_by": measured_by if value is not None else None,
        **{key: report[key] for key in ("seconds", "bytes_up", "bytes_down")},
    }


def _rank(value: float | None, *, rises: bool) -> tuple[bool, float]:
    """Return what sorts the best first, and cells without a metric last."""
    return (value is None, 0.0 if value is None else -value if rises else value)


def _groups(rows: Sequence[Row], *, rises: bool) -> list[Row]:
    """Return cells that differ in their seed alone, together; [] where no seed was swept."""
    if not any(SEED in row["parameters"] for row in rows):
        return []
    found: dict[bytes, list[Row]] = {}
    for row in rows:
        rest = {key: value for key, value in row["parameters"].items() if key != SEED}
        found.setdefault(canonical_json(rest), []).append(row)
    groups = []
    for mark, members in found.items():
        values = [row["metric"] for row in members if row["metric"] is not None]
        groups.append(
            {
                "parameters": json.loads(mark),
                "cells": [row["cell"] for row in members],
                "measured": len(values),
                "mean": fmean(values) if values else None,
                "sd": stdev(values) if len(values) > 1 else None,
            }
        )
    groups.sort(key=lambda group: _rank(group["mean"], rises=rises))
    return groups


def _winner(rows: Sequence[Row], groups: Sequence[Row]) -> Row | None:
    """Return the best cell; of seeds, the best cell of the group with the best mean."""
    members = set(groups[0]["cells"]) if groups else {row["cell"] for row in rows}
    best = next((row for row in rows if row["cell"] in members and row["metric"] is not None), None)
    if best is None:
        return None
    return {key: best[key] for key in ("cell", "parameters", "metric")}
