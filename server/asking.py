"""Asking: who is asked what, again what was lost, and what is under way from round to round."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set

from intramural.core.layout import Vector
from intramural.core.messages import EvaluateRequest, TrainRequest
from intramural.core.wire import encode_vector
from intramural.server.checkpoint import Checkpoint
from intramural.server.crowd import Crowd
from intramural.server.directory import Directory
from intramural.server.lost import ABSENT, Lost
from intramural.server.moves import Evaluate, Flight, Phase, State
from intramural.server.post import Arrival
from intramural.server.setting import Setting


def flights_of(setting: Setting, start: Checkpoint) -> frozenset[Flight]:
    """Return who trained when a checkpoint was written.

    Only a simulation's clock is the same after a restart; on another all are waited for anew.
    """
    fresh_s = setting.clock() + setting.federation.sites.deadline_s
    return frozenset(
        Flight(site=site, round=r, until_s=until_s if setting.world is not None else fresh_s)
        for site, (r, until_s) in start.flights.items()
    )


class Asking:
    """Sends requests for the coordinator, and keeps what they may be sent again with."""

    def __init__(
        self,
        setting: Setting,
        directory: Directory | Crowd,
        *,
        starts: dict[int, Vector],
        nodes: Mapping[str, int],
        standing: Callable[[], State],
        receive: Callable[[Arrival], None],
    ) -> None:
        """Take what the coordinator works with.

        Args:
            setting: As the coordinator's.
            directory: Knows the sites' nodes.
            starts: Arrays by the round that starts from them, of requests under way.
            nodes: Where a simulation had sent these, though the site be away; {}: wherever the
                directory finds the sites.
            standing: Returns the machine's present state.
            receive: Takes an arrival.
        """
        self._setting = setting
        self._directory = directory
        self._starts = dict(starts)
        self._standing = standing
        self._receive = receive
        self._lost = Lost(setting.again)
        self._request: TrainRequest | EvaluateRequest | None = None
        """What all were asked in this phase; None while a round with a buffer trains."""
        self._nodes = nodes
        self._resumed: frozenset[Flight] = standing().flights
        """Flights whose requests another process sent, until they are sent again."""
        self._held: list[Arrival] = []
        self._is_buffered = setting.federation.asynchrony is not None

    def train(self, vector: Vector, cohort: list[str]) -> None:
        """Ask a cohort to train from `vector`.

        With a buffer, after a restart, those under way are asked as well: what they are asked is
        the same to the bit. A deployed site that has answered already sends its stored answer; a
        simulated one stores none, and trains and is charged again.
        """
        state = self._standing()
        self._lost.clear()
        self.starts()
        self._starts[state.round] = vector
        if not self._is_buffered:
            self._request = self._training(state.round)
            self._send(self._request, cohort)
            return
        self._lost = Lost(self._setting.again)  # a resumed run does not know when it looked last
        self._request, resumed, self._resumed = None, self._resumed, frozenset()
        self._ask(resumed & state.flights, nodes=self._nodes)
        self._ask({f for f in state.flights if f.site in cohort})

    def evaluate(self, effect: Evaluate, vector: Vector) -> None:
        """Ask sites to evaluate `vector`."""
        setting = self._setting
        self._lost.clear()
        self.starts()
        self._request = EvaluateRequest(
            manifest=setting.federation.digest,
            run=setting.run,
            round=effect.round,
            layout=setting.layout.digest,
            split=effect.split,
            vector=vector,
        )
        self._send(self._request, sorted(effect.sites))

    def starts(self) -> dict[int, Vector]:
        """Return the arrays that flights started from, by round; the others are let go."""
        rounds = {flight.round for flight in self._standing().flights}
        self._starts = {r: vector for r, vector in self._starts.items() if r in rounds}
        return self._starts

    def hold(self, arrival: Arrival) -> None:
        """Keep an update for the next round."""
        self._held.append(arrival)

    def held(self) -> Iterator[Arrival]:
        """Yield what was kept, in the order of its arrival, once updates are taken again."""
        if self._standing().phase is Phase.TRAIN:
            held, self._held = self._held[::-1], []
            while held:
                yield held.pop()

    def keeps(self, arrival: Arrival) -> bool:
        """Keep an arrival that says that its request was lost, to ask again; or return False."""
        return self._is_awaited(arrival) and self._lost.took(arrival, now_s=self._setting.clock())

    def give_up(self, judge: Callable[[Arrival], None]) -> None:
        """With a buffer: hand out lost requests that are waited for no longer, as failures.

        That is each at its own deadline, and all of them once the buffer is full: in the next round
        these sites are asked anew.
        """
        now_s, state = self._setting.clock(), self._standing()
        is_full = len(state.counted) == self._setting.rules.buffer
        due = {f.site for f in state.flights if is_full or now_s >= f.until_s}
        self._lost.give_up(judge, among=due)

    def ready(self) -> Sequence[str]:
        """Return who can take part, if all who train let their deadline pass; else nobody.

        Nodes are looked for as before a round: a new one may be whom this round needs.
        """
        if not self._is_buffered:
            return ()
        state, now_s = self._standing(), self._setting.clock()
        collects = state.phase is Phase.TRAIN and len(state.counted) < self._setting.rules.buffer
        is_silent = state.flights and all(now_s >= flight.until_s for flight in state.flights)
        if not (collects and is_silent):
            return ()
        self._directory.greet(self._receive)
        return self._directory.eligible

    def ask_again(self, judge: Callable[[Arrival], None]) -> None:
        """Send a lost request to a site that is back; at the deadline it counts as a failure."""
        now_s, state = self._setting.clock(), self._standing()
        flies = self._is_buffered and state.phase is Phase.TRAIN  # then `give_up` has the deadlines
        if now_s >= state.deadline_s and not flies:
            self._lost.give_up(judge)
        elif self._lost.due(now_s):
            settled = self._directory.greet(self._receive)
            if not settled and self._lost.waited_s(now_s) < self._setting.greeting_s:
                return  # a new node may be a lost site's; one that is silent holds up no other
            sites, request = self._lost.back(self._directory.nodes), self._request
            flights = {f for f in self._standing().flights if f.site in sites}
            if flies:
                sites = sorted(flight.site for flight in flights)
            if not sites or (request is None and not flies):
                return
            self._setting.journal.append("asked-again", round=state.round, sites=sites)
            if request is None:  # of those who train with a buffer each has its round's
                self._ask(flights)
            else:
                self._send(request, sites)

    def _is_awaited(self, arrival: Arrival) -> bool:
        state, (phase, round_, _) = self._standing(), arrival.tag
        if not self._is_buffered or phase != Phase.TRAIN:
            return arrival.tag == (state.phase.value, state.round, state.attempt)
        asked = ((flight.site, flight.round) for flight in state.flights)
        return state.phase is Phase.TRAIN and (arrival.site, round_) in asked

    def _ask(self, flights: Set[Flight], *, nodes: Mapping[str, int] | None = None) -> None:
        """Ask sites to train, those of earlier rounds first."""
        for round_ in sorted({flight.round for flight in flights}):
            sites = sorted(flight.site for flight in flights if flight.round == round_)
            self._send(self._training(round_), sites, nodes=nodes)

    def _training(self, round_: int) -> TrainRequest:
        setting = self._setting
        return TrainRequest(
            manifest=setting.federation.digest,
            run=setting.run,
            round=round_,
            layout=setting.layout.digest,
            vector=self._starts[round_],
        )

    def _send(
        self,
        request: TrainRequest | EvaluateRequest,
        sites: Sequence[str],
        *,
        nodes: Mapping[str, int] | None = None,
    ) -> None:
        """Send a request to sites that are there, or wherever `nodes` has them."""
        state = self._standing()
        tag = (state.phase.value, request.round, state.attempt)
        here = {**self._directory.nodes, **nodes} if nodes else self._directory.nodes
        to = {site: here[site] for site in sites if site in here}
        if to:
            vector = encode_vector(request.vector)
            self._setting.post.send(request, to, tag=tag, vector=vector)
        for site in sorted(site for site in sites if site not in here):
            # it left: between training and evaluation, or while the coordinator was down
            self._receive(Arrival(site=site, node=0, tag=tag, reply=None, problem=ABSENT))
