"""A coordinator under a scenario: times, faults and hours, over sites that are plain functions."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from intramural.core.errors import RoundError
from intramural.core.messages import Reply, Request, TrainRequest
from intramural.core.wire import encode
from intramural.simulations.inprocess import InProcessGrid
from intramural.simulations.presence import HOUR_S
from intramural.simulations.scenario import load_scenario, shipped_scenarios
from intramural.simulations.scenario_grid import HAPPENINGS, ScenarioGrid
from intramural.simulations.sim_clock import SimClock
from tests.server.fakes import LAYOUT, Done, app_of, coordinate, grid_of, honest, small
from tests.simulations.plays import play, scenario

QUIET = {"evaluation": {"every": 0}}
SITES_2 = {"sites": {"min": 2, "quorum": 0.6, "deadline_s": 1000.0}}


class Asked:
    """Honest sites that note who trained, in order."""

    def __init__(self) -> None:
        self.trained: list[tuple[str, int]] = []

    def __call__(self, site: str, request: Request) -> Reply:
        if isinstance(request, TrainRequest):
            self.trained.append((site, request.round))
        return honest(site, request)


def happened(record: dict[str, Any]) -> dict[str, int]:
    """Return what a round's record counts, zeros left out."""
    return {name: record["scenario"][name] for name in HAPPENINGS if record["scenario"][name]}


def test_a_rounds_time_is_that_of_paper_and_pencil(tmp_path: Path) -> None:
    config = small(sites={"min": 2}, federation={"rounds": 2}, **QUIET)
    line = {"latency_s": 0.5, "down_mbps": 0.01, "up_mbps": 0.02}
    scene = scenario(line | {"slowness": 1.0}, line | {"slowness": 3.0}, train_s=60.0)
    played = play(tmp_path, config, grid_of(honest, 2), scene)
    for record in played.rounds:
        size = record["bytes_down"] / 2  # what one site was sent
        slowest_s = 0.5 + 8 * size / 10_000 + 180.0 + 0.5 + 8 * size / 20_000
        assert record["simulated_seconds"] == pytest.approx(slowest_s, abs=1e-3)
        assert record["seconds"] < 1.0  # of the real clock
        assert happened(record) == {}


def test_the_coordinators_line_is_shared_by_those_who_are_asked(tmp_path: Path) -> None:
    config = small(sites={"min": 3}, federation={"rounds": 1}, **QUIET)
    scene = scenario({"down_mbps": 100.0, "up_mbps": 100.0}, train_s=1.0, coordinator_mbps=0.03)
    [record] = play(tmp_path, config, grid_of(honest, 3), scene).rounds
    size = record["bytes_down"] / 3
    alone_s = 8 * size / 10_000  # a third of 30 000 bits a second
    assert record["simulated_seconds"] == pytest.approx(1.0 + 2 * alone_s, abs=1e-3)


def test_calm_leaves_the_arrays_as_they_are_without_a_scenario(tmp_path: Path) -> None:
    config = small(federation={"rounds": 3}, strategy={"momentum": 0.5})
    plain = coordinate(tmp_path / "plain", config, grid_of(honest))
    calm = play(tmp_path / "calm", config, grid_of(honest), load_scenario("calm")).done
    assert np.array_equal(calm.outcome.vector, plain.outcome.vector)
    assert [r["sites"] for r in calm.outcome.history] == [r["sites"] for r in plain.outcome.history]


@pytest.mark.parametrize("name", shipped_scenarios())
def test_a_scenario_is_the_same_on_every_engine(tmp_path: Path, name: str) -> None:
    config = small(sites={"min": 2, "quorum": 0.5})
    one, two = (
        play(tmp_path / kind.__name__, config, kind(app_of(honest), 6, run_config={}), scene)
        for kind, scene in ((InProcessGrid, load_scenario(name)), (Pool, load_scenario(name)))
    )
    assert one.clock.now_s == two.clock.now_s
    assert np.array_equal(one.done.outcome.vector, two.done.outcome.vector)
    for left, right in zip(one.rounds, two.rounds, strict=True):
        assert left | {"seconds": 0} == right | {"seconds": 0}


class Pool(InProcessGrid):
    """Computes all it is given at once, and is ready at a third look only, as a pool may be."""

    def __init__(self, *args: Any, **rest: Any) -> None:
        super().__init__(*args, **rest)
        self._ready: dict[str, list[Message]] = {}
        self._looks = 0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = list(super().push_messages(messages))
        for message_id in reversed(ids):
            self._ready[message_id] = list(super().pull_messages([message_id]))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self._looks += 1
        for message_id in message_ids if self._looks % 3 == 0 else ():
            yield from self._ready.pop(message_id, [])


