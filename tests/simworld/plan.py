"""Plan: all that one seed decides before its world begins: the federation, and what befalls it."""

import random
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

from intramural.core.federation import FederationConfig
from tests.client.member import PRIVATE
from tests.server.fakes import small
from tests.simworld.hostile import EVALUATED, UPDATES
from tests.simworld.net import Weather

Kind = Literal["plain", "private", "measured", "hidden"]
"""Without [privacy], with it, or with noised metrics as well; or with [site_privacy]."""
FAULTS_S = 400.0
"""Until then accidents begin."""
QUIET_S = 1500.0
"""From then on all is well: disks, lines, sites and clocks."""
COORDINATOR = "coordinator"
STALENESS_MAX = 2
CALM = Weather()
AT_COORDINATOR = (
    "kill", "dies", "dies", "push", "link", "full", "fsync", "clock", "clock", "freeze"
)  # fmt: skip
AT_SITE = (
    "kill", "kill", "worker", "worker", "cut", "hang", "full", "unstored", "fsync", "clock", "dies"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Accident:
    """Something that befalls a host."""

    when_s: float
    kind: str
    whom: str
    """A site's name, or 'coordinator'."""
    lasts_s: float
    operation: int
    """'dies' and 'kill' of a site at work: at which disk operation from then on."""
    how: str
    """And where in it: 'before', 'after', 'torn'."""
    power: bool
    """What was not fsynced is lost."""
    same: bool
    """A killed node comes back as itself, not as another."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """One world."""

    seed: int
    sites: int = 3
    rounds: int = 2
    sites_min: int = 3
    quorum: float = 1.0
    deadline_s: float = 300.0
    momentum: float = 0.0
    every: int = 1
    kind: Kind = "plain"
    buffer: int = 0
    """Updates that close a round; 0: it waits for its cohort."""
    ttl_s: float = 1200.0
    weather: Weather = CALM
    accidents: tuple[Accident, ...] = ()
    hostile: dict[str, str] = field(default_factory=dict)
    """How a site spoils its replies, until the quiet."""
    train_s: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Bounds of a site's time to train, if not the usual."""
    approved_s: dict[str, float] = field(default_factory=dict)
    """When a site's people approve the manifest; absent: no approval is asked for."""
    skew_s: dict[str, float] = field(default_factory=dict)
    gone_s: dict[str, float] = field(default_factory=dict)
    """When a site goes for good; 0: it never comes."""

    @property
    def names(self) -> list[str]:
        """The sites."""
        return [f"site-{number + 1}" for number in range(self.sites)]

    @property
    def is_whole(self) -> bool:
        """Whether every round needs every site, so that all worlds end at the same bits."""
        return self.quorum == 1.0 and self.sites_min == self.sites

    @property
    def settled_s(self) -> float:
        """From when on nothing is left of what went wrong: neither messages nor wrong times."""
        # a ledger refuses while its last entry's time is to come
        wrong = self.is_private and (any(self.skew_s.values()) or self._clocks_are_set)
        return QUIET_S + max(self.ttl_s, 7300.0 * wrong) + 2 * self.deadline_s + 500.0

    @property
    def is_private(self) -> bool:
        """Whether the sites charge their ledgers."""
        return self.kind in ("private", "measured")

    @property
    def _clocks_are_set(self) -> bool:
        return any(accident.kind == "clock" for accident in self.accidents)

    @property
    def federation(self) -> FederationConfig:
        """The federation."""
        return _federation(
            self.rounds,
            self.sites_min,
            self.quorum,
            self.deadline_s,
            self.momentum,
            self.every,
            self.kind,
            self.buffer,
        )


@cache
def _federation(
    rounds: int,
    sites_min: int,
    quorum: float,
    deadline_s: float,
    momentum: float,
    every: int,
    kind: Kind,
    buffer: int,
) -> FederationConfig:
    privacy: dict[str, Any] = {}
    if kind == "hidden":
        privacy = {"site_privacy": {"clip_norm": 1.0, "noise_multiplier": 0.5, "delta": 0.01}}
    elif kind != "plain":
        noise = {"metrics_noise": 4.0} if kind == "measured" else {}
        privacy = {"privacy": PRIVATE["privacy"] | noise}
    if buffer:
        privacy["asynchrony"] = {"buffer": buffer, "staleness_max": STALENESS_MAX}
    weights = "examples" if kind == "plain" else "equal"
    return small(
        federation={"rounds": rounds},
        sites={"min": sites_min, "quorum": quorum, "deadline_s": deadline_s},
        strategy={"momentum": momentum, "weights": weights},
        evaluation={"every": every},
        **privacy,
    )


def planned(seed: int) -> Plan:
    """Return the world of a seed."""
    rng = random.Random(seed)
    sites = rng.choice((1, 2, 3, 3, 4))
    whole = rng.random() < 0.6
    names = [f"site-{number + 1}" for number in range(sites)]
    kind: Kind = rng.choice(("plain", "plain", "plain", "private", "measured", "hidden"))
    hostile = {}
    if kind == "plain" and rng.random() < 0.25:
        hostile[rng.choice(names)] = rng.choice(sorted({*UPDATES, *EVALUATED}))
    rough = rng.random()
    return Plan(
        seed=seed,
        sites=sites,
        rounds=rng.randint(1, 3),
        sites_min=sites if whole else rng.randint(1, sites),
        quorum=1.0 if whole else rng.choice((0.5, 0.67, 1.0)),
        deadline_s=rng.choice((40.0, 300.0, 600.0, 900.0)),
        momentum=rng.choice((0.0, 0.5)),
        every=rng.choice((0, 1, 1, 2)),
        kind=kind,
        ttl_s=rng.choice((400.0, 1200.0)),
        weather=_weather(rng, rough),
        accidents=tuple(_accident(rng, names) for _ in range(_how_many(rng))),
        hostile=hostile,
        train_s={rng.choice(names): (20.0, 400.0)}
        if rng.random() < (0.2 if whole else 0.6)
        else {},
        approved_s={n: rng.uniform(0, 100) for n in names} if rng.random() < 0.15 else {},
        gone_s=_gone(rng, names),
        skew_s={n: rng.choice((0.0, 0.0, -3600.0, 3600.0)) for n in names},
    )


def planned_buffered(seed: int) -> Plan:
    """Return a seed's world with a buffer and more rounds."""
    plan, rng = planned(seed), random.Random(f"buffer {seed}")
    kind: Kind = "plain" if plan.kind == "hidden" else plan.kind
    buffer, rounds = rng.randint(1, plan.sites_min), rng.randint(1, 5)
    return replace(plan, kind=kind, buffer=buffer, rounds=rounds)


def _how_many(rng: random.Random) -> int:
    return rng.choice((0, 1, 1, 2, 2, 3, 5))


def _gone(rng: random.Random, names: list[str]) -> dict[str, float]:
    if rng.random() < 0.9:
        return {}
    return {rng.choice(names): rng.choice((0.0, rng.uniform(0, 100)))}


def _weather(rng: random.Random, rough: float) -> Weather:
    """Return good lines in half of all worlds, and bad ones in some way in the others."""
    if rough < 0.5:
        return Weather()
    return Weather(
        lost=rng.choice((0.0, 0.0, 0.01, 0.05)),
        doubled=rng.choice((0.0, 0.1, 0.5, 1.0)),
        damaged=rng.choice((0.0, 0.0, 0.01, 0.05)),
        delay_s=rng.choice(((0.01, 0.1), (0.1, 3.0), (0.1, 30.0))),
    )


def _accident(rng: random.Random, names: list[str]) -> Accident:
    whom = COORDINATOR if rng.random() < 0.45 else rng.choice(names)
    return Accident(
        when_s=rng.choice((0.0, rng.uniform(0, 60), rng.uniform(0, FAULTS_S))),
        kind=rng.choice(AT_COORDINATOR if whom == COORDINATOR else AT_SITE),
        whom=whom,
        lasts_s=rng.choice((rng.uniform(1, 20), rng.uniform(20, 150), rng.uniform(100, 700))),
        operation=rng.randint(1, 40),
        how=rng.choice(("before", "after", "torn")),
        power=rng.random() < 0.3,
        same=rng.random() < 0.3,
    )
