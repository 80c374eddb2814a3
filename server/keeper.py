"""Keeper: sees to it that a ServerApp works on every run that is wanted, whatever dies."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from intramural.core.bundle import write_bundle
from intramural.core.canonical import canonical_json
from intramural.core.errors import RoundError
from intramural.server.flwr_cli import CONNECTION, call_flwr
from intramural.server.orders import Order, orders

START_S = 45.0
"""How long a submitted ServerApp may take until it holds the run's folder."""
PAUSE_S = 5.0
"""Least pause between two submissions of one run: Flower's own end of the old one takes a while."""

log = logging.getLogger(__name__)


class Keeper:
    """Submits and stops runs on a SuperLink, by what their folders and locks say."""

    def __init__(
        self, home: Path, env: dict[str, str], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Keep the runs in `home`, through `flwr` in the environment `env`."""
        self._home = home
        self._env = env
        self._clock = clock
        self._due: dict[str, float] = {}
        self._flower_ids: dict[str, str] = {}

    def superlink_started(self) -> None:
        """Forget what was submitted to a SuperLink that is no more."""
        self._due.clear()
        self._flower_ids.clear()

    def tend(self) -> None:
        """Look once at each run; a run that cannot be submitted now is tried again later."""
        for order in orders(self._home):
            try:
                self._tend(order)
            except (RoundError, OSError) as error:  # a full disk, too, passes
                log.warning("%s: %s", order.name, error)
                self._due[order.name] = self._clock() + PAUSE_S

    def _tend(self, order: Order) -> None:
        standing = order.standing
        if standing != "wanted":
            if standing == "stopped" and order.name in self._flower_ids:
                self._stop(order)
            return
        if order.is_worked_on:
            self._due[order.name] = self._clock() + PAUSE_S
        elif self._clock() >= self._due.get(order.name, 0.0):
            self._stop(order)  # what Flower still thinks of the process that died
            self._submit(order)

    def _submit(self, order: Order) -> None:
        settings = {
            "manifest": order.envelope,
            "out": str(order.folder.resolve()),
            "models": canonical_json(order.places).decode(),
            "holdout": order.holdout,
            "coordinator": str(self._home.resolve()),
        }
        app, run = write_bundle(order.folder / "bundle", settings)
        answer = call_flwr(self._env, "run", str(app), CONNECTION, "--run-config", str(run))
        self._flower_ids[order.name] = str(answer["run-id"])
        self._due[order.name] = self._clock() + START_S
        log.info("%s: submitted", order.name)

    def _stop(self, order: Order) -> None:
        flower_id = self._flower_ids.pop(order.name, None)
        if flower_id is None:
            return
        try:
            call_flwr(self._env, "stop", flower_id, CONNECTION)
        except RoundError as error:  # it has ended by itself, most often
            log.info("%s: %s", order.name, error)
