"""A run of the coordinator in a folder: begin or resume, work, leave model and report."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from intramural.core.canonical import canonical_json, digest_vector
from intramural.core.config import check_config
from intramural.core.errors import CheckpointError, ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.files import Held, exclusive, write_json
from intramural.core.journal import Entry, Journal, scan
from intramural.server.checkpoint import Checkpoint, load_checkpoint
from intramural.server.coordinator import Coordinator, Setting
from intramural.server.export import Beginning, beginning, save_final
from intramural.server.post import Post
from intramural.server.report import run_report
from intramural.server.site_privacy import check_charges, secret_noise, site_statement
from intramural.server.watcher import Watcher
from intramural.strategies.registry import make_rule

JOURNAL, CHECKPOINTS, MODEL, REPORT = "journal.jsonl", "checkpoints", "model", "report.json"
LOCK = "run.lock"
"""Held while a process runs the federation in the folder; the file itself stays."""


SITES_KEY = "simulation-sites"
"""Key of a bundle's configuration: folder of the simulated sites, one folder each."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What to run, and where it leaves its files."""

    federation: FederationConfig
    folder: Path
    places: dict[str, str] = field(default_factory=dict)
    """Folders of base models by name, at the coordinator."""
    resume: bool = False
    engine: str = "flower"
    patience_s: float = inf
    """How long a round may wait for sites before the run stops."""

    def to_config(self) -> dict[str, str | bool | float]:
        """Return the run configuration of a bundle; `plan_from_config` reads it back."""
        config: dict[str, str | bool | float] = {
            "manifest": self.federation.manifest(),
            "out": str(self.folder.resolve()),
            "models": canonical_json(self.places).decode(),
            "resume": self.resume,
            "engine": self.engine,
        }
        if self.patience_s < inf:  # TOML has infinity, Flower's run configuration has not
            config["patience-s"] = self.patience_s
        return config


def run_federation(plan: RunPlan, grid: Grid, *, watcher: Watcher | None = None) -> dict[str, Any]:
    """Run a federation to its end and return its report; everything durable is in the folder.

    Raises:
        ConfigError: The folder holds a run and `resume` is false, or a run of another manifest;
            or another process runs in it.
        ModelError, RoundError, CheckpointError, JournalError: As their modules say.
    """
    try:
        with exclusive(plan.folder / LOCK):
            return _run_alone(plan, grid, watcher or Watcher())
    except Held:
        raise ConfigError(
            f"{plan.folder}: another process runs a federation there; use another --out"
        ) from None


def _run_alone(plan: RunPlan, grid: Grid, watcher: Watcher) -> dict[str, Any]:
    start = _start(plan, watcher)
    first = beginning(plan.federation, plan.places)
    rule = make_rule(plan.federation, first.layout, noise=secret_noise())
    if start is None:
        start = _round_0(plan, first)
    elif start.layout != first.layout.digest:
        raise CheckpointError(
            f"{plan.folder}: the checkpoint's layout is not the model's; use a new --out"
        )
    journal = Journal(plan.folder / JOURNAL)
    try:
        check_charges(plan.federation, journal.entries, committed=start.round)
        journal.append(
            "resumed" if start.round else "started",
            manifest=plan.federation.digest,
            round=start.round,
            base=first.base,
            layout=first.layout.digest,
            digest=digest_vector(start.vector),
        )
        setting = Setting(
            federation=plan.federation,
            run=run_id(journal.entries),
            layout=first.layout,
            base=first.base,
            rule=rule,
            post=Post(grid, first.layout),
            journal=journal,
            checkpoints=plan.folder / CHECKPOINTS,
            watcher=watcher,
            patience_s=plan.patience_s,
        )
        outcome = Coordinator(setting, start).run()
        digest = digest_vector(outcome.vector)
        save_final(plan.federation, plan.places, outcome.vector, plan.folder / MODEL)
        report = run_report(
            plan.federation,
            first,
            outcome,
            digest=digest,
            engine=plan.engine,
            site_privacy=site_statement(plan.federation, journal.entries),
        )
        write_json(plan.folder / REPORT, report)
        journal.append("finished", rounds=len(outcome.history), digest=digest)
        return report
    finally:
        journal.close()


def run_id(entries: Sequence[Entry]) -> str:
    """Return what tells a run from others of its manifest: its journal's first digest."""
    return entries[0].digest if entries else ""


def _start(plan: RunPlan, watcher: Watcher) -> Checkpoint | None:
    """Return the checkpoint to go on from, or None to begin."""
    entries = scan(plan.folder / JOURNAL).entries
    if entries and not plan.resume:
        raise ConfigError(f"{plan.folder}: holds a run already; add --resume, or use another --out")
    checkpoint, problems = load_checkpoint(plan.folder / CHECKPOINTS)
    for line in problems:
        watcher.noticed(line)
    manifests = {entry.body["manifest"] for entry in entries if "manifest" in entry.body}
    if checkpoint is not None:
        manifests.add(checkpoint.manifest)
    if manifests - {plan.federation.digest}:
        raise ConfigError(
            f"{plan.folder}: holds a run of another federation.toml; use another --out"
        )
    return checkpoint


def _round_0(plan: RunPlan, first: Beginning) -> Checkpoint:
    return Checkpoint(
        round=0,
        manifest=plan.federation.digest,
        layout=first.layout.digest,
        vector=first.vector,
        state={},
        history=[],
    )


def plan_from_config(run_config: dict[str, Any]) -> RunPlan:
    """Return the plan that a bundle's run configuration holds.

    Raises:
        ConfigError: A key is missing, or the manifest is wrong.
    """
    try:
        table = json.loads(str(run_config["manifest"]))
        folder = Path(str(run_config["out"]))
    except (KeyError, ValueError) as error:
        raise ConfigError(f"bundle: {type(error).__name__} {error}; make it anew") from None
    return RunPlan(
        federation=check_config(table, FederationConfig, source="manifest"),
        folder=folder,
        places=json.loads(str(run_config.get("models", "{}"))),
        resume=bool(run_config.get("resume", False)),
        engine=str(run_config.get("engine", "flower")),
        patience_s=float(run_config.get("patience-s", inf)),
    )
