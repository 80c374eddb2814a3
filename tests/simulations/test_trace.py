"""The trace: a file of the format that Perfetto reads, whose spans are where time went."""

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from intramural.server.watcher import Watcher
from intramural.simulations.grid import Delivery
from intramural.simulations.trace import COORDINATOR, EVENTS_MAX, WORKERS, Tracer
from tests.tiny import Json


def work(*, began_s: float, ended_s: float, **changes: Any) -> Delivery:
    facts: Json = {"node": 1, "kind": "train", "worker": 0, "failed": False} | changes
    return Delivery(began_s=began_s, ended_s=ended_s, **facts)


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Heard(Watcher):
    """Keeps the names of what it was told."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name in ("names", "__class__"):
            return super().__getattribute__(name)
        return lambda *_, **__: self.names.append(name)


def check_format(path: Path) -> list[Json]:
    """Return the spans of a file, once it is what the trace-event format asks for."""
    content = json.loads(path.read_text())
    assert isinstance(content["traceEvents"], list)
    for event in content["traceEvents"]:
        assert event["ph"] in ("X", "M")
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
        else:
            assert event["name"] in ("process_name", "thread_name")
            assert isinstance(event["args"]["name"], str)
    spans = [event for event in content["traceEvents"] if event["ph"] == "X"]
    named = {(e["pid"], e["tid"]) for e in content["traceEvents"] if e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in spans} <= named
    lanes = defaultdict(list)
    for span in spans:
        lanes[span["pid"], span["tid"]].append((span["ts"], span["ts"] + span["dur"]))
    for lane in lanes.values():
        lane.sort()
        assert all(end <= begin for (_, end), (begin, _) in pairwise(lane))
    return spans


def record(round_: int) -> Json:
    return {"round": round_, "metrics": {}, "seconds": 1.0}


def played(path: Path, clock: Clock, **options: Any) -> Tracer:
    """Play two rounds of two workers, and a test, on a clock that is set by hand."""
    tracer = Tracer(path, clock=clock, **options)
    for round_ in (1, 2):
        tracer.opened(round_, ["site-1", "site-2"])
        at = clock.now_s
        tracer.delivered(work(node=1, worker=0, began_s=at, ended_s=at + 2))
        tracer.delivered(work(node=2, worker=1, began_s=at, ended_s=at + 3, failed=round_ == 2))
        clock.now_s += 4
        tracer.evaluating(round_, "validation", ["site-1"])
        tracer.delivered(work(kind="evaluate", began_s=clock.now_s, ended_s=clock.now_s + 0.5))
        clock.now_s += 1
        tracer.committed(record(round_))
        clock.now_s += 0.25
    tracer.evaluating(2, "test", ["site-1", "site-2"])
    clock.now_s += 1
    return tracer


def test_rounds_phases_and_deliveries_are_spans_of_the_right_length(tmp_path: Path) -> None:
    played(tmp_path / "trace.json", Clock()).close()
    spans = check_format(tmp_path / "trace.json")
    coordinator = [(s["name"], s["ts"], s["dur"]) for s in spans if s["pid"] == COORDINATOR]
    assert sorted(coordinator) == sorted(
        [
            ("train, 2 sites", 0.0, 4e6),  # microseconds
            ("evaluate on validation, 1 sites", 4e6, 1e6),
            ("round 1", 0.0, 5e6),
            ("train, 2 sites", 5.25e6, 4e6),
            ("evaluate on validation, 1 sites", 9.25e6, 1e6),
            ("round 2", 5.25e6, 5e6),
            ("evaluate on test, 2 sites", 10.5e6, 1e6),
        ]
    )
    workers = [s for s in spans if s["pid"] == WORKERS]
    assert [(s["name"], s["tid"], s["dur"]) for s in workers[:3]] == [
        ("train node 1", 1, 2e6),
        ("train node 2", 2, 3e6),
        ("evaluate node 1", 1, 0.5e6),
    ]
    assert [s["args"]["failed"] for s in workers] == [False, False, False, False, True, False]


def test_the_file_is_whole_after_each_committed_round(tmp_path: Path) -> None:
    path, clock = tmp_path / "trace.json", Clock()
    tracer = Tracer(path, clock=clock)
    for round_ in (1, 2, 3):
        tracer.opened(round_, ["site-1"])
        clock.now_s += 1
        tracer.committed(record(round_))
        assert len([s for s in check_format(path) if s["name"].startswith("round")]) == round_


def test_writing_takes_no_more_than_a_twentieth_of_the_time(tmp_path: Path) -> None:
    path, clock = tmp_path / "trace.json", Clock()

    class OnASlowDisk(Tracer):
        def _write(self) -> None:
            super()._write()
            clock.now_s += 1

    def rounds_written(tracer: Tracer, round_: int, seconds: float) -> int:
        tracer.opened(round_, ["site-1"])
        clock.now_s += seconds
        tracer.committed(record(round_))
        return sum(span["cat"] == "round" for span in check_format(path))

    tracer = OnASlowDisk(path, clock=clock)
    assert rounds_written(tracer, 1, 1.0) == 1
    assert rounds_written(tracer, 2, 19.0) == 1  # a second's write has 20 s to wait for
    assert rounds_written(tracer, 3, 2.0) == 3


def test_a_round_tried_again_is_one_round_of_two_trainings(tmp_path: Path) -> None:
    path, clock = tmp_path / "trace.json", Clock()
    tracer = Tracer(path, clock=clock)
    for _ in range(2):
        tracer.opened(1, ["site-1"])
        clock.now_s += 1
    tracer.committed(record(1))
    names = [span["name"] for span in check_format(path)]
    assert names == ["train, 1 sites", "train, 1 sites", "round 1"]


def test_the_oldest_spans_are_dropped_and_counted(tmp_path: Path) -> None:
    path, clock = tmp_path / "trace.json", Clock()
    tracer = Tracer(path, clock=clock, events_max=5)
    for number in range(8):
        tracer.delivered(work(node=number, began_s=100.0 + number, ended_s=100.5 + number))
    tracer.close()
    spans = check_format(path)
    assert [span["args"]["node"] for span in spans] == [3, 4, 5, 6, 7]
    assert json.loads(path.read_text())["otherData"] == {"spans_dropped": 3}
    assert EVENTS_MAX == 20_000


def test_everything_told_is_passed_on(tmp_path: Path) -> None:
    heard = Heard()
    tracer = Tracer(tmp_path / "trace.json", heard, clock=Clock())
    tracer.waiting("for sites")
    tracer.opened(1, [])
    tracer.answered("site-1", "train", good=True, reason="")
    tracer.evaluating(1, "validation", [])
    tracer.committed(record(1))
    tracer.noticed("a line")
    tracer.progressed("pooled training", 1, 2)
    told = [n for n in vars(Watcher) if not n.startswith("_")]
    assert sorted(heard.names) == sorted(told)


def test_the_checker_of_the_format_sees_overlapping_spans(tmp_path: Path) -> None:
    tracer = Tracer(tmp_path / "trace.json", clock=Clock())
    tracer.delivered(work(began_s=100.0, ended_s=102.0))
    tracer.delivered(work(began_s=101.0, ended_s=103.0))
    tracer.close()
    with pytest.raises(AssertionError):
        check_format(tmp_path / "trace.json")
