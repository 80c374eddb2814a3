"""FedBuff on a simulated clock: who counts when, and that a run that was killed ends alike."""

from collections import Counter
from dataclasses import replace
from itertools import count
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from intramural.core.canonical import digest_vector
from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.messages import Reply, Request, TrainRequest, Update
from intramural.core.site import load_site
from intramural.server.checkpoint import load_checkpoint
from intramural.server.lost import Again
from intramural.simulations.inprocess import InProcessGrid
from intramural.simulations.scenario import Scenario
from intramural.simulations.scenario_grid import ScenarioGrid
from intramural.simulations.sim_clock import SimClock
from intramural.simulations.simulate import Simulation, simulate
from intramural.simulations.sites import Deal
from tests.server.fakes import Done, Seen, Site, SlowGrid, app_of, coordinate, honest, small
from tests.simulations.plays import scenario
from tests.tiny import Json, rows, site

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
    return [e.body["digest"] for e in done.journal if e.kind == "committed"]


SCENES: dict[str, tuple[Scenario, Json]] = {
    "slow": (scenario(FAST, SLOW), {}),
    "evaluating": (scenario(FAST, SLOW, evaluate_s=40.0), {}),
    "unevaluated": (scenario(FAST, SLOW), {"evaluation": {"every": 0}}),
    "expiring": (scenario(FAST, SLOW | {"slowness": 9.0}), {"sites": {"deadline_s": 300.0}}),
    "stale": (scenario(FAST, SLOW), {"asynchrony": {"staleness_max": 1}}),
    "losing": (scenario(FAST | {"drop_out": 0.2}, SLOW | {"crash": 0.3}), {}),
    "gated": (scenario(FAST, SLOW), {"gate": {"metric": "accuracy"}}),
    "sharing": (scenario(FAST, SLOW), {"sites": {"share": 0.6, "selection": "round-robin"}}),
}


@pytest.mark.parametrize("name", SCENES)
def test_a_run_killed_anywhere_ends_at_the_same_bits(tmp_path: Path, name: str) -> None:
    scene, sections = SCENES[name]
    config = buffered(**sections)
    whole = play(tmp_path / "whole", config, scene)
    kills = 0
    for dies_at in range(7, 200, 7):
        folder = tmp_path / str(dies_at)
        try:
            play(folder, config, scene, dies_at=dies_at)
            break
        except Killed:
            kills += 1
        again = play(folder, config, scene)
        assert told(again) == told(whole), dies_at
        assert committed(again) == committed(whole), dies_at
        assert digest_vector(again.outcome.vector) == digest_vector(whole.outcome.vector)
    assert kills >= 2


def test_a_late_update_counts_less_in_the_round_in_which_it_comes(tmp_path: Path) -> None:
    fast, slow = {"name": "fast", "share": 0.67}, {"name": "slow", "share": 0.33, "slowness": 2.5}
    scene = scenario(fast, slow, train_s=60.0)
    seed = next(s for s in count() if scene.groups_of(3, seed=s)[2].name == "slow")
    config = buffered(
        federation={"rounds": 4, "seed": seed},
        asynchrony={"staleness_power": 1.0},
        evaluation={"every": 0},
        strategy={"momentum": 0.0},
    )
    done = play(tmp_path, config, scene, nodes=3, answer=honest)
    # Sites 1 and 2 take 60 s and site 3 takes 150 s. 60: 1, 2. 120: 1, 2. 150 and 180: 3, from two
    # rounds ago, and 1; 2 comes at 180 as well, finds the buffer full, and counts in the next
    # round, late by 1; at 240 so does 1.
    rounds = [(r["sites"], r["scenario"]["at_s"]) for r in done.outcome.history]
    assert rounds == [
        (["site-1", "site-2"], 60.0),
        (["site-1", "site-2"], 120.0),
        (["site-1", "site-3"], 180.0),
        (["site-1", "site-2"], 240.0),
    ]
    # site-n moves by n, from n records. (1*1 + 2*2) / 3 twice; (1*1 + 3*3 / (1 + 2)) / (1 + 3);
    # (1*1 + 2*2 / (1 + 1)) / (1 + 2)
    expected = 5 / 3 + 5 / 3 + 4 / 4 + 3 / 3
    np.testing.assert_allclose(done.outcome.vector, np.full(7, expected), rtol=1e-6)


