"""Notary: a rule that certifies what is counted: made by that site, from these arrays, once."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from intramural.core.canonical import digest_vector
from intramural.core.layout import Vector
from intramural.core.messages import Update
from intramural.strategies.rule import Fold, Rule, State
from intramural.strategies.site_dp import SiteDPFedAvg
from tests.reference.fedavg import server_step
from tests.simworld.pupil import Lessons, honest_delta, weight_of


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """What a round came to."""

    round: int
    sites: tuple[str, ...]
    vector: str
    """Digest of the arrays."""
    started: tuple[int, ...] = ()
    """The round that each site's update started from."""


@dataclass(kw_only=True)
class Register:
    """All that is committed, over every process that worked on the run."""

    rounds: list[Aggregate] = field(default_factory=list)
    made: dict[tuple[int, str], Aggregate] = field(default_factory=dict)
    """Aggregates that were made, by round and digest; one of a round becomes its commit."""

    starts: dict[int, str] = field(default_factory=dict)
    """Digest of the arrays that each round began with."""
    counted: set[tuple[str, int]] = field(default_factory=set)
    """Site and first round of every update that is committed."""
    latest: Aggregate | None = None
    released: Counter[int] = field(default_factory=Counter)
    """How often an aggregate of a round was made."""

    def commit(self, round_: int, sites: list[str]) -> None:
        """Note a commit: of the aggregate made last."""
        made = self.latest
        assert made is not None, f"round {round_} was committed and never aggregated"
        assert made.round == round_, f"round {round_} was committed, {made.round} was made last"
        assert list(made.sites) == sites, f"round {round_}: the record names other sites"
        self._enter(made)

    def taken_up(self, round_: int, vector: str) -> None:
        """Note where a process takes the run up: at the last commit, or the one it cut short."""
        last = len(self.rounds)
        assert round_ in (last, last + 1), f"taken up at round {round_}, {last} are committed"
        if round_ == 0:
            return
        made = self.made.get((round_, vector))
        assert made is not None, f"taken up at arrays of round {round_} that nobody made"
        self._enter(made)

    def _enter(self, made: Aggregate) -> None:
        last = len(self.rounds)
        if made.round == last:
            assert self.rounds[-1] == made, f"round {made.round} was committed twice"
            return
        assert made.round == last + 1, f"round {made.round} was committed after {last}"
        self.rounds.append(made)
        trips = set(zip(made.sites, made.started, strict=True))
        assert not trips & self.counted, f"round {made.round} holds what was counted before"
        self.counted |= trips


class Notary:
    """Does what the rule does, and looks at it."""

    def __init__(
        self, rule: Rule, register: Register, lessons: Lessons, momentum: float, late_max: int
    ) -> None:
        self._rule = rule
        self._register = register
        self._lessons = lessons
        self._momentum = momentum
        self._late_max = late_max
        self._deltas: list[tuple[Update, Vector]] = []
        self._is_exact = not isinstance(rule, SiteDPFedAvg)
        self.name, self.traits = rule.name, rule.traits

    def begin(self, state: State, current: Vector, *, round: int) -> Fold:
        """Open a round."""
        self._deltas = []
        self._register.starts[round] = digest_vector(current)
        return self._rule.begin(state, current, round=round)

    def add(self, fold: Fold, update: Update) -> None:
        """Fold an update in, if the rule takes it; then it must have been made."""
        self._rule.add(fold, update)
        late = fold.round - update.round
        assert 0 <= late <= self._late_max, f"an update of round {update.round} was counted"
        source = (update.site, update.round, self._register.starts[update.round])
        made = self._lessons.made.get(source, [])
        assert update.delta.tobytes() in made, f"an update was counted that {source} never made"
        counted = {one.site for one, _ in self._deltas}
        assert update.site not in counted, f"{update.site} was counted twice"
        self._deltas.append((update, np.array(update.delta)))

    def finish(self, fold: Fold) -> tuple[Vector, State]:
        """Close the round, and compare with the papers' formula."""
        current, before, round_ = np.array(fold.current), dict(fold.state), fold.round
        vector, state = self._rule.finish(fold)
        self._register.released[round_] += 1
        if self._is_exact:
            self._compare(round_, current, before, vector)
        trips = sorted((update.site, update.round) for update, _ in self._deltas)
        made = Aggregate(
            round=round_,
            sites=tuple(site for site, _ in trips),
            vector=digest_vector(vector),
            started=tuple(started for _, started in trips),
        )
        self._register.made[made.round, made.vector] = self._register.latest = made
        return vector, state

    def _compare(self, round_: int, current: Vector, before: State, vector: Vector) -> None:
        velocity = before.get("velocity", np.zeros(len(current)))
        expected, _ = server_step(
            current.astype(np.float64),
            velocity.astype(np.float64),
            [
                delta.astype(np.float64) / (1 + round_ - update.round) ** 0.5
                for update, delta in self._deltas
            ],
            [float(update.weight) for update, _ in self._deltas],
            lr=1.0,
            beta=self._momentum,
        )
        np.testing.assert_allclose(vector, expected, rtol=1e-5, atol=1e-5)


def undisturbed(rule: Callable[[], Rule], start: Vector, rounds: Sequence[tuple[str, ...]]) -> str:
    """Return the digest after these rounds of these sites, one process and nothing going wrong."""
    own, vector, state = rule(), start, State()
    for number, sites in enumerate(rounds, start=1):
        fold = own.begin(state, vector, round=number)
        for site in sites:
            own.add(
                fold,
                Update(
                    site=site,
                    round=number,
                    layout="",
                    weight=weight_of(site),
                    loss=None,
                    seconds=None,
                    delta=honest_delta(site, number, vector),
                ),
            )
        vector, state = own.finish(fold)
    return digest_vector(vector)
