"""Office: the coordinator's host, on which ServerApps run one after another until the run is over.

The run's own code is the product's, from `run_federation` down. Only the model is not there, and
clock, calendar, files and grid are simulated: whichever clock the product chose has its twin here.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np

from intramural.core.canonical import digest_vector
from intramural.core.errors import IntramuralError, RoundError
from intramural.core.journal import Journal
from intramural.server import run
from intramural.server.checkpoint import Checkpoint
from intramural.server.coordinator import Coordinator
from intramural.server.deployed import MENDED
from intramural.server.directory import Manners
from intramural.server.export import Beginning
from intramural.server.lost import Again
from intramural.server.run import Deployment, RunPlan, run_federation
from intramural.server.seals import CoordinatorSeals
from intramural.server.setting import Setting
from intramural.server.watcher import Watcher
from intramural.strategies.registry import make_rule
from intramural.strategies.rule import Rule
from intramural.trust.roster import Roster, sign_roster
from tests.server.fakes import BASE, LAYOUT
from tests.simworld.clock import Clock, WallClock
from tests.simworld.disk import Disk, Killed
from tests.simworld.net import LinkLost, SimGrid
from tests.simworld.plan import Plan
from tests.simworld.site import COORDINATORS
from tests.trust.members import entry_of

End = Literal["finished", "failed", "died", "mended"]
"""Mended: it stopped for its disk's sake, and is to be started again."""
AGAIN = Again()
BEGINNING = Beginning(
    layout=LAYOUT, vector=np.zeros(LAYOUT.size, dtype=np.float32), base=BASE, parameters=LAYOUT.size
)


class Office:
    """Runs ServerApps."""

    def __init__(
        self,
        plan: Plan,
        home: Path,
        disk: Disk,
        clock: Clock,
        *,
        rule: Callable[[Rule], Rule],
        taken_up: Callable[[int, str], None],
        sleeping: Callable[[], None],
    ) -> None:
        """Use a folder of its own.

        Args:
            plan: The world's.
            home: The coordinator's folder.
            disk: Its disk.
            clock: The world's.
            rule: Puts something around the run's rule.
            taken_up: Told of the round and arrays a process begins with.
            sleeping: Called whenever the coordinator goes to sleep; time passes in it.
        """
        self._plan = plan
        self._rule = rule
        self._taken_up = taken_up
        self._sleeping = sleeping
        self._clock = clock
        self.disk = disk
        self.wall = WallClock(clock)
        self.folder = home / "runs" / "one"
        self._roster = home / "roster.json"
        self._roster.write_text(_roster(tuple(plan.names)))
        self.frozen_s = 0.0
        """For how long the process stops at its next sleep, as by SIGSTOP."""
        self.error = ""
        """Why the run failed, or stopped."""
        self.report: dict[str, Any] = {}

    def serve(self, grid: SimGrid, watcher: Watcher) -> End:
        """Work on the run until it ends or the process does."""
        self.disk.revive()
        federation = self._plan.federation
        plan = RunPlan(federation=federation, folder=self.folder, resume=True)
        try:
            with self.disk.acting(), self._simulated():
                deployment = Deployment(
                    seals=CoordinatorSeals(COORDINATORS, self._roster),
                    manners=Manners(),
                    again=AGAIN,
                    takeover_s=0.0,
                )
                self.report = run_federation(plan, grid, watcher=watcher, deployment=deployment)
        except (Killed, LinkLost):
            return "died"
        except IntramuralError as error:
            self.error = str(error)
            if isinstance(error, MENDED) or not self.disk.is_good:
                return "mended"
            if isinstance(error, RoundError):
                return "failed"
            raise
        except OSError as error:
            self.error = str(error)
            if self.disk.is_good:
                raise
            return "mended"
        return "finished"

    @contextmanager
    def _simulated(self) -> Iterator[None]:
        fakes: dict[str, Any] = {
            "beginning": lambda *_: BEGINNING,
            "save_final": lambda *_: None,
            "run_report": _report,
            "site_statement": lambda *_: None,  # composing takes time
            "make_rule": self._ruled,
            "Setting": self._set,
            "Journal": partial(Journal, now=self.wall.now),
            "Coordinator": self._coordinator,
        }
        with ExitStack() as stack:
            for name, fake in fakes.items():
                stack.enter_context(mock.patch.object(run, name, fake))
            yield

    def _ruled(self, *of: Any, **rest: Any) -> Rule:
        return self._rule(make_rule(*of, **rest))

    def _set(self, **fields: Any) -> Setting:
        """Return the setting that the product chose, in simulated time."""
        setting = Setting(**fields)
        clocks = {time.monotonic: self._clock.monotonic, time.time: self.wall.time}
        assert setting.sleep is time.sleep
        return replace(setting, clock=clocks[setting.clock], sleep=self._sleep)

    def _sleep(self, pause_s: float) -> None:
        self._sleeping()
        self._clock.sleep(pause_s)
        frozen_s, self.frozen_s = self.frozen_s, 0.0
        self._clock.advance(self._clock.now_s + frozen_s)
        if self.disk.dead:
            raise Killed

    def _coordinator(self, setting: Setting, start: Checkpoint) -> Coordinator:
        self._taken_up(start.round, digest_vector(start.vector))
        return Coordinator(setting, start)


def _report(federation: Any, first: Any, outcome: Any, *, digest: str, **_: Any) -> dict[str, Any]:
    """Stand in for the report, whose intervals take time."""
    return {"digest": digest, "rounds": outcome.history}


def _roster(names: tuple[str, ...]) -> str:
    roster = Roster(federation="tiny", version=1, sites=tuple(entry_of(name) for name in names))
    return json.dumps(sign_roster(roster, COORDINATORS))
