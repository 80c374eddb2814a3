"""PrivacyPlan: one value from which a federation's noise, steps and cost follow."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.federation_privacy import Privacy
from intramural.privacy.accountant import RECORD_INTERVAL, Event, Relation, epsilon_pld
from intramural.privacy.calibration import calibrate

SAMPLER = "poisson"
"""How units are drawn for a step: each by its own coin. There is no other way."""


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """What each site does to its records, in constants that the whole federation may know.

    Nothing here comes from a site's data: rate, divisor and number of steps follow from the
    nominal number of units, so that they give nothing away.

    Guarantees:
        A site that takes every round's steps once, by Poisson sampling, and is evaluated as
        planned is (cost(), delta)-DP for one `unit` under `relation`, against all who see its
        replies. A round tried again, and another run on the same data, are charged on top, in
        the site's ledger. Whatever is done with noised gradients (momentum, weight decay,
        training.gradient_clip, averaging, choosing a checkpoint by noised metrics) costs nothing.
    """

    unit: Literal["record", "person"]
    relation: Relation
    sample_rate: float
    """Probability that a unit is drawn for a step; above 0, at most 1."""
    noise_multiplier: float
    """Noise's standard deviation / clip_norm."""
    clip_norm: float
    """L2 bound of one unit's gradient."""
    divisor: float
    """Expected units a step; what a noised sum is divided by."""
    steps: int
    """Steps a round."""
    rounds: int
    delta: float
    records_per_person: int | None = None
    """Most records of a person in a step; None for unit 'record'."""
    engine: Literal["bookkeeping", "opacus", "opacus-ghost"] = "bookkeeping"
    metrics_noise: float | None = None
    """Noise's standard deviation / the L2 norm by which one unit moves an evaluation's sums;
    None: no evaluation leaves a site, and none costs anything."""
    evaluate_every: int = 0
    """Rounds between evaluations; 0: none."""

    @classmethod
    def of(cls, federation: FederationConfig) -> "PrivacyPlan":
        """Return a federation's plan; its noise is calibrated where an epsilon is given.

        Raises:
            ConfigError: There is no such plan; the key and a remedy are named.
        """
        privacy, training = federation.privacy, federation.training
        if privacy is None:
            raise ConfigError("privacy: missing; add the table [privacy] to federation.toml")
        _check(federation, privacy)
        nominal, batch = privacy.nominal_units, training.batch_size
        steps = training.local_steps or (training.local_epochs or 0) * -(-nominal // batch)
        rounds = federation.federation.rounds
        every = federation.evaluation.every
        return cls(
            unit=privacy.unit,
            relation=privacy.relation,
            sample_rate=batch / nominal,
            noise_multiplier=privacy.noise_multiplier
            or calibrate(
                epsilon=privacy.epsilon or 0.0,
                delta=privacy.delta,
                sample_rate=batch / nominal,
                steps=steps * rounds,
                relation=privacy.relation,
                beside=_metrics(privacy.metrics_noise, evaluations(rounds, every, rounds)),
            ),
            clip_norm=privacy.clip_norm,
            divisor=float(batch),
            steps=steps,
            rounds=rounds,
            delta=privacy.delta,
            records_per_person=privacy.records_per_person,
            engine=privacy.engine,
            metrics_noise=privacy.metrics_noise,
            evaluate_every=every,
        )

    @property
    def nominal_units(self) -> int:
        """Public number of units a site is taken to hold."""
        return round(self.divisor / self.sample_rate)

    def event(self, steps: int | None = None) -> Event:
        """Return the training of one round, or of so many steps."""
        return Event(
            sample_rate=self.sample_rate,
            noise_multiplier=self.noise_multiplier,
            steps=self.steps if steps is None else steps,
        )

    def metrics_event(self) -> Event | None:
        """Return one evaluation, or None where none leaves a site.

        It is taken as if each evaluation saw every unit. A unit is on one side of the split only,
        so this counts more than is spent, never less.
        """
        return next(iter(_metrics(self.metrics_noise, 1)), None)

    def total(self, rounds: int | None = None) -> tuple[Event, ...]:
        """Return all planned events of the first so many rounds, by default of all."""
        rounds = self.rounds if rounds is None else rounds
        if rounds == 0:
            return ()
        asked = evaluations(rounds, self.evaluate_every, self.rounds)
        return (self.event(self.steps * rounds), *_metrics(self.metrics_noise, asked))

    def cost(self, rounds: int | None = None, *, interval: float = RECORD_INTERVAL) -> float:
        """Return epsilon at `delta` after so many rounds, by default after all."""
        events: Sequence[Event] = self.total(rounds)
        return epsilon_pld(events, delta=self.delta, relation=self.relation, interval=interval)

    def warnings(self) -> list[str]:
        """Return what is allowed and unwise, a sentence each."""
        found = []
        if self.delta > 1 / (10 * self.nominal_units):
            found.append(
                f"delta {self.delta:g} is above 1 / (10 x {self.nominal_units} {self.unit}s): "
                "giving away a few units whole would satisfy it; lower privacy.delta"
            )
        if self.sample_rate == 1:
            found.append("every unit is in every step: sampling adds no privacy")
        if self.noise_multiplier < 0.5:
            found.append(
                f"noise multiplier {self.noise_multiplier:g} is below 0.5: epsilon is large, and "
                "rests on sampling alone; raise the nominal number of units, or spend less"
            )
        return found


def evaluations(done: int, every: int, rounds: int) -> int:
    """Return how often a site is evaluated in the first `done` of `rounds` rounds.

    Validation after every `every`-th round and after the last, then one test: what the server's
    machine asks for. 0 for `every` means never.
    """
    if not every:
        return 0
    return done // every if done < rounds else -(-rounds // every) + 1


def _metrics(noise: float | None, count: int) -> tuple[Event, ...]:
    if noise is None or not count:
        return ()
    return (Event(sample_rate=1.0, noise_multiplier=noise, steps=count),)


def _check(federation: FederationConfig, privacy: Privacy) -> None:
    """Refuse, all at once, what no plan can be made of."""
    training, wrong = federation.training, []
    nominal = "nominal_records" if privacy.unit == "record" else "nominal_persons"
    if training.batch_size > privacy.nominal_units:
        wrong.append(
            f"training.batch_size = {training.batch_size} is above privacy.{nominal} = "
            f"{privacy.nominal_units}, so the sample rate would be above 1; lower the batch size"
        )
    if federation.strategy.weights == "examples":
        wrong.append(
            "strategy.weights = 'examples' would send each site's number of records, which is "
            'private; set strategy.weights = "equal"'
        )
    if privacy.engine != "bookkeeping" and training.gradient_checkpointing:
        wrong.append(
            "training.gradient_checkpointing hides layers from privacy.engine = "
            f"{privacy.engine!r}; set it to false, or the engine to 'bookkeeping'"
        )
    if privacy.engine == "opacus-ghost" and training.precision != "float32":
        wrong.append(
            f"training.precision = {training.precision!r} rounds the sum of records, not each, "
            "under privacy.engine = 'opacus-ghost'; set it to 'float32', or the engine to another"
        )
    if wrong:
        raise ConfigError("\n".join(wrong))
