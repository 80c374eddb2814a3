"""Coordinator: carries out what the RoundMachine asks for, over a Flower Grid."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

from intramural.core.errors import AggregationError, round_error
from intramural.core.messages import Evaluated, Refusal, Update
from intramural.core.route import uplink
from intramural.core.seeds import generator
from intramural.server import machine
from intramural.server.asking import Asking, flights_of
from intramural.server.checkpoint import Checkpoint, save_checkpoint
from intramural.server.crowd import Crowd
from intramural.server.directory import GREETING, Directory
from intramural.server.holdout import HOLDOUT
from intramural.server.ledger_watch import ROLLED_BACK, LedgerWatch
from intramural.server.machine import Phase
from intramural.server.post import Arrival
from intramural.server.rollback import Rollback
from intramural.server.selection import draw
from intramural.server.setting import Outcome, Setting
from intramural.server.site_privacy import charge
from intramural.server.tally import Tally
from intramural.server.usable import unusable
from intramural.strategies.rule import Fold

DIRECTORY = "directory"
"""Key of the directory's part in a checkpoint's `world`."""


class Coordinator:
    """One run, from the last committed round to the end."""

    def __init__(self, setting: Setting, start: Checkpoint) -> None:
        """Take up a run at a checkpoint; round 0 is the start."""
        federation = setting.federation
        self.setting = setting
        self.rules = setting.rules
        self.state = machine.State(committed=start.round, flights=flights_of(setting, start))
        self.vector = start.vector
        self.memory = start.state
        self.history = list(start.history)
        self._ledgers = LedgerWatch(self.history, setting.journal.entries, fell=self._fell)
        before = start.world.get(DIRECTORY, {}) if setting.world is not None else {}
        self.directory = self._directory(before)
        self._fold: Fold | None = None
        self._rollback = Rollback(federation.gate)
        self._asking = Asking(
            setting,
            self.directory,
            starts=start.starts,
            nodes=before.get("known", {}),
            standing=lambda: self.state,
            receive=self._receive,
        )
        self._tally = Tally(federation.task.kind)
        self._shown = ""
        self._opened_s = 0.0
        self._failed: str | None = None

    def _directory(self, before: Mapping[str, Any]) -> Directory | Crowd:
        setting, federation = self.setting, self.setting.federation
        if setting.crowd is not None:
            return Crowd(setting.crowd)
        return Directory(
            setting.post,
            federation,
            run=setting.run,
            layout=setting.layout,
            base=setting.base,
            manners=setting.manners,
            clock=setting.clock,
            ledgers=self._ledgers if federation.privacy is not None else None,
            left=self._left,
            before=before,
        )

    def _left(self) -> Phase | None:
        """Return the phase whose replies stay in the post for now.

        With a buffer, what comes of training is for the next round once the buffer is full: a
        resumed run finds it there.
        """
        return Phase.TRAIN if self.rules.buffer and self.state.phase is not Phase.TRAIN else None

    def run(self) -> Outcome:
        """Work until the last round is tested.

        Raises:
            RoundError: A round failed for good, or sites did not come within the patience.
        """
        waiting_since = self.setting.clock()
        while self.state.phase not in (Phase.DONE, Phase.FAILED):
            if self.state.phase is Phase.WAIT:
                self._gather(waiting_since)
            else:
                waiting_since = self.setting.clock()
                self._collect()
        if self._failed is not None:
            why = f"{self._failed}; reasons: {self._tally.refusals or 'none came'}"
            raise round_error(why, self._tally.refusals)
        return Outcome(vector=self.vector, history=self.history, test=self._tally.sums)

    def _gather(self, since_s: float) -> None:
        """Greet whoever is new, and open a round when enough sites are ready."""
        setting = self.setting
        settled, now = self.directory.greet(self._receive), setting.clock()
        if not settled and now - since_s >= min(self.rules.deadline_s, setting.greeting_s):
            self.directory.give_up()  # a node that says nothing shall not hold the others up
        elif settled:
            eligible = self.directory.eligible
            self._apply(
                machine.step(self.rules, self.state, machine.Sites(eligible=eligible, now_s=now))
            )
            if self.state.phase is not Phase.WAIT:
                return
            if now - since_s >= setting.patience_s:
                needed, why = self.rules.sites_min, self.directory.why
                told = f"{len(eligible)} of {needed} sites can take part ({why}); mend the sites"
                raise round_error(f"{told}, or lower sites.min", self.directory.reasons_of(needed))
        setting.sleep(setting.poll_s)

    def _collect(self) -> None:
        """Take in the replies that have come, one at a time, and look at the clock."""
        came, is_training = False, self.state.phase is Phase.TRAIN
        takes_all = is_training and self.rules.buffer > 0  # else who has answered looks silent
        for arrival in chain(self._asking.held(), self.setting.post.arrivals(but=self._left())):
            came = True
            self._receive(arrival)
            del arrival  # the next reply is made while this name would keep the last one
            if not takes_all:
                self._tick()
        if takes_all:
            self._tick()
        self._asking.ask_again(self._judge)
        self._tick()
        if not came and self.state.phase in (Phase.TRAIN, Phase.EVALUATE, Phase.TEST):
            self.setting.sleep(self.setting.poll_s)

    def _tick(self) -> None:
        if self.rules.buffer and self.state.phase is Phase.TRAIN:
            self._asking.give_up(self._judge)
        ready = self._asking.ready()
        before = self.state
        event = machine.Tick(now_s=self.setting.clock(), ready=ready)
        outcome = machine.step(self.rules, before, event)
        if outcome[1]:  # the phase closed
            for site in before.cohort - before.answered:
                self.directory.missed(site)
        self._apply(outcome)

    def _receive(self, arrival: Arrival) -> None:
        """Offer one reply to the machine; it counts only if the rule or the sums can use it."""
        if not self.directory.took(arrival) and not self._asking.keeps(arrival):
            self._judge(arrival)

    def _judge(self, arrival: Arrival) -> None:
        setting, site, (phase, round_, _) = self.setting, arrival.site, arrival.tag
        up = uplink(setting.federation, setting.layout, round=round_)
        problem = unusable(arrival, setting.federation, layout=up.digest)
        state, effects = self._offer(arrival, good=problem is None)
        if machine.Hold(site=site) in effects:
            self.state = state
            self._asking.hold(arrival)
            return
        if machine.Count(site=site) in effects:
            problem = self._count(arrival)
            if problem is not None:  # the machine is pure: ask again, and forget the first answer
                state, effects = self._offer(arrival, good=False)
        self.state = state
        problem = next((e.reason for e in effects if isinstance(e, machine.Ignore)), problem)
        if problem is not None:
            self._tally.refused(problem)
            detail = arrival.reply.detail if isinstance(arrival.reply, Refusal) else ""
            if isinstance(arrival.reply, Refusal):
                self.directory.refused(site, arrival.node, arrival.reply)
            setting.journal.append(
                "refused", round=round_, site=site, phase=phase, reason=problem, detail=detail
            )
            setting.watcher.noticed(f"{site}: {problem} {detail}".rstrip())
        self.directory.answered(site)
        setting.watcher.answered(site, phase, good=problem is None, reason=problem or "")

    def _offer(self, arrival: Arrival, *, good: bool) -> machine.Outcome:
        (phase, round_, attempt), manners = arrival.tag, self.setting.manners
        answer = machine.Answer(
            site=arrival.site,
            phase=Phase(phase),
            round=round_,
            attempt=attempt,
            good=good,
            excused=manners is not None and manners.excuses(arrival.reply),
        )
        return machine.step(self.rules, self.state, answer)

    def _count(self, arrival: Arrival) -> str | None:
        """Fold a reply in; return why that was not possible, or None."""
        reply, private = arrival.reply, self.setting.federation.privacy is not None
        assert isinstance(reply, Update | Evaluated)
        if private and (problem := self._ledgers.problem(reply)):
            return problem
        try:
            if isinstance(reply, Update):
                assert self._fold is not None
                self.setting.rule.add(self._fold, reply)
                self._tally.trained(reply)
            else:
                self._tally.evaluated(reply)
        except AggregationError as error:
            return error.reason
        self._ledgers.note(reply)
        return None

    def _fell(self, site: str) -> None:
        """Journal a greeting from a ledger rolled back, for the run that goes on to know it."""
        told = {"site": site, "phase": GREETING, "reason": ROLLED_BACK, "detail": ""}
        self.setting.journal.append("refused", round=self.state.round, **told)
        self.setting.watcher.noticed(f"{site}: {ROLLED_BACK}, as its greeting shows")

    def _apply(self, outcome: machine.Outcome) -> None:
        """Enter the new state and carry the effects out, in order."""
        self.state, effects = outcome
        for effect in effects:
            match effect:
                case machine.Choose():
                    self._open(effect)
                case machine.Aggregate():
                    self._aggregate()
                case machine.Evaluate():
                    self._ask_evaluation(effect)
                case machine.Commit():
                    self._commit(effect.round)
                case machine.Discard():
                    self._fold = None
                    self.setting.journal.append(
                        "discarded", round=effect.round, reason=effect.reason
                    )
                    self.setting.watcher.noticed(effect.reason)
                case machine.Lack():
                    self.setting.journal.append("lack", round=effect.round, reason=effect.reason)
                    self.setting.watcher.noticed(effect.reason)
                case machine.Expired():
                    self.directory.missed(effect.site)
                case machine.Wait():
                    told = f"{effect.reason} ({self.directory.why})"
                    if told != self._shown:  # it comes with every look for sites
                        self.setting.watcher.waiting(told)
                    self._shown = told
                case machine.Finish():
                    self._failed = effect.failed

    def _open(self, effect: machine.Choose) -> None:
        """Draw the cohort, open the fold, send the arrays."""
        setting = self.setting
        self._shown = ""
        if self.state.attempt == 1:  # a round's record tells of all its attempts
            self._opened_s, self._tally.refusals = setting.clock(), {}
            setting.post.reset_count()
        again = [a] if (a := self.state.attempt) > 1 and setting.crowd is not None else []
        rng = generator(setting.federation.federation.seed, "cohort", effect.round, *again)
        sites = setting.federation.sites
        cohort = draw(sites, effect.eligible, effect.size, history=self.history, rng=rng)
        setting.journal.append(
            "opened", round=effect.round, attempt=self.state.attempt, sites=cohort
        )
        if self._fold is None:  # with a buffer, what has counted stays
            self._fold = setting.rule.begin(self.memory, self.vector, round=effect.round)
            self._tally.losses = {}
        self.state = machine.chosen(self.rules, self.state, frozenset(cohort), setting.clock())
        asked = sorted(f.site for f in self.state.flights) if self.rules.buffer else cohort
        setting.watcher.opened(effect.round, asked)
        self._asking.train(self.vector, cohort)

    def _aggregate(self) -> None:
        assert self._fold is not None
        charge(self.setting.journal, self.setting.federation, round_=self._fold.round)
        self._rollback.remember(self.vector, self.memory)
        self.vector, self.memory = self.setting.rule.finish(self._fold)
        self._tally.measures = self._fold.measures
        self._fold = None

    def _ask_evaluation(self, effect: machine.Evaluate) -> None:
        self._tally.sums = {}
        self.setting.watcher.evaluating(effect.round, effect.split, sorted(effect.sites))
        self._asking.evaluate(effect, self.vector)

    def _commit(self, round_: int) -> None:
        """Make the round durable: checkpoint first, then the journal says so."""
        setting = self.setting
        record = {
            "round": round_,
            **self._tally.record(),
            "bytes_up": setting.post.bytes_up,
            "bytes_down": setting.post.bytes_down,
            "seconds": round(setting.clock() - self._opened_s, 3),
            "ledgers": self._ledgers.record(
                self._tally.losses if setting.crowd is not None else None
            ),
        }
        if setting.added is not None:
            record |= setting.added(record)
        if setting.holdout is not None:
            record[HOLDOUT] = setting.holdout.measure(self.vector)
        told, before = self._rollback.judge(record, self.history)
        if before is not None:
            self.vector, self.memory = before
            setting.watcher.noticed(f"round {round_} is rolled back: {told['gate']}")
        record |= told
        self.history.append(record)
        self._tally.sums = {}
        digest = save_checkpoint(
            setting.checkpoints,
            Checkpoint(
                round=round_,
                manifest=setting.federation.digest,
                layout=setting.layout.digest,
                vector=self.vector,
                state=self.memory,
                history=self.history,
                flights={f.site: (f.round, f.until_s) for f in self.state.flights},
                starts=self._asking.starts() if self.rules.buffer else {},
                world=self._world(),
            ),
            sync=setting.durable,
        )
        setting.journal.append("committed", digest=digest, **record)
        setting.watcher.committed(record)

    def _world(self) -> dict[str, Any]:
        """Return what a simulated run with a buffer needs beside, to go on as if never stopped."""
        if not self.rules.buffer or self.setting.world is None:
            return {}
        assert isinstance(self.directory, Directory), "a crowd is no simulated world"
        return self.setting.world() | {DIRECTORY: self.directory.to_json()}
