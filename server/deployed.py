"""A deployed run: the ServerApp's work on an order, with seals, patience and an outcome."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from intramural.core.errors import CheckpointError, IntramuralError, JournalError
from intramural.core.files import write_atomic, write_json
from intramural.server.directory import Manners
from intramural.server.folder import CoordinatorFolder
from intramural.server.lost import Again
from intramural.server.orders import NOW, Order
from intramural.server.report_html import render_html
from intramural.server.run import Deployment, RunPlan, run_federation
from intramural.server.seals import CoordinatorSeals
from intramural.server.watcher import Watcher
from intramural.trust.keys import PASSPHRASE, read_signing_key

TAKEOVER_S = 30.0
"""How long to wait for the ServerApp before this one, which dies within ten seconds of its link."""
MENDED = (JournalError, CheckpointError)
"""Errors that end no run: space is freed, and the supervisor has the run taken up again."""


def run_order(plan: RunPlan, grid: Grid, home: Path, *, watcher: Watcher) -> None:
    """Work on a run until it is over, and leave its outcome.

    A crash leaves none, so that the supervisor has the run taken up again.

    Args:
        plan: The run; its folder holds the order.
        grid: To the sites.
        home: The coordinator's folder, with keys and roster.
        watcher: Told of the run's events.
    """
    order = Order(folder=plan.folder)
    noted = Noted(watcher, plan.folder / NOW)
    try:
        place = CoordinatorFolder(root=home)
        key = read_signing_key(place.signing_key, passphrase=os.environ.get(PASSPHRASE))
        deployment = Deployment(
            seals=CoordinatorSeals(key, place.roster),
            manners=Manners(),
            again=Again(),
            takeover_s=TAKEOVER_S,
        )
        report = run_federation(plan, grid, watcher=noted, deployment=deployment)
        write_atomic(plan.folder / "report.html", render_html(report).encode())
    except IntramuralError as error:
        noted.noticed(str(error))
        if not isinstance(error, MENDED) and not order.is_worked_on:  # by another, who goes on
            order.end(error=str(error), exit_code=error.exit_code)
        raise
    order.end(error=None, exit_code=0)


class Noted(Watcher):
    """Keeps a small file on what happens now, for `server status`, and tells another watcher."""

    def __init__(
        self, inner: Watcher, path: Path, *, clock: Callable[[], float] = time.time
    ) -> None:
        """Write to `path` whenever something changes."""
        self._inner = inner
        self._path = path
        self._clock = clock
        self._now: dict[str, Any] = {"doing": "starting", "round": 0, "asked": [], "answered": []}

    def _note(self, **facts: Any) -> None:
        self._now |= facts
        with suppress(OSError):  # a full disk shall not end the run over what is only told
            write_json(self._path, self._now | {"since": round(self._clock(), 3)})

    def waiting(self, reason: str) -> None:
        """Note why nothing happens."""
        self._note(doing=reason, asked=[], answered=[])
        self._inner.waiting(reason)

    def opened(self, round_: int, sites: list[str]) -> None:
        """Note the cohort."""
        self._note(doing="training", round=round_, asked=sites, answered=[])
        self._inner.opened(round_, sites)

    def answered(self, site: str, phase: str, *, good: bool, reason: str) -> None:
        """Note who has answered."""
        self._note(answered=sorted({*self._now["answered"], site}))
        self._inner.answered(site, phase, good=good, reason=reason)

    def evaluating(self, round_: int, split: str, sites: list[str]) -> None:
        """Note who evaluates."""
        self._note(doing=f"evaluating on {split}", round=round_, asked=sites, answered=[])
        self._inner.evaluating(round_, split, sites)

    def committed(self, record: dict[str, Any]) -> None:
        """Note a durable round."""
        self._note(doing=f"round {record['round']} committed", asked=[], answered=[])
        self._inner.committed(record)

    def noticed(self, line: str) -> None:
        """Note what an operator should know."""
        self._note(noticed=line)
        self._inner.noticed(line)
