"""A run of the coordinator in a folder: begin or resume, work, leave model and report."""

import json
from base64 import b64decode
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from intramural.core.bundle import ENDLESS
from intramural.core.canonical import canonical_json, digest_vector
from intramural.core.config import check_config
from intramural.core.errors import CheckpointError, ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.files import Held, exclusive, write_json
from intramural.core.journal import Entry, Journal, scan
from intramural.core.route import uplink
from intramural.server.checkpoint import Checkpoint, load_checkpoint
from intramural.server.commits import JOURNAL, commits_of
from intramural.server.coordinator import Coordinator
from intramural.server.directory import Manners
from intramural.server.export import Beginning, beginning, save_final
from intramural.server.holdout import Holdout, check_holdout
from intramural.server.lost import Again
from intramural.server.post import Post, Seals
from intramural.server.report import run_report
from intramural.server.setting import Setting
from intramural.server.site_privacy import check_charges, secret_noise, site_statement
from intramural.server.watcher import Watcher
from intramural.strategies.registry import make_rule
from intramural.strategies.rule import Rule

CHECKPOINTS, MODEL, REPORT = "checkpoints", "model", "report.json"
LOCK = "run.lock"
"""Held while a process runs the federation in the folder; the file itself stays."""


JUDGED_BY = "judged_by"
"""Key of a journal's first entry: digest of the coordinator's own records."""
SITES_KEY = "simulation-sites"
"""Key of a run's configuration: folder of the simulated sites, one folder each."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What to run, and where it leaves its files."""

    federation: FederationConfig
    folder: Path
    places: dict[str, str] = field(default_factory=dict)
    """Folders of base models by name, at the coordinator."""
    holdout: Path | None = None
    """holdout.toml of the coordinator's own records, where [gate] judges by them."""
    resume: bool = False
    engine: str = "flower"
    patience_s: float = inf
    """How long a round may wait for sites before the run stops."""
    durable: bool = True
    """Commits are on disk at once; False, as in a simulation: they survive a killed process, and
    not a power cut."""

    def to_config(self) -> dict[str, str | bool | float]:
        """Return Flower's configuration of the run; `plan_from_config` reads it back."""
        return {
            "manifest": self.federation.manifest(),
            "out": str(self.folder.resolve()),
            "models": canonical_json(self.places).decode(),
            "holdout": str(self.holdout.resolve()) if self.holdout is not None else "",
            "resume": self.resume,
            "engine": self.engine,
            "patience-s": self.patience_s if self.patience_s < inf else ENDLESS,
            "durable": self.durable,
        }


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What a deployed coordinator has and a simulation lacks."""

    seals: Seals
    manners: Manners
    again: Again
    takeover_s: float
    """How long to wait for the process that ran in the folder before, and is dying."""


def run_federation(
    plan: RunPlan,
    grid: Grid,
    *,
    watcher: Watcher | None = None,
    deployment: Deployment | None = None,
    adapt: Callable[[Setting], Setting] | None = None,
) -> dict[str, Any]:
    """Run a federation to its end and return its report; everything durable is in the folder.

    Args:
        plan: What to run, and where.
        grid: To the sites.
        watcher: Told of the run's events.
        deployment: What a deployed coordinator has and a simulation lacks.
        adapt: Changes what the coordinator works with: a simulation's own clock.

    Raises:
        ConfigError: The folder holds a run and `resume` is false, or a run of another manifest;
            or another process runs in it.
        ModelError, RoundError, CheckpointError, JournalError: As their modules say.
    """
    try:
        with exclusive(plan.folder / LOCK, wait_s=deployment.takeover_s if deployment else 0.0):
            return _run_alone(plan, grid, watcher or Watcher(), deployment, adapt or (lambda s: s))
    except Held:
        raise ConfigError(
            f"{plan.folder}: another process runs a federation there; use another --out"
        ) from None


def _run_alone(
    plan: RunPlan,
    grid: Grid,
    watcher: Watcher,
    deployment: Deployment | None,
    adapt: Callable[[Setting], Setting],
) -> dict[str, Any]:
    start = _start(plan, watcher)
    holdout = _holdout(plan)
    first = beginning(plan.federation, plan.places)
    rule = make_rule(plan.federation, first.layout, noise=secret_noise())
    if start is None:
        start = _round_0(plan, first)
    elif start.layout != first.layout.digest:
        raise CheckpointError(
            f"{plan.folder}: the checkpoint's layout is not the model's; use a new --out"
        )
    journal = Journal(plan.folder / JOURNAL, sync=plan.durable)
    try:
        check_charges(plan.federation, journal.entries, committed=start.round)
        _make_up(journal, start)
        journal.append(
            "resumed" if start.round else "started",
            manifest=plan.federation.digest,
            round=start.round,
            base=first.base,
            layout=first.layout.digest,
            digest=digest_vector(start.vector),
            **({JUDGED_BY: holdout.digest} if holdout is not None else {}),
        )
        # what is not needed any more is let go: each of these holds a model's memory, or two
        first = first.without_vector()
        setting = _setting(plan, grid, watcher, deployment, first, rule, journal)
        coordinator = Coordinator(replace(adapt(setting), holdout=holdout), start)
        del start, setting, rule
        outcome = coordinator.run()
        del coordinator
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


def _setting(
    plan: RunPlan,
    grid: Grid,
    watcher: Watcher,
    deployment: Deployment | None,
    first: Beginning,
    rule: Rule,
    journal: Journal,
) -> Setting:
    """Return what the coordinator works with."""
    return Setting(
        federation=plan.federation,
        run=run_id(journal.entries),
        layout=first.layout,
        base=first.base,
        rule=rule,
        post=Post(
            grid,
            lambda round_: uplink(plan.federation, first.layout, round=round_),
            seals=deployment.seals if deployment else None,
        ),
        journal=journal,
        checkpoints=plan.folder / CHECKPOINTS,
        watcher=watcher,
        patience_s=plan.patience_s,
        durable=plan.durable,
        again=deployment.again if deployment else None,
        manners=deployment.manners if deployment else None,
    )


def _make_up(journal: Journal, start: Checkpoint) -> None:
    """Journal the last commit, if a crash came between its checkpoint and its entry."""
    standing = commits_of(journal.entries).standing
    if start.round > (standing[-1].body["round"] if standing else 0):
        journal.append("committed", digest=digest_vector(start.vector), **start.history[-1])


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


def _holdout(plan: RunPlan) -> Holdout | None:
    """Return the records that [gate] judges by, the same as when the run began."""
    check_holdout(plan.federation, plan.holdout)
    if plan.holdout is None:
        return None
    found = Holdout(plan.holdout, plan.federation, plan.places)
    entries = scan(plan.folder / JOURNAL).entries
    if {entry.body[JUDGED_BY] for entry in entries if JUDGED_BY in entry.body} - {found.digest}:
        raise ConfigError(
            f"{plan.holdout}: its records are not those that the run in {plan.folder} began with; "
            "put those back, or use another --out"
        )
    return found


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
    """Return the plan that a run's configuration holds.

    Raises:
        ConfigError: A key is missing, or the manifest is wrong.
    """
    try:
        table = manifest_table(str(run_config["manifest"]))
        folder = Path(str(run_config["out"]))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"run configuration: {type(error).__name__} {error}; make it with `intramural bundle`"
        ) from None
    patience_s = float(run_config.get("patience-s", ENDLESS))
    holdout = str(run_config.get("holdout", ""))
    return RunPlan(
        federation=check_config(table, FederationConfig, source="manifest"),
        folder=folder,
        places=json.loads(str(run_config.get("models", "{}"))),
        holdout=Path(holdout) if holdout else None,
        resume=bool(run_config.get("resume", False)),
        engine=str(run_config.get("engine", "flower")),
        patience_s=inf if patience_s == ENDLESS else patience_s,
        durable=bool(run_config.get("durable", True)),
    )


def manifest_table(text: str) -> Any:
    """Return a manifest, taken out of its envelope where it has one; its readers verify that."""
    table = json.loads(text)
    if isinstance(table, dict) and "payload" in table:
        return json.loads(b64decode(table["payload"]))
    return table
