"""World of benchmarks/byzantine.py: ten sites, their honest and poisoned records, and training.

Sites train by the code that a batched simulation runs; the encoder is frozen, so that each text
goes through it once. The hostile sites are the last ones by name.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from intramural.core.config import check_config, read_table
from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout, Vector
from intramural.core.seeds import generator
from intramural.core.site import simulated_name
from intramural.data.readers import read_records
from intramural.data.records import Columns, Record
from intramural.data.split import split_records
from intramural.models.batched import train_jobs
from intramural.models.job import Job
from intramural.models.resident import Resident, resident_model
from intramural.models.tasks import Tokens
from intramural.models.training import RoundPlan, use_threads
from intramural.simulations.attacks_data import flipped, poisoned, triggered
from intramural.simulations.partition import partition

if TYPE_CHECKING:
    from intramural.privacy.plan import PrivacyPlan

ICD10 = Path(__file__).parents[1] / "examples/icd10"
SITES, HOSTILE = 10, 2
IID, CATEGORIES = "iid", "categories"
TARGET = "neoplasms"
"""What the backdoor answers where the trigger is said."""
POISONED_SHARE = 0.5
"""Share of a hostile site's training records that have the trigger."""
EPSILON, DELTA = 8.0, 1e-5
NOMINAL = 700
"""Public constant under [privacy]; the sites train on some 650 to 800 titles."""

TRAINING: dict[bool, dict[str, Any]] = {
    False: {"learning_rate": 2.0, "batch_size": 64, "local_steps": 5},
    True: {"learning_rate": 4.0, "batch_size": 150, "local_steps": 4},
}
"""By whether it is private; the rest is that of examples/icd10/private.toml."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A row of the table: keys of [strategy]."""

    rule: str
    before: str = "none"

    @property
    def name(self) -> str:
        """What the table calls it."""
        rule = "mean" if self.rule == "fedavg" else self.rule
        return rule if self.before == "none" else f"{self.before} + {rule}"


def federation_of(choice: Choice, *, seed: int, rounds: int, private: bool) -> FederationConfig:
    """Return private.toml as this benchmark has it; all sites answer in each round."""
    table = read_table(ICD10 / "private.toml")
    table["federation"] |= {"rounds": rounds, "seed": seed}
    table["training"] |= TRAINING[private]
    table["strategy"] = {"rule": choice.rule, "weights": "equal", "before": choice.before}
    if choice.rule != "fedavg":
        table["strategy"]["hostile_max"] = HOSTILE
    table["sites"] = {"min": SITES}
    if private:
        table["privacy"] |= {"epsilon": EPSILON, "delta": DELTA, "nominal_records": NOMINAL}
    else:
        del table["privacy"]
    return check_config(table, FederationConfig, source="private.toml")


