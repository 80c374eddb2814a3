"""World: one seed's federation from its first message to its end, and what must be true of it."""

import random
import shutil
import tempfile
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from flwr.app import Message

from intramural.core.canonical import canonical_json
from intramural.strategies.rule import Rule
from intramural.trust.envelope import MANIFEST_TYPE, sign
from tests.simworld.accidents import befall
from tests.simworld.clock import Clock, WallClock
from tests.simworld.disk import Disk, Killed, simulated_disks
from tests.simworld.net import Link, Parcel, SimGrid, Weather
from tests.simworld.notary import Notary, Register
from tests.simworld.office import AGAIN, End, Office
from tests.simworld.plan import COORDINATOR, QUIET_S, STALENESS_MAX, Plan
from tests.simworld.pupil import Lessons
from tests.simworld.site import COORDINATORS, USUAL_S, SimSite
from tests.simworld.verdict import check_end
from tests.simworld.witness import Witness
from tests.simworld.witness_buffered import BufferedWitness

ROOT = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
"""Where worlds lie while they last."""
TRACE_LINES = 40


class Broken(Exception):
    """A promise was broken; the message says in which world, and how to see it again."""


class Waits(BaseException):
    """The time is over, and the coordinator waits."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a world ended."""

    plan: Plan
    end: str
    """'finished' or 'waits'."""
    digest: str
    """Of the last arrays."""
    ends: tuple[End, ...]
    """How each process ended."""
    asked_again: int
    discarded: int
    resent: int
    trained: int
    """Trainings at all sites."""
    late: int
    """Updates that counted in a later round than they started from."""
    operations: dict[str, int]
    """Disk operations of each host."""
    trace: str
    """Digest of all that happened."""
    lines: list[str] = field(repr=False)


