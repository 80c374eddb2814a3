"""SiteAgent: the one path from a site's data to a reply, deployed or simulated."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING

from intramural.client.keeping import Keeping
from intramural.client.memory import MEMORY, SiteMemory
from intramural.client.policy import check_manifest, check_records, violations
from intramural.client.rank import rank_of
from intramural.client.refusals import refusal_of
from intramural.client.source import FileSource, Source
from intramural.client.updates import update_of
from intramural.core.errors import DataRefused, Refused
from intramural.core.federation import FederationConfig
from intramural.core.journal import utc_now
from intramural.core.layout import Layout, Vector
from intramural.core.messages import (
    Evaluated,
    EvaluateRequest,
    Hello,
    Refusal,
    Reply,
    Request,
    Split,
    TrainRequest,
    Update,
    Welcome,
)
from intramural.core.metrics import Sums, with_personal
from intramural.core.package import VERSION
from intramural.core.route import COUNTED_RULES, up_bytes_max, uplink
from intramural.core.site import SiteConfig
from intramural.data.records import Record
from intramural.data.split import Splits, split_records
from intramural.models.job import Job, run_job
from intramural.models.resident import Resident, resident_model
from intramural.models.tasks import Tokens
from intramural.models.training import RoundPlan, evaluate, use_threads
from intramural.privacy.egress import EgressPolicy

if TYPE_CHECKING:
    from intramural.client.guard import Guard

log = logging.getLogger(__name__)


class SiteAgent:
    """Answers the coordinator's requests from one site's records, under the site's policy."""

    def __init__(
        self,
        site: SiteConfig,
        federation: FederationConfig,
        *,
        source: Source | None = None,
        now: Callable[[], datetime] = utc_now,
        durable: bool = True,
        memory_of: FederationConfig | None = None,
    ) -> None:
        """Take the site's configuration and the manifest; reads and builds nothing yet.

        The records come from the file that site.toml names, or from `source`. `now` tells the time
        for policy.hours. `durable`: what the site keeps of a run must survive a power cut.
        `memory_of`: for a simulator's own measurements, the federation whose memory to look in.
        """
        self._now = now
        self._source = source or FileSource(site, federation)
        self.site = site
        self.federation = federation
        self.name = site.site.name
        self._is_allowed = False
        self._guard: Guard | None = None
        memory = SiteMemory(
            site.ledger_file.parent / MEMORY,
            self.name,
            manifest=(memory_of or federation).digest,
            durable=durable,
        )
        self.keeping = Keeping(federation, memory)
        """What the site keeps of runs."""
        self._splits: Splits | None = None
        self._tokens: dict[Split, Tokens] = {}

    @cached_property
    def layout(self) -> Layout:
        """What the coordinator's vector looks like; builds the model at first use."""
        return self.resident().loaded.exchange.layout

    def uplink(self, round: int) -> Layout:
        """Return what a round's update of this site looks like."""
        return uplink(self.federation, self.layout, round=round)

    def answer(self, request: Request) -> Reply:
        """Return the reply to a request; a refusal or failure is a reply with its reason.

        Guarantees:
            Every reply has passed the egress policy. The text of an unforeseen exception, which
            could quote a record, neither leaves the site nor reaches a log.
        """
        try:
            self.check_request(request)
            reply: Reply
            match request:
                case Hello():
                    reply = self._welcome(request)
                case TrainRequest():
                    reply = self._train(request)
                case EvaluateRequest():
                    reply = self._evaluate(request)
            return self.let_out(reply)
        except Exception as error:  # noqa: BLE001 (whatever happens, the coordinator gets an answer)
            return self.refusal(error)

    def refusal(self, error: Exception) -> Refusal:
        """Return the reply that tells of an error; see `refusal_of` for what it keeps back."""
        return refusal_of(error, site=self.name, private=self.federation.privacy is not None)

    def check_request(self, request: Request) -> None:
        """Hold a request against the site's manifest and policy.

        Raises:
            Refused: It goes by another manifest, or the site's limits forbid it.
        """
        if request.manifest != self.federation.digest:
            raise Refused(
                "the request goes by another manifest than this site has; start a new run"
            )
        self._check_policy()
        if self.site.compute.threads is not None:
            use_threads(self.site.compute.threads)

    def _check_policy(self) -> None:
        """Hold the federation against the site's limits; without a model first those without it."""
        policy = self.site.policy
        if self._is_allowed and not policy.hours:
            return  # nothing that was looked at can have changed since
        now = self._now()
        rank_of(self.site, self.federation)
        is_built = "layout" in vars(self)  # then all limits can be looked at in one go
        found = () if is_built else violations(policy, self.federation, now=now)
        if {v.key for v in found} <= {"policy.models"}:  # which needs the base's digest
            down = self.layout
            check_manifest(
                policy,
                self.federation,
                base_digest=self.resident().base.digest,
                vector_bytes=down.nbytes,
                up_bytes=up_bytes_max(self.federation, down),
                now=now,
            )
        else:
            check_manifest(policy, self.federation, now=now)
        self._is_allowed = True

    def let_out(self, reply: Reply) -> Reply:
        """Return the reply once the egress policy has let it pass.

        Raises:
            EgressRefused: It holds what may not leave.
        """
        policy = EgressPolicy(
            layout=self.uplink(reply.round) if isinstance(reply, Update) else None,
            task=self.federation.task.kind,
            payload_bytes_max=self.site.policy.payload_bytes_max,
            private=self.federation.privacy is not None,
            steps=self.federation.strategy.rule in COUNTED_RULES,
            personal=self.federation.personal is not None,
        )
        return policy.check(reply)

    def _welcome(self, request: Hello) -> Welcome:
        entries, head = None, None
        if self.federation.privacy is not None:
            self._guarded().admit(request.run)  # and no record is read: a greeting is not charged
            entries, head = self._guarded().settled
        else:
            check_records(self.site.policy, len(self.splits().train))  # now, not in round 1
        resident = self.resident()
        return Welcome(
            site=self.name,
            layout=resident.loaded.exchange.layout.digest,
            base=resident.base.digest,
            version=VERSION,
            ledger_entries=entries,
            ledger_head=head,
        )

    def _train(self, request: TrainRequest) -> Update:
        with self.training(request) as job:
            resident, started = self.resident(), time.perf_counter()
            delta, loss = run_job(resident, job, request.vector)
            seconds = time.perf_counter() - started
            self.keeping.keep(resident, job, request, delta)
        return self.update(request, job, delta, loss=loss, seconds=seconds)

    @contextmanager
    def training(self, request: TrainRequest) -> Iterator[Job]:
        """Yield what to train for a request; under [privacy] it is charged first, settled after.

        Guarantees:
            Under [privacy] the round's cost is on disk before a record is read or noise is drawn.

        Raises:
            IntramuralError: The site's policy, ledger or records do not allow it.
        """
        if self.federation.privacy is None:
            yield self._job(request)
            return
        from intramural.models.private_training import PrivateRound  # here: as for the guard

        guard = self._guarded()
        with guard.charged(request.round, run=request.run):
            job = self._job(request)
            private = PrivateRound(
                plan=guard.plan,
                units=guard.units(self.records_of("train")),
                random=guard.random(request.round),
                dropout_seed=guard.random(request.round, use="dropout").seed63(),
            )
            yield replace(job, private=private)

    def _job(self, request: TrainRequest) -> Job:
        job = self._job_of(request.round)
        return self.keeping.prepared(self.resident(), job, request)

    def _job_of(self, round_: int) -> Job:
        tokens = self.tokens_of("train")
        check_records(self.site.policy, len(tokens))
        plan = RoundPlan.of(
            self.federation,
            round=round_,
            site=self.name,
            micro_batch=self.site.compute.micro_batch,
        )
        return Job(tokens=tokens, plan=plan, up=self.uplink(round_))

    def update(
        self, request: TrainRequest, job: Job, delta: Vector, *, loss: float | None, seconds: float
    ) -> Update:
        """Return the reply that says what a job changed.

        Guarantees:
            Under [privacy] nothing but the vector tells of the records: the weight is 1, and there
            is no loss and no time.
        """
        guard = self._guarded() if job.private is not None else None
        return update_of(
            self.name, self.federation, request, job, delta, guard=guard, loss=loss, seconds=seconds
        )

    def _guarded(self) -> "Guard":
        if self._guard is None:
            # here: accounting and Opacus take seconds to load, which only [privacy] needs
            from intramural.client.guard import Guard

            self._guard = Guard(self.site, self.federation)
        return self._guard

    def _evaluate(self, request: EvaluateRequest) -> Evaluated:
        if self.federation.privacy is None:
            sums, entries, head = self._sums(request), None, None
        else:
            guard = self._guarded()
            with guard.charged_metrics(request.round, run=request.run) as noised:
                sums = noised(self._sums(request))
            entries, head = len(guard.ledger), guard.ledger.head
        return Evaluated(
            site=self.name,
            round=request.round,
            split=request.split,
            sums=sums,
            ledger_entries=entries,
            ledger_head=head,
        )

    def _sums(self, request: EvaluateRequest) -> Sums:
        tokens, resident = self.tokens_of(request.split), self.resident()
        settings, size = self.federation.training, self.federation.evaluation.batch_size
        loaded, task = resident.loaded, resident.task
        self.keeping.write(resident, request)
        sums = evaluate(loaded, task, tokens, batch_size=size, training=settings)
        if self.federation.personal is None or request.split != "test":
            return sums
        self.keeping.write_personal(
            resident, self._job_of(self.federation.federation.rounds), request
        )
        own = evaluate(loaded, task, tokens, batch_size=size, training=settings)
        return with_personal(sums, own)

    def resident(self) -> Resident:
        """Return this process's model of the federation; builds it at first use."""
        return resident_model(
            self.federation,
            places=self.site.model,
            device=self.site.compute.device,
            rank=rank_of(self.site, self.federation),
        )

    def splits(self) -> Splits:
        """Return the site's records in three parts, read at first use.

        Raises:
            DataError: As `read_records` and `split_records`.
        """
        if self._splits is None:
            found = self._source.records()
            for reason, count in sorted(found.skipped.items()):
                log.warning("%s: skipped %d rows: %s", self.name, count, reason)
            self._splits = split_records(
                found.records,
                salt=self.federation.federation.name,
                needed=self._source.needed,
            )
        return self._splits

    def records_of(self, split: Split) -> Sequence[Record]:
        """Return a split's records; of those to evaluate on, as many as the federation wants."""
        records: Sequence[Record] = getattr(self.splits(), split)
        return records if split == "train" else records[: self.federation.evaluation.records_max]

    def evaluated_of(self, split: Split) -> Sequence[Record]:
        """Return the records that an evaluation of a split sees.

        Without [privacy] those of `records_of`. With it each person's share is bounded first, on
        the whole split, and the list is cut afterwards; see `Guard.bounded` for why.
        """
        if self.federation.privacy is None:
            return self.records_of(split)
        bounded = self._guarded().bounded(getattr(self.splits(), split))
        return bounded[: self.federation.evaluation.records_max]

    def tokens_of(self, split: Split) -> Tokens:
        """Return a split's records as tokens, made at first use and kept."""
        if split == "train" and split not in self._tokens:
            found = self._source.training_tokens(self.resident())
            if found is not None and len(found):
                self._tokens[split] = found
        if split not in self._tokens:
            records = self.records_of(split) if split == "train" else self.evaluated_of(split)
            if not records:
                raise DataRefused(f"the site's {split} split is empty")
            self._tokens[split] = self._source.tokens(self.resident(), records)
        return self._tokens[split]
