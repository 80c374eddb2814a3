"""FedBuff on a simulated clock: who counts when, and what is refused."""

from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.common.constant import ErrorCode

from intramural.core.errors import ConfigError
from intramural.core.messages import Refusal, Reply, Request, TrainRequest
from intramural.core.site import load_site
from intramural.server.checkpoint import load_checkpoint
from intramural.server.lost import Again
from intramural.simulations.scenario import COLLUSIVE
from intramural.simulations.scenario_grid import ScenarioGrid
from intramural.simulations.sim_clock import SimClock
from intramural.simulations.simulate import Simulation, simulate
from intramural.simulations.sites import Deal
from tests.server.fakes import Seen, SlowGrid, app_of, coordinate, grid_of, honest, small
from tests.simulations.buffered import FAST, ROUNDS, SLOW, buffered, committed, learning, play, told
from tests.simulations.plays import scenario
from tests.tiny import Json, rows, site


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


LEFT = f"flower-{ErrorCode.NODE_UNAVAILABLE}"
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
    assert LEFT in {e.body["reason"] for e in done.journal if e.kind == "refused"}


def test_a_lost_request_is_given_up_at_its_deadline_and_not_repeated(tmp_path: Path) -> None:
    # one site leaves at 72 s until the next morning; another takes longer than all that
    fast, slow = {"share": 0.34}, {"share": 0.33, "slowness": 1000.0}
    scene = scenario(fast, slow, {"share": 0.33, "hours": (8.0, 9.02)}, train_s=120.0)
    config = buffered(federation={"rounds": 1}, sites={"deadline_s": 150.0})
    done = play(tmp_path, config, scene, nodes=3, again=True)
    kinds = [e.kind for e in done.journal if e.kind not in ("refused", "committed")]
    assert "asked-again" not in kinds  # it would repeat a request of the day before
    assert kinds[:3] == ["opened", "lack", "opened"]
    (record,) = done.outcome.history
    # from 9 o'clock to 8 the next morning; then it trains, and both evaluate
    assert record["scenario"]["at_s"] == 23 * 3600.0 + 120.0 + 5.0


def test_a_lost_request_is_given_up_once_the_buffer_is_full(tmp_path: Path) -> None:
    # site 3 of 3 leaves at 72 s, which is known at 114 s; the others have trained by 120 s
    leaver = {"share": 0.33, "latency_s": 0.01, "hours": (8.0, 9.02)}
    scene = scenario({"share": 0.67, "latency_s": 0.01}, leaver, train_s=120.0)
    done = play(tmp_path, buffered(federation={"rounds": 1}), scene, nodes=3, again=True)
    (record,) = done.outcome.history
    assert len(record["sites"]) == 2
    assert record["refusals"] == {LEFT: 1}
    checkpoint, _ = load_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.flights == {}  # it is asked anew, from newer arrays


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


def test_sites_that_are_tried_again_within_one_clock_reading_are_asked_again(
    tmp_path: Path,
) -> None:
    asked: Counter[str] = Counter()

    def answer(site: str, request: Request) -> Reply:
        asked[site] += isinstance(request, TrainRequest)
        if isinstance(request, TrainRequest) and asked[site] == 1:
            return Refusal(site=site, reason="data", detail="not yet")
        return honest(site, request)

    looks = count()

    def sleep(pause_s: float) -> None:
        assert next(looks) < 100, "nobody is asked"

    config = buffered(federation={"rounds": 1})
    grid = grid_of(answer)
    done = coordinate(tmp_path, config, grid, clock=lambda: 0.0, sleep=sleep, patience_s=1.0)
    assert asked == {"site-1": 2, "site-2": 2, "site-3": 2}  # three refusals, then a new attempt
    assert len(done.outcome.history) == 1


def test_a_run_in_which_nobody_is_late_is_the_synchronous_one(tmp_path: Path) -> None:
    scene = scenario({"latency_s": 0.01})
    late = {"buffer": 3}
    with_buffer = play(tmp_path / "a", buffered(asynchrony=late), scene, nodes=3)
    plain = play(tmp_path / "b", small(federation={"rounds": ROUNDS}), scene, nodes=3)
    assert told(with_buffer) == told(plain)
    assert committed(with_buffer) == committed(plain)


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


@pytest.mark.parametrize("attack", sorted(COLLUSIVE))
def test_hostile_sites_that_collude_are_refused_with_late_updates(attack: str) -> None:
    # the group's honest updates of a round come over many: who knew which, nobody could say
    scene = scenario(FAST, SLOW | {"hostile": attack, "name": "gang"})
    with pytest.raises(ConfigError, match=f"'gang'.*{attack!r}.*asynchrony"):
        ScenarioGrid(grid_of(honest, nodes=5), scene, SimClock(), buffered())
    ScenarioGrid(grid_of(honest, nodes=5), scene, SimClock(), small())  # waits for its cohort


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
