"""Watcher: who is told how a run goes; a screen, a log, a test."""

import logging
from typing import Any


class Watcher:
    """Told of a run's events; does nothing unless a subclass does."""

    def waiting(self, reason: str) -> None:
        """Nothing happens, for this reason."""

    def opened(self, round_: int, sites: list[str]) -> None:
        """A round's training was asked of these sites."""

    def answered(self, site: str, phase: str, *, good: bool, reason: str) -> None:
        """A site answered; `reason` says why it does not count."""

    def evaluating(self, round_: int, split: str, sites: list[str]) -> None:
        """The arrays of a round are being evaluated."""

    def committed(self, record: dict[str, Any]) -> None:
        """A round is durable; `record` is its line of the report."""

    def noticed(self, line: str) -> None:
        """Something an operator should know."""

    def progressed(self, what: str, done: int, total: int) -> None:
        """Some work beside the rounds came so far."""


class LogWatcher(Watcher):
    """Writes a line an event to a logger."""

    def __init__(self, log: logging.Logger) -> None:
        """Write to `log`."""
        self._log = log

    def waiting(self, reason: str) -> None:
        """Log why nothing happens."""
        self._log.info("%s", reason)

    def opened(self, round_: int, sites: list[str]) -> None:
        """Log the cohort."""
        self._log.info("round %d: training at %s", round_, ", ".join(sites))

    def committed(self, record: dict[str, Any]) -> None:
        """Log the round's result."""
        shown = {k: round(v, 4) for k, v in record["metrics"].items()}
        self._log.info(
            "round %d: committed after %.1f s %s", record["round"], record["seconds"], shown
        )

    def noticed(self, line: str) -> None:
        """Log what an operator should know."""
        self._log.warning("%s", line)
