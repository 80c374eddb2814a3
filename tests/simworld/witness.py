"""Witness: watches a coordinator from outside and knows when it breaks a promise of its rounds."""

from collections.abc import Callable
from fractions import Fraction
from math import ceil
from typing import Any

from flwr.app import Message

from intramural.core.wire import HEADER, RECORD
from intramural.server.directory import MENDABLE
from intramural.server.lost import FLOWER
from intramural.server.machine import Rules
from intramural.server.post import AWAY
from intramural.server.watcher import Watcher
from tests.simworld.clock import Clock
from tests.simworld.net import Parcel
from tests.simworld.plan import Plan
from tests.simworld.site import SimSite

PATIENCE_S = 280.0
"""From a lost site's return to the time by which it must have been asked again: greetings that
others leave open for 120 s, one there and back on the slowest line, a coordinator that overslept.
"""
TRIES_MAX = Rules(rounds=1, sites_min=1).attempts_max
IGNORED = ("stale", "duplicate", "not-asked")


class Witness(Watcher):
    """Told of one process's events; a new process begins with a new one."""

    def __init__(
        self,
        plan: Plan,
        clock: Clock,
        sites: dict[str, SimSite],
        *,
        pause_s: float,
        times_max: int,
        committed: Callable[[dict[str, Any]], None],
        say: Callable[[str], None],
    ) -> None:
        self._plan = plan
        self._clock = clock
        self._sites = sites
        self._pause_s, self._times_max = pause_s, times_max
        self._committed = committed
        self._say = say
        self.waits = ""
        """Why nothing happens."""
        self.refused = 0
        """Answers that did not count, and so are in the journal."""
        self.cohort: frozenset[str] = frozenset()
        """Sites asked in the present phase; none between phases."""
        self._answered: set[str] = set()
        self._good: set[str] = set()
        self._excused: set[str] = set()
        """Sites that refused in this phase for what their people can mend."""
        self._begun_s = 0.0
        self._lost: dict[str, float] = {}
        self._times: dict[str, int] = {}
        self._vanished: set[str] = set()
        """Sites to which a message of this phase, or a greeting, never came."""
        self._asked: set[str] = set()
        self._present: set[str] = set()
        """Messages of this phase."""
        self._hears_present = self._hears_spoilt = False
        self._tries = 0
        """Rounds given up since the last commit that the excused sites could not have saved."""

    @property
    def owed(self) -> list[str]:
        """Sites whose answer is still waited for."""
        return sorted(self.cohort - self._answered)

    @property
    def _needed(self) -> int:
        return max(1, ceil(Fraction(str(self._plan.quorum)) * len(self.cohort)))

    @property
    def _is_due(self) -> bool:
        return self._clock.now_s >= self._begun_s + self._plan.deadline_s

    def _begin(self, sites: list[str]) -> None:
        self._end()
        self.cohort = frozenset(sites)
        self._begun_s = self._clock.now_s
        self.waits = ""

    def _end(self) -> None:
        """Check that the phase that ends here may end."""
        if self.cohort and self.owed:
            assert self._is_due, f"a phase closed early, without {self.owed}"
            assert len(self._good) >= self._needed, "a phase closed without its quorum"
        self.cohort = frozenset()
        self._answered, self._good, self._excused = set(), set(), set()
        self._lost, self._times = {}, {}
        self._hears_present = self._hears_spoilt = False
        self._asked, self._vanished, self._present = set(), set(), set()

    def waiting(self, reason: str) -> None:
        """Remember why nothing happens."""
        assert reason
        self.waits = reason
        self._say(reason)

    def opened(self, round_: int, sites: list[str]) -> None:
        """Begin to watch a training phase."""
        self._begin(sites)
        self._say(f"opened {round_} {sites}")

    def evaluating(self, round_: int, split: str, sites: list[str]) -> None:
        """Begin to watch an evaluation."""
        self._begin(sites)
        self._say(f"evaluating {round_} {split} {sites}")

    def answered(self, site: str, phase: str, *, good: bool, reason: str) -> None:
        """Check that an answer that does not count has a reason, and a loss a second chance."""
        self._say(f"answered {site} {phase} {'well' if good else reason}")
        if good:
            assert not self._hears_spoilt, f"what {site} sent was counted"
            assert site in self.cohort - self._answered, f"{site} was counted and not asked"
            self._good.add(site)
            self._answered.add(site)
            return
        assert reason, f"{site} was refused for no reason"
        self.refused += 1
        if reason.startswith(FLOWER) or reason == AWAY:
            often = self._times.get(site, 0) > self._times_max
            assert often or self._is_due, f"{site} was lost and given up at once"
        if reason not in IGNORED or (reason == "stale" and self._hears_present):
            assert site in self.cohort, f"{site} was judged and not asked"
            self._answered.add(site)
            self._lost.pop(site, None)
            if reason in MENDABLE:
                self._excused.add(site)

    def committed(self, record: dict[str, Any]) -> None:
        """Note a commit."""
        self._end()
        self._tries = 0
        self._say(f"committed {record['round']} {record['sites']}")
        self._committed(record)

    def noticed(self, line: str) -> None:
        """A round that is thrown away ends its phase."""
        self._say(f"noticed {line}")
        if "good answers" in line:
            self._tries += len(self._good | self._excused) < self._needed
            assert self._tries <= TRIES_MAX, "a round is tried without end"
            assert not self.owed, f"a round was given up while {self.owed} may answer"
            assert len(self._good) < self._needed, "a round was given up that had its quorum"
            self._end()

    def asked(self, parcel: Parcel, site: str) -> None:
        """Note a message that goes out."""
        if parcel.asks != "query":
            self._present.add(parcel.id)
            self._lost.pop(site, None)
            self._asked.add(site)
        if parcel.lost:
            self._vanished.add(site)

    def heard(self, parcel: Parcel, message: Message, site: str) -> None:
        """Note a message that comes in."""
        self._hears_present = parcel.id in self._present
        content = message.content if message.has_content() else None
        self._hears_spoilt = any(content is one for one in parcel.spoilt)
        if self._hears_present and site in self.owed and _says_lost(message):
            self._lost[site] = self._clock.now_s
            self._times[site] = self._times.get(site, 0) + 1
        if parcel.lost:
            self._vanished.add(site)

    def look(self) -> None:
        """Check what must hold whenever the coordinator goes to sleep."""
        if not self.cohort:
            return
        assert self.owed, "everybody answered, and the phase is open"
        enough = len(self._good) >= self._needed
        assert not (enough and self._is_due), "the deadline has passed with a quorum"
        for site in set(self.owed) - self._asked:  # it was not there
            self._lost.setdefault(site, self._begun_s)
        for site, lost_s in self._lost.items():
            well_s = self._clock.now_s - max(lost_s, self._sites[site].available_s)
            if well_s > self._pause_s + PATIENCE_S and not self._is_due:
                assert site in self._vanished, f"{site} is back and not asked again"


def _says_lost(message: Message) -> bool:
    """Return whether a node says that its app or its worker failed."""
    if message.has_error():
        return True
    record = message.content.config_records.get(RECORD)
    return record is not None and f'"{AWAY}"' in str(record.get(HEADER))
