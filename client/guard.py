"""Guard: a site's privacy in one federation. It holds plan, ledger and randomness, and charges."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
from numpy.typing import NDArray

from intramural.client.rank import rank_of
from intramural.core.errors import LedgerError, Refused
from intramural.core.federation import FederationConfig
from intramural.core.files import probe_disk
from intramural.core.metrics import Sums
from intramural.core.package import VERSION
from intramural.core.site import SiteConfig
from intramural.data.records import Record
from intramural.models.resident import resident_model
from intramural.privacy.accountant import ACCOUNTANT, epsilon_pld
from intramural.privacy.charges import Purpose
from intramural.privacy.ledger import Charge, Ledger, Outcome
from intramural.privacy.metrics import noised_counts, sensitivity_of
from intramural.privacy.plan import PrivacyPlan, evaluations
from intramural.privacy.random import SecureRandom
from intramural.privacy.sampler import persons_of
from intramural.privacy.told import told

log = logging.getLogger(__name__)

FAR_ABOVE = 2.0
"""Nominal over real count above which the site is warned: it adds noise for units it lacks."""


class Guard:
    """Charges a site's ledger before its records are used, and hands out the randomness.

    Guarantees:
        The body of `charged` runs only once the ledger on disk holds the cost; what was charged is
        never refunded, so that a crash counts too much and never too little. One run is
        charged at most policy.retries_max times beyond its plan; but the coordinator names the
        run, and may start another: only policy.epsilon_lifetime bounds them all.
    """

    def __init__(self, site: SiteConfig, federation: FederationConfig) -> None:
        """Make the plan and open the data set's ledger; no record is read.

        Raises:
            ConfigError: The plan is impossible.
            Refused: The splits would let one record move others, or a run costs more than
                policy.epsilon_run.
            LedgerError: The ledger is broken, or another data set's.
        """
        assert federation.privacy is not None
        self.plan = PrivacyPlan.of(federation)
        self._sensitivity = sensitivity_of(self.plan.records_per_person or 1)
        self._site = site
        self._federation = federation
        self._delta = federation.privacy.delta
        self._warned = False
        if site.data.person is not None and site.data.group is not None:
            raise Refused(
                "under [privacy] one record that joins two groups would move others between the "
                "splits; name data.person or data.group in site.toml, not both"
            )
        self._check_cost()
        self.ledger = Ledger(site.ledger_file, site=site.site.name, data=site.data_name)

    def admit(self, run: str) -> None:
        """Refuse a run whose whole cost the lifetime budget cannot bear; charges nothing.

        Asked before the records are opened.

        Raises:
            BudgetExhausted: It cannot.
            LedgerError: The ledger's disk is full: a round would be refused in its middle.
        """
        self.ledger.refresh()
        path = self._site.ledger_file
        try:
            probe_disk(path.parent)
        except OSError as error:
            raise LedgerError(f"{path}: cannot write: {error.strerror}; free space") from error
        self.ledger.foresee(
            [
                *(self._charge(round_, run=run) for round_ in self._rounds_left(run)),
                *self._evaluations_left(run),
            ],
            epsilon_lifetime=self._site.policy.epsilon_lifetime,
            delta=self._site.policy.delta_lifetime,
        )

    @property
    def settled(self) -> tuple[int, str]:
        """Length and head of the ledger, as last read, up to the last entry that is no charge.

        A greeting tells these. A charge that is not settled, as after a crash, is left out: its
        digest has no nonce, and whoever knows the entry before could try out the time in it.
        """
        last = next(e for e in reversed(self.ledger.book.entries) if e.kind != "charged")
        return last.seq + 1, last.digest

    def _check_cost(self) -> None:
        """Refuse a federation of which one run costs more than the site allows."""
        policy = self._site.policy
        cost = epsilon_pld(
            self.plan.total(), delta=policy.delta_lifetime, relation=self.plan.relation
        )
        if not cost <= policy.epsilon_run:  # a NaN refuses
            raise Refused(
                f"a run would cost epsilon {told(cost)} at delta {policy.delta_lifetime:g}, above "
                f"policy.epsilon_run = {policy.epsilon_run:g}; add noise or train fewer steps, or "
                "raise the key in site.toml"
            )

    def _rounds_left(self, run: str) -> range:
        """Return the rounds this run has not charged yet."""
        charged = {charge.round for charge in self._own(run) if charge.purpose == "train"}
        return range(max(charged, default=0) + 1, self.plan.rounds + 1)

    def _evaluations_left(self, run: str) -> list[Charge]:
        """Return a charge for each planned evaluation that this run has not charged yet."""
        plan = self.plan
        if plan.metrics_event() is None:
            return []
        charged = sum(charge.purpose == "metrics" for charge in self._own(run))
        left = max(0, self._evaluations() - charged)
        return [self._charge(plan.rounds, run=run, purpose="metrics")] * left

    def _evaluations(self) -> int:
        """Return how often the plan has this site evaluated."""
        return evaluations(self.plan.rounds, self.plan.evaluate_every, self.plan.rounds)

    @contextmanager
    def charged(self, round_: int, *, run: str) -> Iterator[None]:
        """Charge one round of training, then let it happen, then note how it ended.

        Raises:
            BudgetExhausted: The lifetime budget does not cover it; nothing was written.
            Refused: The manifest has no such round, or it was tried too often; or the model
                cannot be trained under the plan, as `resident_model` says.
            LedgerError: The ledger cannot be written.
        """
        if not 1 <= round_ <= self.plan.rounds:
            raise Refused(f"round {round_} is not one of the manifest's {self.plan.rounds}")
        with self._settled(round_, run=run):
            yield

    @contextmanager
    def charged_metrics(self, round_: int, *, run: str) -> Iterator[Callable[[Sums], Sums]]:
        """Charge one evaluation, as `charged`; yields what makes the counts that may leave.

        Guarantees:
            As `noised_counts`, where the sums are those of `bounded` records, cut afterwards.
        """
        noise = self.plan.metrics_noise
        if noise is None:
            raise Refused(
                "under [privacy] a site sends no metrics; set privacy.metrics_noise, or evaluate "
                "on public records"
            )
        random = self.random(round_, use="metrics")
        with self._settled(round_, run=run, purpose="metrics"):
            yield partial(
                noised_counts,
                noise_multiplier=noise,
                sensitivity=self._sensitivity,
                random=random,
            )

    @contextmanager
    def _settled(self, round_: int, *, run: str, purpose: Purpose = "train") -> Iterator[None]:
        """Charge before the body runs, and settle after it, however it ends."""
        site = self._site  # a model that cannot be clipped is refused here, and costs nothing
        resident_model(
            self._federation,
            places=site.model,
            device=site.compute.device,
            rank=rank_of(site, self._federation),
        )
        self.ledger.refresh()
        own = [c for c in self._own(run) if c.purpose == purpose]
        planned = self.plan.rounds if purpose == "train" else self._evaluations()
        if len(own) >= planned + self._site.policy.retries_max:
            raise Refused(
                f"this run was charged {len(own)} times, of {planned} planned and "
                "policy.retries_max more; raise it in site.toml to let the run go on"
            )
        place = self.ledger.charge(
            self._charge(round_, run=run, purpose=purpose),
            epsilon_lifetime=self._site.policy.epsilon_lifetime,
            delta=self._site.policy.delta_lifetime,
        )
        outcome: Outcome = "failed"
        try:
            yield
            outcome = "done"
        finally:
            self.ledger.settle(place, outcome=outcome)

    def _own(self, run: str) -> list[Charge]:
        """Return one run's charges so far."""
        own = (self._federation.digest, run)
        return [c for c in self.ledger.charges if (c.manifest, c.run_id) == own]

    @property
    def is_private(self) -> bool:
        """Whether nothing is drawn from a test's seed."""
        return self._site.policy.not_private_seed is None

    def _charge(self, round_: int, *, run: str, purpose: Purpose = "train") -> Charge:
        plan, training = self.plan, purpose == "train"
        event = plan.event() if training else plan.metrics_event()
        assert event is not None
        same = [c for c in self._own(run) if (c.round, c.purpose) == (round_, purpose)]
        random = self.random(round_)
        return Charge(
            run=self._federation.federation.name,
            manifest=self._federation.digest,
            run_id=run,
            round=max(round_, 1),
            attempt=len(same) + 1,
            purpose=purpose,
            sample_rate=event.sample_rate,
            noise_multiplier=event.noise_multiplier,
            steps=event.steps,
            clip_norm=plan.clip_norm if training else self._sensitivity,
            unit=plan.unit,
            relation=plan.relation,
            records_per_person=plan.records_per_person,
            delta=self._delta,
            sampler="poisson",
            random=random.kind,
            is_private=random.is_private,
            engine=plan.engine if training else "counts",
            accountant=ACCOUNTANT,
            version=VERSION,
        )

    def random(self, round_: int, *, use: str = "private-round") -> SecureRandom:
        """Return the generator of a round's draws and noise: secret, or a test's seeded one."""
        seed = self._site.policy.not_private_seed
        if seed is None:
            return SecureRandom.secret()
        return SecureRandom.seeded(seed, use, round_, self._site.site.name)

    def units(self, records: Sequence[Record]) -> list[NDArray[np.int64]]:
        """Return each unit's rows: a record each, or a person's, bounded.

        Raises:
            Refused: The unit is a person and site.toml names no column of persons.
        """
        units = [np.array([row]) for row in range(len(records))]
        if self.plan.unit == "person":
            units = self._persons(records)
        self._warn(len(units))
        return units

    def bounded(self, records: Sequence[Record]) -> Sequence[Record]:
        """Return a whole split's records for an evaluation, in order: of a person, the first ones.

        Guarantees:
            Each unit has as many records as the noise of `charged_metrics` covers, or fewer, and
            which they are depends on no other unit. So cut to evaluation.records_max afterwards:
            one more person then takes the places of at most so many others' records. Cut before,
            a person's many rows would fill the list, and then be bounded: one person would move
            out as many others as he has rows.

        Raises:
            Refused: The unit is a person and site.toml names no column of persons.
        """
        if self.plan.unit == "record" or not records:
            return records
        rows = np.sort(np.concatenate(self._persons(records)))
        return [records[row] for row in rows.tolist()]

    def _persons(self, records: Sequence[Record]) -> list[NDArray[np.int64]]:
        """Return each person's rows, no more than records_per_person."""
        persons = [record.person for record in records]
        if None in persons:
            raise Refused("privacy.unit is 'person'; name data.person in site.toml, for every row")
        assert self.plan.records_per_person is not None
        keys = [str(person) for person in persons]
        return persons_of(keys, records_per_person=self.plan.records_per_person)

    def _warn(self, units: int) -> None:
        """Tell the site, and nobody else, that the public count does not suit it."""
        nominal = self.plan.nominal_units
        if nominal > FAR_ABOVE * units and not self._warned:
            self._warned = True
            log.warning(
                "%s: privacy.nominal_%ss = %d is far above this site's count: the privacy "
                "holds, the model learns less from here than it could",
                self._site.site.name,
                self.plan.unit,
                nominal,
            )