def test_another_seed_plays_otherwise(tmp_path: Path) -> None:
    scene = scenario({"jitter": 0.5}, {"crash": 0.3})
    times = [
        play(
            tmp_path / str(n), small(federation={"seed": seed}), grid_of(honest), scene
        ).clock.now_s
        for n, seed in enumerate((7, 7, 8))
    ]
    assert times[0] == times[1] != times[2]


def test_replies_are_computed_one_at_a_time_in_the_order_of_their_arrival(tmp_path: Path) -> None:
    asked = Asked()
    config = small(federation={"rounds": 2})
    scene = scenario({"slowness": 3.0}, {"slowness": 1.0}, {"slowness": 2.0})
    played = play(tmp_path, config, grid_of(asked), scene)
    nodes = {s.group.slowness: f"site-{n}" for n, s in played.grid._sites.items()}
    order = [nodes[slowness] for slowness in (1.0, 2.0, 3.0)]
    assert asked.trained == [(site, round_) for round_ in (1, 2) for site in order]


def test_a_drop_out_is_waited_for_until_the_deadline_and_never_computed(tmp_path: Path) -> None:
    asked = Asked()
    config = small(federation={"rounds": 1}, **SITES_2, **QUIET)
    scene = scenario({}, {}, {"drop_out": 1.0})
    [record] = play(tmp_path, config, grid_of(asked), scene).rounds
    assert record["simulated_seconds"] == 1000.0
    assert happened(record) == {"drop_outs": 1}
    assert len(record["sites"]) == 2
    assert sorted(site for site, _ in asked.trained) == record["sites"]
    assert record["refusals"] == {}


def test_a_drop_out_without_a_quorum_fails_when_flower_gives_it_up(tmp_path: Path) -> None:
    config = small(sites={"min": 3, "deadline_s": 1000.0}, federation={"rounds": 1}, **QUIET)
    clock = SimClock()
    with pytest.raises(RoundError, match="2 good answers, 3 needed"):
        drop_outs(tmp_path, clock, config)
    assert clock.now_s == 3 * 43_200.0  # three attempts, each as long as Flower keeps a message


def drop_outs(folder: Path, clock: SimClock, config: Any) -> Done:
    grid = ScenarioGrid(grid_of(honest), scenario({}, {}, {"drop_out": 1.0}), clock, config)
    return coordinate(folder, config, grid, clock=clock.monotonic, sleep=clock.sleep)


def test_a_crash_counts_with_flowers_code_and_nobody_waits_for_it(tmp_path: Path) -> None:
    config = small(federation={"rounds": 1}, **SITES_2, **QUIET)
    scene = scenario({}, {}, {"crash": 1.0}, ask_again=False, train_s=60.0)
    [record] = play(tmp_path, config, grid_of(honest), scene).rounds
    assert record["refusals"] == {"flower-8": 1}
    assert happened(record) == {"crashes": 1}
    assert record["simulated_seconds"] == 60.0


def test_who_crashed_is_asked_again_and_loses_only_time(tmp_path: Path) -> None:
    config = small(sites={"min": 10}, federation={"rounds": 3}, **QUIET)
    played = play(tmp_path, config, grid_of(honest, 10), scenario({"crash": 0.3}, train_s=60.0))
    assert [len(r["sites"]) for r in played.rounds] == [10, 10, 10]
    assert all(r["refusals"] == {} for r in played.rounds)
    crashes = sum(r["scenario"]["crashes"] for r in played.rounds)
    assert 3 <= crashes <= 30  # 30 good answers at 0.3: 12.9 expected
    assert all(r["simulated_seconds"] > 60.0 for r in played.rounds if r["scenario"]["crashes"])


