"""When a reply comes over a simulated line, with paper and pencil; and what attackers send."""

from typing import Any

import numpy as np
import pytest
from flwr.common.constant import ErrorCode

from intramural.core.layout import Vector
from intramural.simulations.fate import SILENT_S, Errand, Fate, fate_of
from intramural.simulations.hostile import attacked
from intramural.simulations.presence import HOUR_S, Presence
from intramural.simulations.scenario import Attack, Group

LINE: dict[str, Any] = {"latency_s": 0.25, "down_mbps": 10.0, "up_mbps": 10.0, "slowness": 2.0}
# 1.25 MB at 10 Mbit/s is 1 s, 2.5 MB is 2 s; 0.25 s each way, and 60 s of slowness 2
DOWN_S, WORK_S, UP_S = 1.25, 120.0, 2.25
SENT = 1000.0
TTL_S = 43_200.0


def fate(*, seed: int = 0, start_hour: float = 0.0, errand: Any = None, **keys: Any) -> Fate:
    group = Group.model_validate({"name": "site", "share": 1.0} | LINE | keys)
    presence = Presence(group, offset_h=0.0, start_hour=start_hour, rng=np.random.default_rng(seed))
    numbers: dict[str, Any] = {
        "now_s": SENT,
        "down_bytes": 1_250_000,
        "up_bytes": 2_500_000,
        "work_s": 60.0,
        "ttl_s": TTL_S,
        "trains": True,
    }
    return fate_of(Errand(**numbers | (errand or {})), group, presence, np.random.default_rng(seed))


def test_a_reply_comes_after_down_link_compute_and_up_link() -> None:
    found = fate()
    assert found.at_s == pytest.approx(SENT + DOWN_S + WORK_S + UP_S, abs=1e-9)
    assert found.busy_until_s == pytest.approx(SENT + DOWN_S + WORK_S, abs=1e-9)
    assert found.error is None


def test_the_thinner_of_both_lines_counts() -> None:
    shared = fate(errand={"line_mbps": 5.0})  # 2 s down and 4 s up, and the latencies
    assert shared.at_s == pytest.approx(SENT + 2.25 + WORK_S + 4.25, abs=1e-9)
    assert fate(errand={"line_mbps": 100.0}) == fate()
    free = fate(down_mbps=None, up_mbps=None)
    assert free.at_s == pytest.approx(SENT + 0.25 + WORK_S + 0.25, abs=1e-9)


def test_a_busy_site_begins_when_it_is_done_with_what_it_does() -> None:
    busy = fate(errand={"busy_until_s": SENT + 500.0})
    assert busy.at_s == pytest.approx(SENT + 500.0 + WORK_S + UP_S, abs=1e-9)
    assert fate(errand={"busy_until_s": SENT + 1.0}) == fate()  # before the request is there


def test_jitter_spreads_times_and_keeps_their_middle() -> None:
    times = [fate(seed=seed, jitter=0.5, errand={"down_bytes": 0}).at_s for seed in range(400)]
    works = [fate(seed=seed, jitter=0.5).busy_until_s for seed in range(400)]
    assert len(set(times)) == 400
    logs = np.log((np.array(works) - SENT - DOWN_S) / WORK_S)  # the down-link's own spread is small
    assert np.median(logs) == pytest.approx(0.0, abs=0.1)
    assert np.std(logs) == pytest.approx(0.5, abs=0.1)


def test_a_drop_out_is_what_flower_says_when_it_gives_a_request_up() -> None:
    found = fate(drop_out=1.0)
    assert (found.at_s, found.error, found.cause) == (
        *(SENT + TTL_S, ErrorCode.MESSAGE_UNAVAILABLE),
        "drop_outs",
    )
    assert fate(drop_out=1.0, errand={"trains": False}) == fate(errand={"trains": False})


def test_a_crash_comes_in_the_midst_of_the_work() -> None:
    found = [fate(seed=seed, crash=1.0) for seed in range(200)]
    assert {(f.error, f.cause) for f in found} == {(ErrorCode.CLIENT_APP_CRASHED, "crashes")}
    begun_s = SENT + DOWN_S + 0.25  # the error is small, and only takes the latency
    shares = np.array([(f.at_s - begun_s) / WORK_S for f in found])
    assert shares.min() >= 0
    assert shares.max() <= 1
    assert shares.mean() == pytest.approx(0.5, abs=0.1)  # uniform: 0.29 / sqrt(200) = 0.02


@pytest.mark.parametrize(("drop_out", "crash"), [(0.3, 0.0), (0.0, 0.3), (0.2, 0.4)])
def test_faults_come_as_often_as_they_should(drop_out: float, crash: float) -> None:
    causes = [fate(seed=seed, drop_out=drop_out, crash=crash).cause for seed in range(2000)]
    # four deviations of a share of 2000: at most 4 * 0.5 / sqrt(2000) = 0.045
    assert causes.count("drop_outs") / 2000 == pytest.approx(drop_out, abs=0.045)
    assert causes.count("crashes") / 2000 == pytest.approx(crash, abs=0.045)


def test_a_site_that_is_cut_off_loses_its_work() -> None:
    # Sent at 1000 s; the site's hours end at 1080 s, the reply would come at 1123.5 s.
    found = fate(hours=[0, 12], start_hour=12 - 1080 / HOUR_S)
    assert found.at_s == pytest.approx(1080 + SILENT_S, abs=1e-6)
    assert (found.error, found.cause) == (ErrorCode.NODE_UNAVAILABLE, "left")
    in_time = fate(hours=[0, 12], start_hour=12 - 1124 / HOUR_S)
    assert in_time == fate()


def test_a_short_absence_only_delays_the_reply() -> None:
    # Away from 1110 s to 1130 s every day, 20 s; the reply would come at 1123.5 s.
    found = fate(hours=[0, 24 - 20 / HOUR_S], start_hour=-1130 / HOUR_S % 24)
    assert found.at_s == pytest.approx(1130, abs=1e-6)
    assert found.error is None


def test_a_request_to_a_site_that_is_away_fails_after_a_silence() -> None:
    found = fate(hours=[9, 17], start_hour=20.0)
    assert (found.at_s, found.error) == (SENT + SILENT_S, ErrorCode.NODE_UNAVAILABLE)


def test_a_reply_later_than_flower_keeps_the_request_is_lost() -> None:
    found = fate(slowness=1000.0)  # 60 000 s
    assert (found.at_s, found.error, found.cause) == (
        *(SENT + TTL_S, ErrorCode.MESSAGE_UNAVAILABLE),
        "expired",
    )


DELTA: Vector = np.array([3.0, -4.0, 0.0, 0.0], dtype=np.float32)  # root mean square 2.5


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        ("sign-flip", [-6.0, 8.0, 0.0, 0.0]),
        ("scale", [6.0, -8.0, 0.0, 0.0]),
        ("constant", [5.0, 5.0, 5.0, 5.0]),
    ],
)
def test_an_attack_makes_of_an_update_what_it_says(attack: Attack, expected: list[float]) -> None:
    found = attacked(DELTA, attack, strength=2.0, rng=np.random.default_rng(0))
    assert found.dtype == np.dtype("<f4")
    assert found.tolist() == expected


def test_hostile_noise_has_its_strength() -> None:
    delta: Vector = np.tile(DELTA, 5000)
    found = attacked(delta, "noise", strength=2.0, rng=np.random.default_rng(0))
    assert found.std() == pytest.approx(5.0, rel=0.03)  # deviation of the deviation: 0.5 %
    assert abs(found.mean()) < 0.2
    assert abs(np.corrcoef(found, delta)[0, 1]) < 0.05
