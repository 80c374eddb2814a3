"""The live view: a bar over the rounds, a line a round; plain lines where there is no terminal."""

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from intramural.server.watcher import Watcher

SHOWN = {"loss": "loss", "accuracy": "accuracy", "macro_f1": "macro-F1"}
"""Validation metrics of a round's line, by name; their column's title."""

LOOKS_S = 0.1
"""How often the bar moves at most: a simulation may have a thousand answers a second."""


class Screen(Watcher):
    """Shows a run; use as a context manager, so that the terminal is given back."""

    def __init__(
        self, console: Console, *, rounds: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Show on `console`, which may be no terminal: then lines alone are written."""
        self._clock = clock
        self._console = console
        self._rounds = rounds
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.1f}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._round = 0
        self._expected = 0
        self._answers = 0
        self._since_s = 0.0
        """When the phase under way began."""
        self._shown_s = -LOOKS_S
        self._heading = False

    def __enter__(self) -> "Screen":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def waiting(self, reason: str) -> None:
        """Show why nothing happens."""
        self._bar("rounds", 0, self._rounds, note=reason)

    def opened(self, round_: int, sites: list[str]) -> None:
        """Show which round is trained."""
        self._begin(round_, sites)
        self._bar("rounds", round_ - 1, self._rounds, note=f"round {round_}: training")

    def answered(self, site: str, phase: str, *, good: bool, reason: str) -> None:
        """Show how many sites have answered, how fast, and how long the others will take."""
        self._answers += 1
        now_s = self._clock()
        if now_s - self._shown_s < LOOKS_S and self._answers < self._expected:
            return
        self._shown_s = now_s
        trains = phase == "train"
        note = (
            f"{'training' if trains else 'evaluating'}: {self._answers} of {self._expected} sites"
        )
        if now_s > self._since_s:
            rate = self._answers / (now_s - self._since_s)
            left_s = max(0, self._expected - self._answers) / rate
            note += f", {rate:.{0 if rate >= 10 else 1}f} a second, {left_s:.0f} s left"
        done = self._round - 1 + (self._answers / self._expected if trains else 1.0)
        if "rounds" in self._tasks and phase != "test":
            self._progress.update(self._tasks["rounds"], completed=done, note=note)
        elif "rounds" in self._tasks:
            self._progress.update(self._tasks["rounds"], note=note)

    def _begin(self, round_: int, sites: list[str]) -> None:
        self._round, self._expected, self._answers = round_, len(sites), 0
        self._since_s, self._shown_s = self._clock(), -LOOKS_S

    def evaluating(self, round_: int, split: str, sites: list[str]) -> None:
        """Show that the round is evaluated."""
        self._begin(round_, sites)

    def committed(self, record: dict[str, Any]) -> None:
        """Write the round's line."""
        self._bar("rounds", record["round"], self._rounds, note="")
        if not self._heading:
            self._heading = True
            titles = "".join(f"{title:>10}" for title in ("train loss", *SHOWN.values()))
            self._console.print(f"round sites {titles}        MB  seconds", style="bold")
        metrics = [record["metrics"].get(name) for name in SHOWN]
        cells = "".join(" " * 10 if v is None else f"{v:10.4f}" for v in metrics)
        megabytes = (record["bytes_up"] + record["bytes_down"]) / 1e6
        loss = record["train_loss"]
        cells = (" " * 10 if loss is None else f"{loss:10.4f}") + cells
        self._console.print(
            f"{record['round']:5d} {len(record['sites']):5d} {cells}"
            f"{megabytes:10.1f} {record['seconds']:8.1f}",
            highlight=False,
        )

    def noticed(self, line: str) -> None:
        """Write a line that an operator should see."""
        self._console.print(f"note: {line}", style="yellow", highlight=False)

    def progressed(self, what: str, done: int, total: int) -> None:
        """Show work beside the rounds; without a terminal, its end."""
        self._bar(what, done, total, note="")
        if done == total and not self._console.is_terminal:
            self._console.print(f"{what}: done", highlight=False)

    def _bar(self, what: str, done: int, total: int, *, note: str) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total, note=note)
        self._progress.update(self._tasks[what], completed=done, note=note)
