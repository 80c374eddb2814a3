"""Faults: what is done to a run, and at which moment of its second round."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.stage import SITES, Stage, wait_until

ROUND = 2
CUT_S = 90.0
FULL_S = 20.0
FIRST = SITES[0]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One disturbance."""

    name: str
    disturb: Callable[[Stage], None]
    needs_disks: bool = False


def at_train(one: Stage) -> None:
    """Wait until the round's training is on its way at the sites."""
    wait_until(lambda: ("opened", ROUND) in one.journal(), what="round 2")
    time.sleep(0.8)


def at_upload(one: Stage) -> None:
    """Wait until the first site's update has just left its worker."""
    wait_until(lambda: ("opened", ROUND) in one.journal(), what="round 2")
    before = one.sent(FIRST)
    wait_until(lambda: one.sent(FIRST) > before, what="an update")


def at_aggregate(one: Stage) -> None:
    """Wait until both updates have left: the coordinator is about to fold the last one in."""
    wait_until(lambda: ("opened", ROUND) in one.journal(), what="round 2")
    before = {name: one.sent(name) for name in SITES}
    wait_until(lambda: all(one.sent(n) > before[n] for n in SITES), what="both updates")
    time.sleep(0.3)


def at_checkpoint(one: Stage) -> None:
    """Wait until the round's checkpoint is being written."""
    assert one.order is not None
    folder = one.order.folder / "checkpoints"

    def begins() -> bool:
        names = [path.name for path in folder.glob("*")] if folder.is_dir() else []
        return any(f"round-{ROUND:06d}" in name for name in names)

    wait_until(begins, what="a checkpoint")


MOMENTS: dict[str, Callable[[Stage], None]] = {
    "train": at_train,
    "upload": at_upload,
    "aggregate": at_aggregate,
    "checkpoint": at_checkpoint,
}
TARGETS = (
    ("coordinator", "gate"),
    ("coordinator", "superlink"),
    ("coordinator", "serverapp"),
    (FIRST, "supernode"),
    (FIRST, "clientapp"),
    (FIRST, "worker"),
    (FIRST, "gate"),
)


def killing(who: str, what: str, moment: str) -> Fault:
    """Return a fault that kills a process at a moment."""

    def disturb(one: Stage) -> None:
        MOMENTS[moment](one)
        one.kill(who, what)

    return Fault(name=f"kill -9 {what} of {who} at {moment}", disturb=disturb)


def cutting() -> Fault:
    """Return a fault that cuts the network for a minute and a half."""

    def disturb(one: Stage) -> None:
        at_train(one)
        one.relay.cut()
        time.sleep(CUT_S)
        one.relay.mend()

    return Fault(name=f"network cut for {CUT_S:g} s", disturb=disturb)


def filling(name: str, place: Callable[[Stage], Path]) -> Fault:
    """Return a fault that fills a disk for a while."""

    def disturb(one: Stage) -> None:
        wait_until(lambda: ("committed", 1) in one.journal(), what="round 1")
        filler = one.fill(place(one))
        time.sleep(FULL_S)
        filler.unlink()

    return Fault(name=f"disk full under {name}", disturb=disturb, needs_disks=True)


def faults() -> Iterator[Fault]:
    """Yield all of them."""
    for moment in MOMENTS:
        for who, what in TARGETS:
            yield killing(who, what, moment)
    yield cutting()
    yield filling("the coordinator's journal and checkpoints", lambda s: s.net.coordinator / "runs")
    yield filling("a site's ledger", lambda s: s.net.folder / FIRST / "ledger")
    yield filling("a site's journal", lambda s: s.net.folder / FIRST / "state")
