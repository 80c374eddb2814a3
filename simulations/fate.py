"""Fate: when the reply to a message comes over a simulated line, and what befalls it."""

from dataclasses import dataclass
from math import exp, inf

import numpy as np
from flwr.common.constant import ErrorCode

from intramural.simulations.hardware import MEGABIT
from intramural.simulations.presence import Presence
from intramural.simulations.scenario import Group

SILENT_S = 42.0
"""From a node's last sign of life to Flower's error for what it was asked; as seen of Flower."""


@dataclass(frozen=True, kw_only=True)
class Errand:
    """A message to a site, in numbers."""

    now_s: float
    """When it is sent."""
    down_bytes: int
    up_bytes: int
    """Size of the reply."""
    work_s: float
    """Compute seconds at a site of slowness 1."""
    ttl_s: float
    """How long Flower keeps the message."""
    line_mbps: float = inf
    """The coordinator's line, as far as this message has it."""
    busy_until_s: float = 0.0
    """Until then the site works on what it was asked before."""
    trains: bool = False
    """Drop-outs and crashes come over training alone."""


@dataclass(frozen=True, kw_only=True)
class Fate:
    """What comes of a message."""

    at_s: float
    """When the reply, or Flower's error in its place, is at the coordinator."""
    busy_until_s: float
    """Until then the site works on it."""
    error: int | None = None
    """Flower's code; None: the site's own reply."""
    cause: str = ""
    """Why there is an error: 'drop_outs', 'crashes', 'left' or 'expired', as they are counted."""


def fate_of(errand: Errand, group: Group, presence: Presence, rng: np.random.Generator) -> Fate:
    """Return what comes of a message to a site of this group.

    Down-link, then compute, then up-link. A node that is away for `SILENT_S` answers with Flower's
    error and its work is lost; a shorter absence only delays the reply. The number of draws from
    `rng` is fixed.
    """
    chances = rng.random(3)
    spread = [exp(group.jitter * z) for z in rng.standard_normal(3)]
    down_s, up_s = (
        group.latency_s + _transfer_s(size, min(mbps or inf, errand.line_mbps)) * factor
        for size, mbps, factor in (
            (errand.down_bytes, group.down_mbps, spread[0]),
            (errand.up_bytes, group.up_mbps, spread[2]),
        )
    )
    begun_s = max(errand.now_s + down_s, errand.busy_until_s)
    work_s = errand.work_s * group.slowness * spread[1]
    done_s = begun_s + work_s
    fate = Fate(at_s=done_s + up_s, busy_until_s=done_s)
    if errand.trains and chances[0] < group.drop_out:
        fate = _expired(errand, done_s, "drop_outs")
    elif errand.trains and chances[0] < group.drop_out + group.crash:
        died_s = begun_s + float(chances[1]) * work_s
        code = ErrorCode.CLIENT_APP_CRASHED
        fate = Fate(at_s=died_s + group.latency_s, busy_until_s=died_s, error=code, cause="crashes")
    fate = _with_absences(fate, errand.now_s, presence)
    if fate.at_s > errand.now_s + errand.ttl_s:
        return _expired(errand, fate.busy_until_s, fate.cause or "expired")
    return fate


def _transfer_s(size: int, mbps: float) -> float:
    """Return how long so many bytes take at so many megabits a second."""
    return 8 * size / (mbps * MEGABIT)


def _expired(errand: Errand, busy_until_s: float, cause: str) -> Fate:
    return Fate(
        at_s=errand.now_s + errand.ttl_s,
        busy_until_s=busy_until_s,
        error=ErrorCode.MESSAGE_UNAVAILABLE,
        cause=cause,
    )


def _with_absences(fate: Fate, now_s: float, presence: Presence) -> Fate:
    """Return the fate when the site's comings and goings are looked at as well."""
    at_s, look_s = fate.at_s, now_s
    while True:
        gone_s = presence.next_change(look_s) if presence.is_here(look_s) else look_s
        if gone_s >= at_s:
            break
        back_s = presence.next_change(gone_s)
        if back_s - gone_s >= SILENT_S:
            return Fate(
                at_s=gone_s + SILENT_S,
                busy_until_s=fate.busy_until_s,
                error=ErrorCode.NODE_UNAVAILABLE,
                cause=fate.cause or "left",
            )
        at_s, look_s = max(at_s, back_s), back_s
    return Fate(at_s=at_s, busy_until_s=fate.busy_until_s, error=fate.error, cause=fate.cause)