def test_no_site_is_asked_outside_its_hours(tmp_path: Path) -> None:
    config = small(sites={"min": 2, "quorum": 0.5}, federation={"rounds": 6})
    scene = scenario(
        {"hours": [20, 4], "offset_hours": [0, 3, -6]}, start_hour=12.0, train_s=7200.0
    )
    asked: list[tuple[int, float]] = []

    class Noting(ScenarioGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            listed = list(messages)
            for meta in (m.metadata for m in listed if m.metadata.message_type == "train"):
                asked.append((meta.dst_node_id, played_clock.now_s))
            return super().push_messages(listed)

    played_clock = SimClock()
    grid = Noting(grid_of(honest, 5), scene, played_clock, config)
    done = coordinate(
        tmp_path,
        config,
        grid,
        clock=played_clock.monotonic,
        sleep=played_clock.sleep,
        added=grid.added,
        patience_s=1e6,
    )
    offsets = {node: (0, 3, -6)[(node - 1) % 3] for node in range(1, 6)}
    hours = {(node, round((12 + offsets[node] + now_s / HOUR_S) % 24, 6)) for node, now_s in asked}
    assert len(hours) > 10
    assert all(hour >= 20 or hour < 4 for _, hour in hours)
    assert played_clock.now_s > 24 * HOUR_S  # it went over more than one night
    assert {r["scenario"]["unavailable"] for r in done.outcome.history} - {0}


def test_too_few_sites_are_waited_for_as_long_as_the_patience_lasts(tmp_path: Path) -> None:
    config = small(sites={"min": 3})
    gone = {"hours": [0, 0.001], "offset_hours": [8]}
    with pytest.raises(RoundError, match="of 3 sites can take part"):
        play(tmp_path, config, grid_of(honest), scenario(gone, {}, {}, patience_days=0.25))


@pytest.mark.parametrize("attack", ["sign-flip", "scale", "constant"])
def test_a_hostile_site_moves_the_arrays_as_its_attack_says(tmp_path: Path, attack: str) -> None:
    config = small(federation={"rounds": 1})
    scene = scenario({}, {}, {"hostile": attack, "strength": 4.0})
    played = play(tmp_path, config, grid_of(honest), scene)
    [hostile] = [n for n, s in played.grid._sites.items() if s.group.hostile]
    factor = -4.0 if attack == "sign-flip" else 4.0  # site-N sends N everywhere, its own rms
    mean = sum(n * n * (factor if n == hostile else 1.0) for n in (1, 2, 3)) / 6
    np.testing.assert_allclose(played.done.outcome.vector, np.full(7, mean), rtol=1e-6)
    assert happened(played.rounds[0]) == {"hostile": 1}


def test_a_straggler_is_late_and_counts_as_stale(tmp_path: Path) -> None:
    config = small(federation={"rounds": 2}, **SITES_2, **QUIET)
    scene = scenario({}, {}, {"slowness": 30.0}, train_s=60.0)  # 1800 s, over a deadline of 1000
    first, second = play(tmp_path, config, grid_of(honest), scene).rounds
    assert [first["simulated_seconds"], second["simulated_seconds"]] == [1000.0, 1000.0]
    assert (first["refusals"], second["refusals"]) == ({}, {"stale": 1})


def test_a_site_does_one_thing_at_a_time(tmp_path: Path) -> None:
    config = small(federation={"rounds": 5}, **SITES_2, **QUIET)
    scene = scenario({}, {}, {"slowness": 14.0}, train_s=100.0)
    played = play(tmp_path, config, grid_of(honest), scene)
    # Rounds of 1000 s; its replies come at 1400, 2800 and 4200 s: in the rounds 2, 3 and 5.
    stale = [r["refusals"].get("stale", 0) for r in played.rounds]
    assert stale == [0, 1, 1, 0, 1]


def test_what_has_come_is_handed_over_in_the_order_of_its_arrival() -> None:
    scene = scenario({"slowness": 3.0}, {"slowness": 2.0}, {"slowness": 1.0}, train_s=10.0)
    grid = ScenarioGrid(grid_of(honest), scene, clock := SimClock(), small())
    ids = list(grid.push_messages(training(1, 2, 3)))
    assert list(grid.pull_messages(ids)) == []
    clock.now_s = 20.0
    early = [reply.metadata.src_node_id for reply in grid.pull_messages(ids)]
    clock.now_s = 30.0
    late = [reply.metadata.src_node_id for reply in grid.pull_messages(ids)]
    nodes = sorted(grid._sites.values(), key=lambda s: s.group.slowness)
    assert [early, late] == [[nodes[0].number, nodes[1].number], [nodes[2].number]]


def training(*nodes: int) -> list[Message]:
    request = TrainRequest(
        manifest="m", round=1, layout=LAYOUT.digest, vector=np.zeros(7, dtype=np.float32)
    )
    return [Message(encode(request), node, "train") for node in nodes]


def test_measured_takes_this_machines_seconds_from_the_second_round_on(tmp_path: Path) -> None:
    config = small(federation={"rounds": 2}, **QUIET)
    first, second = play(
        tmp_path, config, grid_of(honest), scenario(train_s=500.0, measured=True)
    ).rounds
    assert first["simulated_seconds"] == 500.0
    assert second["simulated_seconds"] < 5.0  # the fakes take well under a millisecond


def test_send_and_receive_gives_up_after_the_timeout() -> None:
    grid = ScenarioGrid(
        grid_of(honest, 2), scenario({}, {"drop_out": 1.0}), clock := SimClock(), small()
    )
    assert len(list(grid.send_and_receive(training(1, 2), timeout=300.0))) == 1
    assert clock.now_s == 300.0
