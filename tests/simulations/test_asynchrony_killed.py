"""FedBuff on a simulated clock: a run that was killed, wherever, ends as if it had not been."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from intramural.core.canonical import digest_vector
from intramural.server.checkpoint import load_checkpoint
from intramural.server.directory import Directory
from intramural.server.post import Arrival, Post
from intramural.simulations.scenario import Scenario
from intramural.simulations.scenario_grid import ScenarioGrid
from intramural.simulations.sim_clock import SimClock
from tests.server.fakes import BASE, LAYOUT, grid_of, honest, small
from tests.simulations.buffered import FAST, SLOW, Killed, buffered, committed, play, told
from tests.simulations.plays import scenario
from tests.tiny import Json


def alike(**changes: Any) -> Scenario:
    """Return fast and slow sites with these changes to both."""
    return scenario(FAST | changes, SLOW | changes)


def far(**changes: Any) -> Scenario:
    """Return sites that come and go on slow lines, and often crash."""
    return alike(crash=0.25, **changes)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a run that is killed goes through."""

    scene: Scenario
    sections: Json = field(default_factory=dict)
    again: bool = True
    """As `ScenarioGrid.adapt` has it for a scenario that says nothing of it."""
    nodes: int = 5
    seeds: int = 1


EXPIRING: Json = {"sites": {"deadline_s": 300.0}}
SCENES: dict[str, Scene] = {
    "slow": Scene(scene=scenario(FAST, SLOW)),
    "evaluating": Scene(scene=scenario(FAST, SLOW, evaluate_s=40.0)),
    "evaluating-long": Scene(scene=scenario(FAST, SLOW, evaluate_s=150.0), sections=EXPIRING),
    "unevaluated": Scene(scene=scenario(FAST, SLOW), sections={"evaluation": {"every": 0}}),
    "expiring": Scene(scene=scenario(FAST, SLOW | {"slowness": 9.0}), sections=EXPIRING),
    "stale": Scene(scene=scenario(FAST, SLOW), sections={"asynchrony": {"staleness_max": 1}}),
    "losing": Scene(scene=scenario(FAST | {"drop_out": 0.2}, SLOW | {"crash": 0.3}), again=False),
    "losing-again": Scene(scene=scenario(FAST | {"crash": 0.2}, SLOW | {"crash": 0.3}), seeds=2),
    "gated": Scene(scene=scenario(FAST, SLOW), sections={"gate": {"metric": "accuracy"}}),
    "sharing": Scene(
        scene=scenario(FAST, SLOW), sections={"sites": {"share": 0.6, "selection": "round-robin"}}
    ),
    "hostile": Scene(scene=scenario(FAST, SLOW | {"hostile": "noise"})),
    "hours": Scene(scene=alike(hours=(8.0, 9.1), offset_hours=(0.0, 0.05, 0.1)), nodes=6),
    "bouts": Scene(scene=alike(on_hours=0.1, off_hours=0.03), again=False, nodes=6, seeds=4),
    "bouts-again": Scene(scene=alike(on_hours=0.1, off_hours=0.03), nodes=6, seeds=4),
    "blips": Scene(scene=alike(on_hours=0.05, off_hours=0.005), again=False, nodes=6, seeds=4),
    "blips-again": Scene(
        scene=alike(on_hours=0.05, off_hours=0.005, crash=0.1), nodes=6, seeds=4, sections=EXPIRING
    ),
    # greetings take half a minute, in which others crash: a round opens without hearing of that
    "far": Scene(scene=far(latency_s=15.0, on_hours=0.1, off_hours=0.03), again=False, nodes=7),
    "far-again": Scene(
        scene=far(latency_s=25.0, on_hours=0.06, off_hours=0.02),
        sections={"sites": {"share": 0.6, "deadline_s": 400.0}},
        nodes=7,
        seeds=2,
    ),
}


@pytest.mark.parametrize("name", SCENES)
def test_a_run_killed_anywhere_ends_at_the_same_bits(tmp_path: Path, name: str) -> None:
    scene, kills = SCENES[name], 0
    for seed in range(7, 7 + scene.seeds):
        kills += killed_everywhere(tmp_path / str(seed), scene, seed=seed, step=3 * scene.seeds)
    assert kills >= 5


def killed_everywhere(folder: Path, played: Scene, *, seed: int, step: int) -> int:
    """Kill a run over every so many messages, hold each against the whole; return how many."""
    config = buffered(federation={"seed": seed}, **played.sections)
    rest: Any = {"nodes": played.nodes, "again": played.again, "until_s": 1e6}
    whole = play(folder / "whole", config, played.scene, **rest)
    for kills, dies_at in enumerate(range(4, 1000, step)):
        home = folder / str(dies_at)
        try:
            play(home, config, played.scene, dies_at=dies_at, **rest)
        except Killed:
            again = play(home, config, played.scene, **rest)
            assert told(again) == told(whole), (seed, dies_at)
            assert committed(again) == committed(whole), (seed, dies_at)
            assert digest_vector(again.outcome.vector) == digest_vector(whole.outcome.vector)
        else:
            return kills
    raise AssertionError("the run has no end")


def test_a_greeting_that_is_under_way_is_answered_when_it_would_have_been() -> None:
    scene, config = scenario({"latency_s": 30.0}), small()
    world: dict[str, Any] = {}
    known: dict[str, Any] = {}

    def begun() -> tuple[SimClock, ScenarioGrid, Directory]:
        """Return what a process begins with that goes on from `world` and `known`."""
        clock = SimClock(world.get("now_s", 0.0))
        grid = ScenarioGrid(grid_of(honest), scene, clock, config, world=world)
        post = Post(grid, lambda _: LAYOUT)
        return clock, grid, Directory(post, config, run="", layout=LAYOUT, base=BASE, before=known)

    def take(arrival: Arrival) -> None:
        assert directory.took(arrival)

    clock, grid, directory = begun()
    clock.alarm(20.0)
    while clock.now_s < 20.0:
        assert not directory.greet(take)
        clock.sleep(0.0)
    world, known = grid.world(), directory.to_json()
    clock, grid, directory = begun()
    while not directory.greet(take):
        clock.sleep(0.0)
    assert clock.now_s == 60.0  # half a minute there and half a minute back, from 0 and not from 20
    assert directory.eligible == ["site-1", "site-2", "site-3"]
    world, known = grid.world(), directory.to_json()
    clock, grid, directory = begun()
    assert directory.greet(take)  # known as ever, and nobody is greeted
    assert directory.eligible == ["site-1", "site-2", "site-3"]
    assert (clock.now_s, grid.world()["place"]) == (60.0, 3)


def test_a_checkpoint_holds_the_arrays_of_those_at_work_and_no_others(tmp_path: Path) -> None:
    scene = scenario(FAST, SLOW | {"slowness": 9.0})
    with pytest.raises(Killed):
        play(tmp_path, buffered(), scene, dies_at=30)
    checkpoint, _ = load_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert len(checkpoint.flights) >= 2  # both slow sites, at least
    rounds = {round_ for round_, _ in checkpoint.flights.values()}
    assert set(checkpoint.starts) == rounds
    assert all(checkpoint.round + 1 - round_ <= 3 for round_ in rounds)
