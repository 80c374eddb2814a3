"""Accidents: what befalls a host, done to it."""

from functools import partial
from typing import TYPE_CHECKING

from tests.simworld.clock import Clock
from tests.simworld.plan import COORDINATOR, Accident
from tests.simworld.site import SimSite

if TYPE_CHECKING:
    from tests.simworld.world import World

OPERATIONS_AT_WORK = 12
"""A site's answer takes about so many disk operations."""
MESSAGES_AT_ONCE = 4
"""And a coordinator sends so many at once."""
HOUR_S = 3600.0


def befall(world: "World", accident: Accident) -> None:
    world.say(f"{accident.whom}: {accident.kind}")
    if accident.whom == COORDINATOR:
        _befall_coordinator(world, accident)
    else:
        _befall_site(world.clock, world.sites[accident.whom], accident)


def _befall_coordinator(world: "World", accident: Accident) -> None:
    office, disk = world.office, world.office.disk
    match accident.kind:
        case "kill":
            disk.dead, world.loses_power = True, accident.power
        case "dies":
            disk.die(after=accident.operation, how=accident.how)
            world.loses_power = accident.power
        case "push":
            world.pushes_left = accident.operation % MESSAGES_AT_ONCE
        case "link" if world.grid is not None:
            world.grid.lost = True
            world.up_s = world.clock.now_s + accident.lasts_s
        case "full":
            disk.full = True
            world.clock.after(accident.lasts_s, disk.heal)
        case "fsync":
            disk.fsync_fails, disk.truncate_fails = True, accident.power
            world.clock.after(accident.lasts_s, disk.heal)
        case "clock":
            office.wall.skew_s += _set(accident)
        case "freeze":
            office.frozen_s += accident.lasts_s


def _befall_site(clock: Clock, site: SimSite, accident: Accident) -> None:
    match accident.kind:
        case "kill":
            site.dies_at_work(operation=accident.operation % OPERATIONS_AT_WORK, how=accident.how)
            site.dies(away_s=accident.lasts_s, same=accident.same, power=accident.power)
        case "worker":
            site.dies_at_work(operation=accident.operation % OPERATIONS_AT_WORK, how=accident.how)
            site.worker_dies(accident.lasts_s)
        case "dies":
            site.disk.die(after=accident.operation, how=accident.how)
            site.loses_power = accident.power
        case "cut":
            site.cut_off(accident.lasts_s)
        case "hang":
            site.hang(hung=True)
            clock.after(accident.lasts_s, partial(site.hang, hung=False))
        case "full":
            site.disk.full = True
            clock.after(accident.lasts_s, site.disk.heal)
        case "unstored":
            site.disk.stores_answers = False
            clock.after(accident.lasts_s, site.disk.heal)
        case "fsync":
            site.disk.fsync_fails, site.disk.truncate_fails = True, accident.power
            clock.after(accident.lasts_s, site.disk.heal)
        case "clock":
            site.wall.skew_s += _set(accident)


def _set(accident: Accident) -> float:
    """Return by how much somebody sets the clock: an hour forth or back."""
    return HOUR_S if accident.power else -HOUR_S
