"""Follow: a watcher told of a deployed run's events, from the files that its ServerApp writes."""

import time
from collections.abc import Callable
from typing import Any

from intramural.core.errors import (
    ConfigError,
    Interrupted,
    IntramuralError,
    RoundError,
    RoundRefused,
)
from intramural.core.journal import scan
from intramural.server.commits import JOURNAL
from intramural.server.orders import NOW, Order
from intramural.server.standing import read_json
from intramural.server.watcher import Watcher

POLL_S = 0.5


ERRORS: dict[int, type[IntramuralError]] = {
    kind.exit_code: kind for kind in (RoundError, ConfigError, RoundRefused, Interrupted)
}
"""What to raise for a run's own exit code."""


def follow(
    order: Order, watcher: Watcher, *, sleep: Callable[[float], None] = time.sleep
) -> dict[str, Any]:
    """Tell the watcher of each event until the run is over; return the run's outcome.

    Raises:
        IntramuralError: The run ended with an error, whose message and exit code are kept.
        Interrupted: It was stopped.
    """
    told, shown = 0, None
    while True:
        outcome, standing = order.outcome, order.standing  # before the rest: then all is written
        entries = scan(order.folder / JOURNAL).entries
        for entry in entries[told:]:
            if entry.kind == "committed":
                watcher.committed({k: v for k, v in entry.body.items() if k != "digest"})
        told = len(entries)
        now = read_json(order.folder / NOW)
        if now is not None and now != shown:
            _show(now, watcher)
            shown = now
        if outcome is not None:
            if outcome["error"] is not None:
                kind = ERRORS.get(outcome["exit_code"], RoundError)
                raise kind(f"{order.name}: {outcome['error']}")
            return outcome
        if standing == "stopped":
            raise Interrupted(f"{order.name}: stopped; go on with `server run --resume`")
        sleep(POLL_S)


def _show(now: dict[str, Any], watcher: Watcher) -> None:
    if now["doing"] == "training":
        watcher.opened(now["round"], now["asked"])
        for site in now["answered"]:
            watcher.answered(site, "train", good=True, reason="")
    elif str(now["doing"]).startswith("evaluating"):
        watcher.evaluating(now["round"], str(now["doing"]).split()[-1], now["asked"])
    elif not now["asked"]:
        watcher.waiting(now["doing"])