def test_a_late_update_is_left_out_by_reason(tmp_path: Path) -> None:
    scene = scenario(FAST, SLOW | {"slowness": 9.0})
    done = play(tmp_path, buffered(asynchrony={"staleness_max": 1}), scene)
    reasons = {e.body["reason"] for e in done.journal if e.kind == "refused"}
    assert reasons == {"stale"}


@pytest.mark.parametrize("evaluate_s", [100.0, 200.0])
def test_no_update_that_came_in_time_is_lost_to_a_slow_evaluation(
    tmp_path: Path, evaluate_s: float
) -> None:
    trips: Counter[str] = Counter()

    def answer(site: str, request: Request) -> Reply:
        trips[site] += isinstance(request, TrainRequest)
        return learning(site, request)

    # training takes 60 or 120 s, and is waited for 150 s; a round lasts 100 s or more
    slow = {"share": 0.4, "slowness": 2.0, "latency_s": 0.01}
    scene = scenario({"latency_s": 0.01, "share": 0.6}, slow, evaluate_s=evaluate_s)
    config = buffered(sites={"deadline_s": 150.0})
    done = play(tmp_path, config, scene, answer=answer)
    assert [e.body for e in done.journal if e.kind == "refused"] == []
    counted = Counter(site for r in done.outcome.history for site in r["sites"])
    assert min(counted.values()) >= 2  # the slow ones, too: 14 places, five sites in turn
    assert all(trips[site] - times in (0, 1) for site, times in counted.items())  # 1: held at last


HALF: Json = {"share": 0.5, "latency_s": 0.01}


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("buffer", [2, 3])
def test_sites_that_leave_over_their_training_are_replaced_by_idle_ones(
    tmp_path: Path, buffer: int, again: bool
) -> None:
    # all take 100 s to train; half of the sites leave at 72 s, until the next morning
    scene = scenario(HALF, HALF | {"hours": (8.0, 9.02)}, train_s=100.0)
    config = buffered(
        federation={"rounds": 4},
        asynchrony={"buffer": buffer},
        sites={"share": 0.5, "deadline_s": 300.0, "min": 3},
    )
    done = play(tmp_path, config, scene, nodes=6, again=again, until_s=7200.0)
    assert done.outcome.history[-1]["scenario"]["at_s"] < 3600.0


@pytest.mark.parametrize("again", [False, True])
def test_sites_that_hang_and_say_nothing_are_replaced_by_idle_ones(
    tmp_path: Path, again: bool
) -> None:
    grid = SlowGrid(app_of(honest), 6, run_config={}, slow=dict.fromkeys((1, 3, 5), 10**9))
    config = buffered(
        federation={"rounds": 4},
        asynchrony={"buffer": 3},
        sites={"share": 0.5, "deadline_s": 30.0, "min": 3},
    )

    def sleep(pause_s: float) -> None:
        assert grid.now_s < 1e4, "the run does not end"

    done = coordinate(
        tmp_path,
        config,
        grid,
        clock=lambda: grid.now_s,
        sleep=sleep,
        patience_s=1e3,
        again=Again() if again else None,
    )
    assert [r["sites"] for r in done.outcome.history] == [["site-2", "site-4", "site-6"]] * 4
    assert sum(e.kind == "lack" for e in done.journal) >= 1


def test_a_run_in_which_nobody_is_late_is_the_synchronous_one(tmp_path: Path) -> None:
    scene = scenario({"latency_s": 0.01})
    late = {"buffer": 3}
    with_buffer = play(tmp_path / "a", buffered(asynchrony=late), scene, nodes=3)
    plain = play(tmp_path / "b", small(federation={"rounds": ROUNDS}), scene, nodes=3)
    assert told(with_buffer) == told(plain)
    assert committed(with_buffer) == committed(plain)


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


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"asynchrony": {"buffer": 4}}, "at most sites.min"),
        (
            {
                "strategy": {"weights": "equal"},
                "site_privacy": {"clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-3},
            },
            "remove one of the tables",
        ),
    ],
)
def test_what_cannot_be_asynchronous_is_refused(sections: Json, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        buffered(**sections)


@pytest.mark.parametrize("engine", ["batched", "ray"])
def test_an_engine_without_a_simulated_clock_is_refused(tmp_path: Path, engine: Any) -> None:
    deal = Deal(
        federation=buffered(),
        template=load_site(site(tmp_path, "template", rows())),
        sites=3,
        partition="iid",
        folder=tmp_path / "out",
    )
    with pytest.raises(ConfigError, match=f"leave out --engine {engine}"):
        simulate(Simulation(deal=deal, engine=engine), watcher=Seen())
    assert not (tmp_path / "out").exists()
