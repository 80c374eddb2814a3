"""The live view: a bar over the rounds, a line a round; plain lines where there is no terminal."""

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from intramural.server.watcher import Watcher

SHOWN = {"loss": "loss", "accuracy": "accuracy", "macro_f1": "macro-F1"}
"""Validation metrics of a round's line, by name; their column's title."""


class Screen(Watcher):
    """Shows a run; use as a context manager, so that the terminal is given back."""

    def __init__(self, console: Console, *, rounds: int) -> None:
        """Show on `console`, which may be no terminal: then lines alone are written."""
        self._console = console
        self._rounds = rounds
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._expected = 0
        self._answers = 0
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
        self._expected, self._answers = len(sites), 0
        self._bar("rounds", round_ - 1, self._rounds, note=f"round {round_}: training")

    def answered(self, site: str, phase: str, *, good: bool, reason: str) -> None:
        """Show how many sites have answered."""
        self._answers += 1
        doing = "training" if phase == "train" else "evaluating"
        note = f"{doing}: {self._answers} of {self._expected} sites"
        if "rounds" in self._tasks:
            self._progress.update(self._tasks["rounds"], note=note)

    def evaluating(self, round_: int, split: str, sites: list[str]) -> None:
        """Show that the round is evaluated."""
        self._expected, self._answers = len(sites), 0

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
