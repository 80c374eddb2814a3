"""Moves: what the RoundMachine goes by, where it stands, what it is told and what it asks for."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from intramural.core.messages import Split


class Phase(StrEnum):
    """Where a run stands."""

    WAIT = "wait"
    TRAIN = "train"
    EVALUATE = "evaluate"
    TEST = "test"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a run's machine goes by; fixed for the run."""

    rounds: int
    sites_min: int
    share: float = 1.0
    """Share of the eligible sites drawn for a cohort."""
    quorum: float = 1.0
    """Share of the cohort that closes a phase after the deadline."""
    deadline_s: float = 3600.0
    evaluate_every: int = 1
    """0: never."""
    attempts_max: int = 3
    """Times a round may fail before the run stops; see `State.failures`."""
    buffer: int = 0
    """Updates that close a round, whichever round they started from; 0: it waits for its cohort."""
    staleness_max: int = 0
    """With a buffer: rounds that an update may be late."""


@dataclass(frozen=True, kw_only=True)
class Flight:
    """With a buffer: a site trains; its update may count in a later round."""

    site: str
    round: int
    """From whose arrays it started."""
    until_s: float
    """Clock reading from which a round whose buffer is full waits for it no longer."""


@dataclass(frozen=True, kw_only=True)
class State:
    """Where a run stands; `committed` and `flights` alone survive a crash."""

    committed: int = 0
    """Rounds committed."""
    phase: Phase = Phase.WAIT
    attempt: int = 1
    """Attempt at the current round, from 1; may exceed `attempts_max`, as not every one counts."""
    failures: int = 0
    """Attempts at it that would have missed their quorum even with the excused sites' answers."""
    cohort: frozenset[str] = frozenset()
    """Sites asked in this phase."""
    answered: frozenset[str] = frozenset()
    """Sites that answered in this phase, well or badly."""
    counted: frozenset[str] = frozenset()
    """Sites whose answer counts in this phase; of training with a buffer, in all its attempts."""
    excused: frozenset[str] = frozenset()
    """Sites that answered badly in this phase, for a reason that is waited for."""
    trained: frozenset[str] = frozenset()
    """Sites whose update is in the current round's aggregate."""
    deadline_s: float = 0.0
    """Clock reading after which a quorum closes the phase."""
    flights: frozenset[Flight] = frozenset()
    """With a buffer: who trains; one flight a site, across rounds and phases."""
    held: frozenset[str] = frozenset()
    """Of these, sites that have answered, and whose update waits for a buffer with room."""

    @property
    def round(self) -> int:
        """The round being worked on, or the last one when all are done."""
        return self.committed + (self.phase not in (Phase.TEST, Phase.DONE))


@dataclass(frozen=True, kw_only=True)
class Sites:
    """Event: these sites are connected and can take part; also tells the time."""

    eligible: Sequence[str]
    """In order of their names."""
    now_s: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Event: a site answered a request of some phase, attempt and round."""

    site: str
    phase: Phase
    round: int
    attempt: int
    good: bool
    """False: it refused, failed, or its answer was invalid."""
    excused: bool = False
    """It refused for a reason that its people can mend; says nothing of a good answer."""


@dataclass(frozen=True, kw_only=True)
class Tick:
    """Event: time has passed."""

    now_s: float
    ready: Sequence[str] = ()
    """With a buffer, when all who train let their deadline pass: sites that can take part."""


Event = Sites | Answer | Tick


@dataclass(frozen=True, kw_only=True)
class Choose:
    """Effect: draw a cohort of `size` and train; answer with `chosen`."""

    round: int
    eligible: Sequence[str]
    size: int


@dataclass(frozen=True, kw_only=True)
class Count:
    """Effect: fold this site's answer, just received, into the phase's result."""

    site: str


@dataclass(frozen=True, kw_only=True)
class Ignore:
    """Effect: drop this site's answer."""

    site: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Hold:
    """Effect: keep this site's update, just received, and offer it again in the next round."""

    site: str


@dataclass(frozen=True, kw_only=True)
class Expired:
    """Effect: this site's update is no longer waited for."""

    site: str


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """Effect: close the round's fold and make the new arrays."""

    round: int


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Effect: ask these sites to evaluate the current arrays."""

    round: int
    split: Split
    sites: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Commit:
    """Effect: make the round durable. The next round starts from here."""

    round: int


@dataclass(frozen=True, kw_only=True)
class Discard:
    """Effect: throw the round's fold away; the round is tried again."""

    round: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Lack:
    """Effect: nobody trains in time for a buffer not full; others are asked, the fold stays."""

    round: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Wait:
    """Effect: show why nothing happens."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Finish:
    """Effect: the run is over."""

    failed: str | None = None


Buffered = Hold | Expired | Lack
"""Effects that only rounds with a buffer have."""
Effect = (
    Choose | Count | Ignore | Aggregate | Evaluate | Commit | Discard | Wait | Finish | Buffered
)
Outcome = tuple[State, tuple[Effect, ...]]
