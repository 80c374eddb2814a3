"""Pupil: a site's agent without model and records; its desk, ledger and answers are the product's.

What it learns depends on site, round and the parameters it was given, and on nothing else; under
[privacy] there is noise as well, another each time. So whoever counts an update can be asked
whether it was ever made, and from what.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from hashlib import sha256
from pathlib import Path

import numpy as np

from intramural.client.agent import SiteAgent
from intramural.client.desk import Desk
from intramural.core.canonical import digest_vector
from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout, Vector
from intramural.core.messages import (
    Evaluated,
    EvaluateRequest,
    Hello,
    TrainRequest,
    Update,
    Welcome,
)
from intramural.core.metrics import Sums
from intramural.core.site import SiteConfig
from intramural.privacy.ledger import Ledger
from tests.privacy.ledgers import charge, step_sum
from tests.server.fakes import BASE, LAYOUT, sums

Source = tuple[str, int, str]
"""Site, round and digest of the parameters that an update was made from."""


def honest_delta(site: str, round_: int, vector: Vector) -> Vector:
    """Return what a site learns in a round from these parameters: multiples of 1/32 below 2."""
    seed = f"{site} {round_} {digest_vector(vector)}".encode()
    rng = np.random.default_rng(int.from_bytes(sha256(seed).digest()[:8], "big"))
    return (rng.integers(-64, 64, LAYOUT.size) / 32).astype(np.float32)


def weight_of(site: str) -> int:
    """Return how many records a site has."""
    return int(site.rpartition("-")[2])


@dataclass
class Lessons:
    """All that was ever trained, at all sites."""

    made: dict[Source, list[bytes]] = field(default_factory=dict)
    """Each update's bytes, by what it was made from."""
    count: int = 0

    def learn(self, site: str, request: TrainRequest, *, noise: random.Random | None) -> Vector:
        """Train once."""
        delta = honest_delta(site, request.round, request.vector)
        if noise is not None:
            drawn = [noise.randint(-512, 512) / 4096 for _ in range(LAYOUT.size)]
            delta = delta + np.array(drawn, dtype=np.float32)
        source = (site, request.round, digest_vector(request.vector))
        self.made.setdefault(source, []).append(delta.tobytes())
        self.count += 1
        return delta


@dataclass(kw_only=True)
class School:
    """What a site's agents share, over all restarts of its worker."""

    lessons: Lessons
    rng: random.Random
    now: Callable[[], datetime]
    ledger_file: Path


class Pupil(SiteAgent):
    """Answers as `SiteAgent` does; only model, records and policy are not there."""

    def __init__(self, site: SiteConfig, federation: FederationConfig, school: School) -> None:
        super().__init__(site, federation, now=school.now)
        self._school = school
        self._ledger: Ledger | None = None

    @property
    def layout(self) -> Layout:
        """The tiny layout."""
        return LAYOUT

    def _check_policy(self) -> None:
        """Allow everything."""

    def _welcome(self, request: Hello) -> Welcome:
        welcome = Welcome(site=self.name, layout=LAYOUT.digest, base=BASE, version="0")
        if self.federation.privacy is None:
            return welcome
        self.ledger.refresh()
        return replace(welcome, ledger_entries=len(self.ledger), ledger_head=self.ledger.head)

    @property
    def ledger(self) -> Ledger:
        """The data set's ledger, with an accountant that costs no time."""
        if self._ledger is None:
            self._ledger = Ledger(
                self._school.ledger_file,
                site=self.name,
                data="records",
                now=self._school.now,
                composition=step_sum,
            )
        return self._ledger

    @contextmanager
    def _charged(self, request: TrainRequest | EvaluateRequest, purpose: str) -> Iterator[None]:
        """Charge, let it happen, settle: as `Guard` does."""
        self.ledger.refresh()
        same = [c for c in self.ledger.charges if (c.round, c.purpose) == (request.round, purpose)]
        debit = charge(
            run=self.federation.federation.name,
            run_id=request.run,
            manifest=request.manifest,
            round=max(request.round, 1),
            attempt=len(same) + 1,
            purpose=purpose,
        )
        place = self.ledger.charge(debit, epsilon_lifetime=None, delta=1e-5)
        try:
            yield
        finally:
            self.ledger.settle(place, outcome="done")

    def _train(self, request: TrainRequest) -> Update:
        school = self._school
        if self.federation.privacy is None:
            delta = school.lessons.learn(self.name, request, noise=None)
            return Update(
                site=self.name,
                round=request.round,
                layout=LAYOUT.digest,
                weight=weight_of(self.name),
                loss=float(request.round),
                seconds=float(school.lessons.count),  # no two trainings have one answer
                delta=delta,
            )
        with self._charged(request, "train"):
            delta = school.lessons.learn(self.name, request, noise=school.rng)
        return Update(
            site=self.name,
            round=request.round,
            layout=LAYOUT.digest,
            weight=1,
            loss=None,
            seconds=None,
            ledger_entries=len(self.ledger),
            ledger_head=self.ledger.head,
            delta=delta,
        )

    def _evaluate(self, request: EvaluateRequest) -> Evaluated:
        number = weight_of(self.name)
        evaluated = Evaluated(
            site=self.name, round=request.round, split=request.split, sums=sums(number)
        )
        if self.federation.privacy is None:
            return evaluated
        with self._charged(request, "metrics"):
            counts = {"correct": number, "examples": number + 1}
            found = Sums(counts={n: np.array([c], np.int64) for n, c in counts.items()})
        entries, head = len(self.ledger), self.ledger.head
        return replace(evaluated, sums=found, ledger_entries=entries, ledger_head=head)


class Classroom(Desk):
    """A desk whose agents are pupils."""

    school: School

    def _agent(self, federation: FederationConfig) -> SiteAgent:
        if federation.digest not in self._agents:
            self._agents[federation.digest] = Pupil(self.site, federation, self.school)
        return self._agents[federation.digest]
