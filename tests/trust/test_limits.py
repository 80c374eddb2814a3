"""Limits, quotas, tallies and alerts: arithmetic with a clock to set."""

from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from intramural.core.errors import ConfigError
from intramural.trust.alerts import KEPT, Alerts
from intramural.trust.counters import CONNECTED_S, Counters
from intramural.trust.denial import ENDING, STATUSES, Denied
from intramural.trust.limits import GateLimits, Quota, TokenBucket

BEGIN = datetime(2026, 11, 26, tzinfo=UTC)


class Clock:
    """Seconds and a time that move when told."""

    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s

    def now(self) -> datetime:
        return BEGIN + timedelta(seconds=self.s)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def taken(bucket: TokenBucket, asked: int) -> int:
    return sum(bucket.take() for _ in range(asked))


def test_a_bucket_gives_its_burst_and_then_its_rate(clock: Clock) -> None:
    bucket = TokenBucket(per_s=2, burst=5, clock=clock)
    assert taken(bucket, 10) == 5
    clock.s += 1.6
    assert taken(bucket, 10) == 3  # 1.6 s * 2 a second = 3.2
    clock.s += 0.4
    assert taken(bucket, 10) == 1  # 0.2 + 0.4 * 2 = 1
    clock.s += 1000
    assert taken(bucket, 10) == 5


def test_a_peers_quota_is_its_own_and_is_given_back(clock: Clock) -> None:
    limits = GateLimits(requests_at_once_max=2, connections_per_peer_max=1, requests_burst=4)
    quota = Quota(limits, clock=clock)
    with ExitStack() as stack:
        for peer in ("a", "a", "b"):
            stack.enter_context(quota.request(peer))
        with pytest.raises(Denied, match="busy"):
            stack.enter_context(quota.request("a"))
    with quota.request("a"):
        pass
    with pytest.raises(Denied, match="rate"):
        quota.request("a").__enter__()  # two, one in vain, one, and none is left of four
    with quota.connection("a"), pytest.raises(Denied, match="busy"):
        quota.connection("a").__enter__()
    with quota.connection("a"), quota.connection("b"):
        pass


@pytest.mark.parametrize("value", [0, -1, float("nan")])
@pytest.mark.parametrize("name", ["stall_s_max", "body_bytes_max", "requests_per_s"])
def test_a_limit_that_is_none_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be above 0"):
        GateLimits(**{name: value})  # type: ignore[arg-type]


def test_every_reason_has_an_answer_that_says_no_more() -> None:
    assert set(STATUSES) >= ENDING
    assert all(400 <= status < 600 for status in STATUSES.values())
    assert Denied("path").body == b"refused: path\n"
    with pytest.raises(AssertionError):
        Denied("/etc/passwd")


def test_a_tally_tells_who_is_connected(clock: Clock) -> None:
    counters = Counters(now=clock.now)
    counters.denied("b", "rate")
    counters.passed("a")
    counters.of("a").bytes_up += 7
    clock.s += CONNECTED_S
    assert [one["connected"] for one in counters.snapshot().values()] == [True, False]
    clock.s += 1
    assert counters.snapshot() == {
        "a": {
            "connected": False,
            "last_seen": "2026-11-26T00:00:00.000+00:00",
            "requests": 1,
            "bytes_up": 7,
            "bytes_down": 0,
            "refusals": {},
        },
        "b": {
            "connected": False,
            "last_seen": None,
            "requests": 0,
            "bytes_up": 0,
            "bytes_down": 0,
            "refusals": {"rate": 1},
        },
    }


def test_an_alert_is_told_once_a_minute_and_its_repetitions_are_counted(clock: Clock) -> None:
    told: list[dict[str, Any]] = []
    alerts = Alerts(told.append, now=clock.now)
    for second in (0, 1, 59, 60, 61, 200):
        clock.s = second
        alerts.tell("second-node", "a")
    alerts.tell("second-node", "b", silent_s=1.5)
    counts = [(one["time"][14:19], one["peer"], one["times"]) for one in told]
    assert counts == [("00:00", "a", 1), ("01:00", "a", 3), ("03:20", "a", 2), ("03:20", "b", 1)]
    assert told[-1]["silent_s"] == 1.5
    assert list(alerts.recent) == told


def test_alerts_of_what_peers_cannot_bring_about_are_all_told(clock: Clock) -> None:
    alerts = Alerts(lambda _: None, now=clock.now)
    for _ in range(KEPT + 5):
        alerts.tell("unreachable", always=True)
    assert [one["times"] for one in alerts.recent] == [1] * KEPT
