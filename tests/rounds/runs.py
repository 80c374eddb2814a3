"""Runs end to end: real coordinator, real agents, tiny model, one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Message

from intramural.client.agent import SiteAgent
from intramural.client.app import app
from intramural.core.federation import FederationConfig
from intramural.core.layout import Vector
from intramural.core.site import load_site
from intramural.server.checkpoint import load_checkpoint
from intramural.server.run import RunPlan, run_federation
from intramural.server.watcher import Watcher
from tests.server.fakes import SlowGrid


def run(
    folder: Path,
    config: FederationConfig,
    sites: Path,
    *,
    before: Callable[[Message], None] | None = None,
    slow: dict[int, int] | None = None,
    resume: bool = False,
    watcher: Watcher | None = None,
    holdout: Path | None = None,
) -> dict[str, Any]:
    """Run a federation of the sites in a folder and return its report."""
    settings = {"manifest": config.manifest(), "simulation-sites": str(sites)}
    nodes = len(list(sites.glob("*/site.toml")))
    grid = SlowGrid(app, nodes, run_config=settings, before=before, slow=slow or {})
    plan = RunPlan(federation=config, folder=folder, holdout=holdout, resume=resume, patience_s=0.0)
    return run_federation(plan, grid, watcher=watcher)


def final(folder: Path) -> Vector:
    """Return the parameters that a run ended with."""
    checkpoint, _ = load_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    return checkpoint.vector


def agents(sites: Path, config: FederationConfig) -> list[SiteAgent]:
    """Return the sites' agents, in the order of their names."""
    return [SiteAgent(load_site(file), config) for file in sorted(sites.glob("*/site.toml"))]
