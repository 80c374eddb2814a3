"""A run under a scenario: the coordinator on a simulated clock, over any engine's Grid."""

from dataclasses import replace

from flwr.serverapp import Grid

from intramural.core.files import write_json
from intramural.server.checkpoint import load_checkpoint
from intramural.server.run import CHECKPOINTS, REPORT, RunPlan, run_federation
from intramural.server.watcher import Watcher
from intramural.simulations.scenario import Scenario
from intramural.simulations.scenario_grid import ScenarioGrid
from intramural.simulations.scenario_report import scenario_section
from intramural.simulations.sim_clock import SimClock

DAY_S = 86_400.0


def run_scenario(run: RunPlan, grid: Grid, scenario: Scenario, *, watcher: Watcher) -> None:
    """Run a federation under a scenario; its report in the folder then tells of both.

    A resumed run's clock goes on where the last committed round ended. The scenario's patience
    takes the place of the run's.

    Raises:
        RoundError: Too few sites came within the patience, or a round failed for good.
        IntramuralError: As `run_federation`.
    """
    checkpoint, _ = load_checkpoint(run.folder / CHECKPOINTS)
    history = checkpoint.history if checkpoint is not None else []
    world = checkpoint.world if checkpoint is not None else {}
    at_s = history[-1]["scenario"]["at_s"] if history else 0.0
    clock = SimClock(world.get("now_s", at_s))
    played = ScenarioGrid(grid, scenario, clock, run.federation, world=world)
    plan = replace(run, patience_s=scenario.patience_days * DAY_S)
    report = run_federation(plan, played, watcher=watcher, adapt=played.adapt)
    section = scenario_section(
        scenario, report["rounds"], simulated_s=clock.now_s, groups=played.groups()
    )
    write_json(run.folder / REPORT, report | section)