class World:
    """One federation, its hosts, lines and clocks."""

    def __init__(self, plan: Plan, root: Path) -> None:
        self.plan = plan
        self.clock = Clock()
        self.lessons = Lessons()
        self.register = Register()
        self._root = root
        self.lines: list[str] = []
        self._rng = random.Random(f"world {plan.seed}")
        self.link = Link(self.clock, self._stream("link"), ttl_s=plan.ttl_s)
        self.link.weather = plan.weather
        self._manifest = canonical_json(
            sign(MANIFEST_TYPE, plan.federation.manifest().encode(), COORDINATORS)
        ).decode()
        self.sites = {name: self._site(name) for name in plan.names}
        self.office = Office(
            plan,
            root,
            Disk(self._stream("disk")),
            self.clock,
            rule=self._notarised,
            taken_up=self._taken_up,
            sleeping=self._sleeping,
        )
        self.grid: SimGrid | None = None
        self.witness = self._new_witness()
        self.refused = 0
        self.ends: list[End] = []
        self.up_s = 0.0
        """From when on the SuperLink is up."""
        self.loses_power = False
        self.pushes_left: int | None = None
        """Messages that the coordinator still sends before it dies; None: all."""
        self._schedule()

    def _stream(self, name: str) -> random.Random:
        return random.Random(f"{name} {self.plan.seed}")

    def say(self, line: str) -> None:
        """Keep a line of what happened."""
        self.lines.append(f"{self.clock.now_s:9.2f} {line}".replace(str(self._root), ""))

    def _site(self, name: str) -> SimSite:
        plan = self.plan
        site = SimSite(
            name,
            self._root / name,
            clock=self.clock,
            link=self.link,
            rng=self._stream(name),
            lessons=self.lessons,
            manifest=self._manifest,
            asks_people=bool(plan.approved_s),
            wall=WallClock(self.clock, skew_s=plan.skew_s.get(name, 0.0)),
            train_s=plan.train_s.get(name, USUAL_S["train"]),
        )
        site.hostile = plan.hostile.get(name)
        return site

    def _notarised(self, rule: Rule) -> Rule:
        late_max = STALENESS_MAX if self.plan.buffer else 0
        return Notary(rule, self.register, self.lessons, self.plan.momentum, late_max)

    def _taken_up(self, round_: int, digest: str) -> None:
        self.say(f"taken up at round {round_}")
        self.register.taken_up(round_, digest)

    def _new_witness(self) -> Witness:
        kind = BufferedWitness if self.plan.buffer else Witness
        return kind(
            self.plan,
            self.clock,
            self.sites,
            pause_s=AGAIN.pause_s,
            times_max=AGAIN.times_max,
            committed=self._committed,
            say=self.say,
        )

    def _committed(self, record: dict[str, Any]) -> None:
        self.register.commit(record["round"], record["sites"])

    def _schedule(self) -> None:
        plan = self.plan
        for name, site in self.sites.items():
            if plan.gone_s.get(name) != 0.0:
                self.clock.at(self._rng.uniform(0, 10), site.start)
            if plan.gone_s.get(name, 0.0) > 0:
                self.clock.at(plan.gone_s[name], partial(self._goes, site))
            if name in plan.approved_s:
                act = partial(site.approve, plan.federation)
                self.clock.at(10.0 + plan.approved_s[name], act)
        for accident in plan.accidents:
            if accident.when_s > 0:
                self.clock.at(accident.when_s, partial(befall, self, accident))
            else:
                befall(self, accident)
        self.clock.at(QUIET_S, self._calm)

    def _goes(self, site: SimSite) -> None:
        self.say(f"{site.name} goes for good")
        site.dies(away_s=1e9, same=False, power=False)

    def _calm(self) -> None:
        self.say("quiet")
        self.link.weather = Weather()
        self.office.disk.heal()
        self.office.wall.skew_s = 0.0
        for site in self.sites.values():
            site.heal()

    def _sleeping(self) -> None:
        self.witness.look()
        if self.clock.now_s > self.plan.settled_s + 500.0 * self.plan.rounds:
            raise Waits

    def run(self) -> Result:
        """Let it happen."""
        end = "waits"
        try:
            while end != "finished":
                begun_s = self.clock.now_s
                end = self._serve()
                self.ends.append(end)
                self.say(f"process {end} {self.office.error}")
                quiet = begun_s > self.plan.settled_s
                assert end == "finished" or not quiet, f"{end} though all is well"
                if end != "finished":
                    pause_s = self._rng.uniform(60, 600) if end == "failed" else 0.0
                    restart_s = self.clock.now_s + self._rng.uniform(5, 60) + pause_s
                    self.clock.advance(max(self.up_s, restart_s))
        except Waits:
            end = "waits"
        self.say(end)
        return self._result(end)

    def _serve(self) -> End:
        self.witness = self._new_witness()
        grid = self.grid = SimGrid(
            self.link, self._stream(f"grid {len(self.ends)}"), asked=self._asked, heard=self._heard
        )
        try:
            end = self.office.serve(grid, self.witness)
        finally:
            self.refused += self.witness.refused
            self.link.forget(grid)
        if end == "died" and self.loses_power:
            self.loses_power = False
            self.office.disk.cut()
        return end

    def _asked(self, parcel: Parcel) -> None:
        self.witness.asked(parcel, self.link.nodes[parcel.node].site)
        if self.pushes_left is not None:
            self.pushes_left -= 1
            if self.pushes_left < 0:
                self.pushes_left, self.office.disk.dead = None, True
                raise Killed

    def _heard(self, parcel: Parcel, message: Message) -> None:
        self.witness.heard(parcel, message, self.link.nodes[parcel.node].site)

    def _result(self, end: str) -> Result:
        kinds = check_end(self, end)
        return Result(
            plan=self.plan,
            end=end,
            digest=self.register.rounds[-1].vector if self.register.rounds else "",
            ends=tuple(self.ends),
            asked_again=kinds["asked-again"],
            discarded=kinds["discarded"],
            resent=kinds["resent"],
            trained=self.lessons.count,
            late=sum(m.round > r for m in self.register.rounds for r in m.started),
            operations={
                COORDINATOR: self.office.disk.operations,
                **{name: site.disk.operations for name, site in self.sites.items()},
            },
            trace=sha256("\n".join(self.lines).encode()).hexdigest(),
            lines=self.lines,
        )

    def close(self) -> None:
        """Close what is open."""
        for site in self.sites.values():
            if site.desk is not None:
                site.desk.close()


def simulate(plan: Plan) -> Result:
    """Run one world in a folder that is gone afterwards.

    Raises:
        Broken: A promise was broken in it.
    """
    root = Path(tempfile.mkdtemp(prefix="simworld-", dir=ROOT)).resolve()
    lines: list[str] = []
    try:
        with simulated_disks():
            world = World(plan, root)
            lines = world.lines
            try:
                return world.run()
            finally:
                world.close()
    except Exception as error:
        told = "\n".join(lines[-TRACE_LINES:])
        raise Broken(
            f"{type(error).__name__}: {error}\n{plan}\n{told}\n"
            f"see it again: python -m tests.simworld --seed {plan.seed}"
        ) from error
    finally:
        shutil.rmtree(root, ignore_errors=True)
