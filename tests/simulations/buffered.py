"""Runs with a buffer on a simulated clock, which may be killed and gone on with."""

from dataclasses import replace
from itertools import count
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message

from intramural.core.federation import FederationConfig
from intramural.core.messages import Reply, Request, TrainRequest, Update
from intramural.server.checkpoint import load_checkpoint
from intramural.server.lost import Again
from intramural.simulations.inprocess import InProcessGrid
from intramural.simulations.scenario import Scenario
from intramural.simulations.scenario_grid import ScenarioGrid
from intramural.simulations.sim_clock import SimClock
from tests.server.fakes import Done, Site, app_of, coordinate, honest, small
from tests.tiny import Json

ROUNDS = 7
FAST: Json = {"share": 0.6, "jitter": 0.2, "latency_s": 0.01}
SLOW: Json = {"share": 0.4, "slowness": 4.0, "jitter": 0.2, "latency_s": 0.01}


class Killed(BaseException):
    """The process dies."""


def learning(site: str, request: Request) -> Reply:
    """Answer so that the result depends on which arrays each update started from."""
    reply = honest(site, request)
    if isinstance(reply, Update) and isinstance(request, TrainRequest):
        delta = np.float32(0.1) * (reply.delta - request.vector) + np.float32(0.01 * request.round)
        return replace(reply, delta=delta.astype(np.float32))
    return reply


def buffered(**sections: Json) -> FederationConfig:
    """Return a federation of seven rounds of two updates each."""
    late = {"buffer": 2, "staleness_max": 3} | sections.pop("asynchrony", {})
    federation = {"rounds": ROUNDS} | sections.pop("federation", {})
    return small(asynchrony=late, federation=federation, **sections)


def play(
    folder: Path,
    config: FederationConfig,
    scene: Scenario,
    *,
    nodes: int = 5,
    answer: Site = learning,
    dies_at: int | None = None,
    again: bool = False,
    until_s: float = inf,
) -> Done:
    """Run until the end, or until as many messages were delivered; go on from a checkpoint.

    Args:
        folder: The run's.
        config: The federation.
        scene: What surrounds it.
        nodes: Number of sites.
        answer: The sites.
        dies_at: The message over which the process dies.
        again: Lost requests are asked again, as by a deployed coordinator.
        until_s: Simulated second by which the run must have ended.
    """
    delivered = count(1)

    def before(message: Message) -> None:
        if next(delivered) == dies_at:
            raise Killed

    checkpoint, _ = load_checkpoint(folder / "checkpoints")
    world = checkpoint.world if checkpoint is not None else {}
    clock = SimClock(world.get("now_s", 0.0))
    inner = InProcessGrid(app_of(answer), nodes, run_config={}, before=before)
    grid = ScenarioGrid(inner, scene, clock, config, world=world)

    def sleep(pause_s: float) -> None:
        assert clock.now_s <= until_s, "the run does not end"
        clock.sleep(pause_s)

    return coordinate(
        folder,
        config,
        grid,
        begin=checkpoint,
        clock=clock.monotonic,
        sleep=sleep,
        again=Again() if again else None,
        added=grid.added,
        world=grid.world,
        patience_s=1e6,
        durable=False,
    )


def told(done: Done) -> list[tuple[Any, ...]]:
    """Return what each round's record says that may not depend on a restart."""
    return [
        (r["round"], r["sites"], r["metrics"], r["train_loss"], r["scenario"]["at_s"])
        for r in done.outcome.history
    ]


def committed(done: Done) -> list[str]:
    """Return the digests of the arrays committed."""
    return [e.body["digest"] for e in done.journal if e.kind == "committed"]
