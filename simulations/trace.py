"""Trace: where a simulation's time goes, a span for each delivery, phase and round.

The file is Chrome's trace-event JSON: open it in https://ui.perfetto.dev, which reads it in the
browser and uploads nothing.
"""

import json
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from intramural.core.files import write_atomic
from intramural.server.watcher import Watcher

if TYPE_CHECKING:
    from intramural.simulations.grid import Delivery

TRACE: Final = "trace.json"
EVENTS_MAX: Final = 20_000
"""Spans kept; the oldest are dropped."""
COORDINATOR, WORKERS = 1, 2
"""Process numbers in the trace, which are none of the machine's."""
ROUNDS, PHASES = 1, 2
"""Thread numbers of the coordinator's spans; those of a worker are its number + 1."""
COST_SHARE_MAX: Final = 0.05
"""Share of the run's time that writing the file may take: short rounds do not each write it."""


class Tracer(Watcher):
    """Writes trace.json, and passes everything on to another watcher.

    A Grid's deliveries are given to `delivered`. Spans of one worker do not overlap, as a worker
    delivers one message at a time. The file is replaced whole after a committed round, so it can be
    read at any time; `close` writes the rest. It tells node numbers and times, and no record.
    """

    def __init__(
        self,
        path: Path,
        inner: Watcher | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        events_max: int = EVENTS_MAX,
    ) -> None:
        """Write to `path`; `clock` must be the deliveries' own."""
        self._path = path
        self._inner = inner or Watcher()
        self._clock = clock
        self._origin_s = clock()
        self._events: deque[str] = deque(maxlen=events_max)
        self._count = 0
        self._workers: set[int] = set()
        self._round: tuple[int, float] | None = None
        self._phase: tuple[str, float] | None = None
        self._next_write_s = self._origin_s

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def delivered(self, delivery: "Delivery") -> None:
        """Add one delivery."""
        self._workers.add(delivery.worker)
        self._add(
            f"{delivery.kind} node {delivery.node}",
            (delivery.began_s, delivery.ended_s),
            place=(WORKERS, delivery.worker + 1),
            category=delivery.kind,
            node=delivery.node,
            failed=delivery.failed,
        )

    def opened(self, round_: int, sites: list[str]) -> None:
        """Begin a round, or another attempt at it."""
        if self._round is None or self._round[0] != round_:
            self._end_round()
            self._round = (round_, self._clock())
        self._begin_phase("train", sites=len(sites))
        self._inner.opened(round_, sites)

    def evaluating(self, round_: int, split: str, sites: list[str]) -> None:
        """End training, begin an evaluation."""
        self._begin_phase(f"evaluate on {split}", sites=len(sites))
        self._inner.evaluating(round_, split, sites)

    def committed(self, record: dict[str, Any]) -> None:
        """End the round, and write the file."""
        self._end_round()
        now_s = self._clock()
        if now_s >= self._next_write_s:
            self._write()
            ended_s = self._clock()
            self._next_write_s = ended_s + (ended_s - now_s) / COST_SHARE_MAX
        self._inner.committed(record)

    def waiting(self, reason: str) -> None:
        """Pass it on."""
        self._inner.waiting(reason)

    def answered(self, site: str, phase: str, *, good: bool, reason: str) -> None:
        """Pass it on."""
        self._inner.answered(site, phase, good=good, reason=reason)

    def noticed(self, line: str) -> None:
        """Pass it on."""
        self._inner.noticed(line)

    def progressed(self, what: str, done: int, total: int) -> None:
        """End the last test, which nothing else ends, and pass it on."""
        self._end_round()
        self._inner.progressed(what, done, total)

    def close(self) -> None:
        """End what is open, and write the file."""
        self._end_round()
        self._write()

    def _begin_phase(self, name: str, *, sites: int) -> None:
        self._end_phase()
        self._phase = (f"{name}, {sites} sites", self._clock())

    def _end_phase(self) -> None:
        if self._phase is not None:
            name, began_s = self._phase
            span = (began_s, self._clock())
            self._add(name, span, place=(COORDINATOR, PHASES), category="phase")
            self._phase = None

    def _end_round(self) -> None:
        self._end_phase()
        if self._round is not None:
            number, began_s = self._round
            span = (began_s, self._clock())
            self._add(f"round {number}", span, place=(COORDINATOR, ROUNDS), category="round")
            self._round = None

    def _add(
        self,
        name: str,
        span: tuple[float, float],
        *,
        place: tuple[int, int],
        category: str,
        **args: Any,
    ) -> None:
        """Add a complete event; times are microseconds since the trace began."""
        began_us, ended_us = (round(1e6 * (at - self._origin_s), 3) for at in span)
        event = {
            "name": name,
            "cat": category,
            "ph": "X",
            "ts": began_us,
            "dur": max(0.0, round(ended_us - began_us, 3)),
            "pid": place[0],
            "tid": place[1],
            "args": args,
        }
        self._events.append(json.dumps(event))  # once, so that writing the file is a join
        self._count += 1

    def _write(self) -> None:
        events = ",\n".join([*map(json.dumps, self._names()), *self._events])
        dropped = self._count - len(self._events)
        beside = json.dumps({"spans_dropped": dropped})
        text = f'{{"displayTimeUnit":"ms","otherData":{beside},"traceEvents":[\n{events}\n]}}\n'
        write_atomic(self._path, text.encode())

    def _names(self) -> list[dict[str, Any]]:
        """Return the metadata that names processes and threads."""
        processes = {COORDINATOR: "coordinator", WORKERS: "simulated sites"}
        threads = {(COORDINATOR, ROUNDS): "rounds", (COORDINATOR, PHASES): "phases"}
        threads |= {(WORKERS, w + 1): f"worker {w + 1}" for w in sorted(self._workers)}
        found = [
            {"name": "process_name", "ph": "M", "ts": 0, "pid": p, "tid": 0, "args": {"name": name}}
            for p, name in processes.items()
        ]
        return found + [
            {"name": "thread_name", "ph": "M", "ts": 0, "pid": p, "tid": t, "args": {"name": name}}
            for (p, t), name in threads.items()
        ]
