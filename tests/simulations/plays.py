"""Plays: a scenario over sites that are plain functions, with a coordinator and no model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from intramural.core.config import check_config
from intramural.core.federation import FederationConfig
from intramural.server.lost import Again
from intramural.simulations.scenario import Scenario
from intramural.simulations.scenario_grid import ScenarioGrid
from intramural.simulations.sim_clock import SimClock
from tests.server.fakes import Done, coordinate
from tests.tiny import Json

DAY_S = 86_400.0


def scenario(*groups: Json, **keys: Any) -> Scenario:
    """Return a scenario of these groups, each of an equal share unless it says otherwise."""
    listed = groups or ({},)
    tables = [
        {"name": f"group-{n}", "share": 1 / len(listed)} | group for n, group in enumerate(listed)
    ]
    content = {"name": "play", "about": "a test's", "groups": tables} | keys
    return check_config(content, Scenario, source="test")


@dataclass(frozen=True, kw_only=True)
class Played:
    """What a run under a scenario left."""

    done: Done
    grid: ScenarioGrid
    clock: SimClock

    @property
    def rounds(self) -> list[Json]:
        """The rounds' records."""
        return self.done.outcome.history


def play(folder: Path, config: FederationConfig, inner: Grid, scene: Scenario) -> Played:
    """Run a federation under a scenario to its end."""
    clock = SimClock()
    grid = ScenarioGrid(inner, scene, clock, config)
    done = coordinate(
        folder,
        config,
        grid,
        clock=clock.monotonic,
        sleep=clock.sleep,
        again=Again() if scene.ask_again else None,
        added=grid.added,
        patience_s=scene.patience_days * DAY_S,
    )
    return Played(done=done, grid=grid, clock=clock)