@dataclass(frozen=True, kw_only=True)
class World:
    """One deal of the titles to sites, and the model that they train."""

    seed: int
    rounds: int
    private: bool
    deal: str = IID
    """`IID`: titles are dealt one by one, at random; `CATEGORIES`: whole categories are, so that
    sites differ; or another partition by whole categories, such as dirichlet:0.3."""

    def federation_with(self, choice: Choice) -> FederationConfig:
        """Return the federation under a rule."""
        return federation_of(choice, seed=self.seed, rounds=self.rounds, private=self.private)

    @cached_property
    def federation(self) -> FederationConfig:
        """What the sites train by; the rule makes no difference to them."""
        return self.federation_with(Choice(rule="fedavg"))

    @cached_property
    def resident(self) -> Resident:
        """The model, with its initial parameters; without dropout, so that sites train together."""
        use_threads(1)
        found = resident_model(self.federation, places={}, device="cpu", fresh=True)
        for layer in found.loaded.model.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0
        return found

    @property
    def layout(self) -> Layout:
        """Of what travels."""
        return self.resident.loaded.exchange.layout

    @cached_property
    def start(self) -> Vector:
        """The arrays before the first round."""
        return self.resident.loaded.exchange.read()

    @cached_property
    def _splits(self) -> tuple[list[list[Record]], list[Record]]:
        labels = self.federation.task.labels
        columns = Columns(text="title", target="chapter", group="category")
        records = read_records(ICD10 / "titles.csv", columns, labels=labels).records
        # by category, so that no test title has a sibling that somebody trains on
        whole = split_records(records, salt=self.federation.federation.name)
        train = [replace(r, group=None) for r in whole.train] if self.deal == IID else whole.train
        rng = generator(self.seed, "partition")
        spec = "iid" if self.deal in (IID, CATEGORIES) else self.deal
        dealt = partition(train, spec, sites=SITES, rng=rng)
        return [[train[i] for i in rows] for rows in dealt], list(whole.test)

    @cached_property
    def clean(self) -> list[Tokens]:
        """Each site's training records."""
        return [self._tokens(records) for records in self._splits[0]]

    @cached_property
    def flipped(self) -> list[Tokens]:
        """The hostile sites' records, their labels turned around."""
        labels = self.federation.task.labels
        return [self._tokens(flipped(records, labels)) for records in self._hostile]

    @cached_property
    def poisoned(self) -> list[Tokens]:
        """The hostile sites' records, half of them with trigger and target."""
        rng = generator(self.seed, "poisoned")
        return [
            self._tokens(poisoned(records, target=TARGET, share=POISONED_SHARE, rng=rng))
            for records in self._hostile
        ]

    @property
    def _hostile(self) -> Sequence[list[Record]]:
        return self._splits[0][SITES - HOSTILE :]

    def _tokens(self, records: Sequence[Record]) -> Tokens:
        return self.resident.task.tokenise(records)

    def train(self, current: Vector, tokens: Sequence[Tokens], *, round: int) -> list[Vector]:
        """Return every site's honest training on `tokens`, in the order of their names.

        Under privacy each update has its site's noise: a hostile site that trains does so too.
        """
        jobs = [
            self._job(own, simulated_name(number, SITES), round)
            for number, own in enumerate(tokens)
        ]
        loaded, task = self.resident.loaded, self.resident.task
        if not self.private:
            found = [
                one if isinstance(one, Exception) else one[0]
                for one in train_jobs(loaded, task, jobs, current)
            ]
        else:
            from intramural.models.batched_private import train_jobs_privately

            found = list(train_jobs_privately(loaded, task, jobs, current))
        deltas = []
        for one in found:
            if isinstance(one, Exception):
                raise one
            deltas.append(one)
        return deltas

    def _job(self, tokens: Tokens, site: str, round: int) -> Job:
        plan = RoundPlan.of(self.federation, round=round, site=site, micro_batch=None)
        job = Job(tokens=tokens, plan=plan, up=self.layout)
        if not self.private:
            return job
        # here, as elsewhere: accounting and Opacus take seconds to load
        from intramural.models.private_training import PrivateRound
        from intramural.privacy.random import SecureRandom

        private = PrivateRound(
            plan=self._plan,
            units=[np.array([row]) for row in range(len(tokens))],
            # from the seed: the numbers are as a claim's, and nothing is claimed
            random=SecureRandom.seeded(self.seed, "byzantine", site, round),
            dropout_seed=0,
        )
        return replace(job, private=private)

    @cached_property
    def _plan(self) -> "PrivacyPlan":
        from intramural.privacy.plan import PrivacyPlan

        return PrivacyPlan.of(self.federation)

    @cached_property
    def _tests(self) -> dict[str, dict[str, torch.Tensor]]:
        test, task = self._splits[1], self.resident.task
        sides = {"clean": test, "backdoor": triggered(test, target=TARGET)}
        return {
            side: task.pad(self._tokens(records), range(len(records)))
            for side, records in sides.items()
        }

    def accuracy(self, vector: Vector, side: str) -> float:
        """Return the accuracy on the test titles; on side 'backdoor' the attack's success."""
        loaded, task = self.resident.loaded, self.resident.task
        loaded.exchange.write(vector)
        loaded.model.eval()
        with torch.no_grad():
            counts = task.measure(loaded.model, self._tests[side]).counts["confusion"]
        square = counts.reshape(len(self.federation.task.labels), -1)
        return float(np.trace(square) / square.sum())
