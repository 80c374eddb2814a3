"""Accountant: from the noisy steps that were taken to the epsilon they cost."""

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Any, Final, Literal

from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.privacy_accountant import NeighboringRelation
from dp_accounting.rdp import RdpAccountant
from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon

from intramural.core.errors import ConfigError, Refused

Relation = Literal["add-remove", "replace-one"]
"""What neighbouring data sets differ in: one unit more or less, or one unit's content."""

ACCOUNTANT: Final = f"PLD, dp-accounting {version('dp-accounting')}"
"""Who computed an epsilon; written beside every one."""

RECORD_INTERVAL: Final = 1e-4
"""Width of a privacy-loss bin, in epsilon, for what is written down."""
SCREEN_INTERVAL: Final = 1e-3
"""Ten times faster, and at most some 0.3 % more; for curves and searches."""

EPSILON_EXACT_MAX: Final = 150.0
"""Above this Rényi's bound is the answer: such an epsilon protects nobody, and its distribution
would fill the memory."""
NOISE_EXACT_MIN: Final = 0.05
"""Noise multiplier below which a single step's distribution would fill the memory."""
_NEIGHBOURS: Final = {
    "add-remove": NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace-one": NeighboringRelation.REPLACE_ONE,
}


Groups = dict[tuple[float, float], int]
"""Steps of each (sample_rate, noise_multiplier)."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Steps of one mechanism: draw units by coin, sum what is clipped to norm 1, add noise."""

    sample_rate: float
    """Probability that a unit is in a step's sum, independently of all others; 1: it always is."""
    noise_multiplier: float
    """Noise's standard deviation divided by the bound on one unit's norm; above 0."""
    steps: int
    """At least 1."""

    def __post_init__(self) -> None:
        if not 0 < self.sample_rate <= 1:
            raise ConfigError(f"sample_rate must be above 0 and at most 1, got {self.sample_rate}")
        if not 0 < self.noise_multiplier < math.inf:
            raise ConfigError(
                f"noise_multiplier must be above 0 and finite, got {self.noise_multiplier}"
            )
        if self.steps < 1 or self.steps != int(self.steps):
            raise ConfigError(f"steps must be a whole number of at least 1, got {self.steps}")


class Accountant:
    """All that one data set gave away, as one growing composition.

    Equal events are added up while they come, so a thousand equal rounds cost one self-composition;
    what came before them is kept composed. Unsampled events are one Gaussian, whatever their noise.

    Guarantees:
        Events added so far are (epsilon(delta), delta)-DP together, under `relation`, for units
        drawn by Poisson sampling with a secret coin. Discretisation and cut tails only raise the
        figure. Void where batches were shuffled, cut or skipped, or a unit's norm exceeded its
        bound. Arithmetic is float64, in dp-accounting; its rounding (about 1e-12) is not bounded.

    Source: Doroshenko et al. 2022, https://arxiv.org/abs/2207.04380, as in dp-accounting.
    """

    def __init__(self, relation: Relation, *, interval: float = RECORD_INTERVAL) -> None:
        """Start with nothing spent.

        Args:
            relation: Neighbouring relation of every epsilon asked for.
            interval: Width of a privacy-loss bin, in epsilon; wider is faster and never lower.
        """
        self.relation: Relation = relation
        self.interval = interval
        self._totals: Groups = {}
        self._open: Groups = {}
        """Sampled steps not yet in `_settled`; the group added to last is the last."""
        self._settled: Any = None
        """Composed distribution of the sampled steps before those; None: there are none."""
        self._known: dict[float, float] = {}

    def add(self, event: Event) -> None:
        """Count an event as spent."""
        _count(self._totals, event)
        if event.sample_rate < 1:
            _count(self._open, event)
        self._known.clear()

    def epsilon(self, delta: float, *, after: Sequence[Event] = ()) -> float:
        """Return epsilon at `delta` of all events added, and of `after` on top of them.

        Args:
            delta: Above 0 and below 1.
            after: Events asked about, not added: would a round still be covered?

        Raises:
            ConfigError: `delta` is no probability.
        """
        _check_delta(delta)
        if after:
            trial = Accountant(self.relation, interval=self.interval)
            trial._totals, trial._open = dict(self._totals), dict(self._open)
            trial._settled = self._settled
            for event in after:
                trial.add(event)
            return trial.epsilon(delta)
        if delta not in self._known:
            self._known[delta] = self._epsilon(delta)
        return self._known[delta]

    def _epsilon(self, delta: float) -> float:
        if not self._totals:
            return 0.0
        events = _events_of(self._totals)
        if _is_huge(events, delta):
            return epsilon_rdp(events, delta=delta, relation=self.relation)
        return float(self._composed().get_epsilon_for_delta(delta))

    def _composed(self) -> Any:
        """Return the distribution of all events; what will not grow is settled on the way."""
        while len(self._open) > 1:
            key = next(iter(self._open))
            self._settled = self._with(self._settled, key, self._open.pop(key))
        composed = self._settled
        for key, steps in self._open.items():
            composed = self._with(composed, key, steps)
        # Gaussians on one vector add up to one: their precisions do
        precision = math.fsum(n / noise**2 for (q, noise), n in self._totals.items() if q == 1)
        return self._with(composed, (1.0, precision**-0.5), 1) if precision else composed

    def _with(self, composed: Any, key: tuple[float, float], steps: int) -> Any:
        part = _step(*key, self.relation, self.interval).self_compose(steps)
        return part if composed is None else composed.compose(part)


def epsilon_pld(
    events: Sequence[Event], *, delta: float, relation: Relation, interval: float = RECORD_INTERVAL
) -> float:
    """Return epsilon at `delta` by privacy-loss distributions: the figure of record."""
    accountant = Accountant(relation, interval=interval)
    for event in events:
        accountant.add(event)
    return accountant.epsilon(delta)


def epsilon_rdp(
    events: Sequence[Event], *, delta: float, relation: Relation = "add-remove"
) -> float:
    """Return an upper bound of epsilon at `delta`, in milliseconds and some 10 % too high.

    Replacing a unit is removing one and adding one; its bound is three times the Rényi divergence
    at twice the order (group privacy), looser still.

    Source: Mironov 2017, proposition 2, https://arxiv.org/abs/1702.07476; Mironov et al. 2019,
    https://arxiv.org/abs/1908.10530.
    """
    _check_delta(delta)
    if not events:
        return 0.0
    total: Any = sum(e.steps * _rdp_curve(e.sample_rate, e.noise_multiplier) for e in events)
    orders = RdpAccountant().orders
    if relation == "replace-one":  # f is 2-stable, c = 1: order >= 4 halves, divergence triples
        kept = orders >= 4
        orders, total = orders[kept] / 2, 3 * total[kept]
    return float(compute_epsilon(orders, total, delta)[0])


def epsilon_prv(events: Sequence[Event], *, delta: float) -> float:
    """Return epsilon at `delta` by Opacus' PRV accountant: a second opinion, add-remove only.

    Raises:
        Refused: Opacus finds no answer, as for some large epsilons.
    """
    from opacus.accountants import PRVAccountant  # loads torch, which the record must not need

    _check_delta(delta)
    if not events:
        return 0.0
    if _is_huge(events, delta):  # it would ask for more memory than there is, or hang
        raise Refused(f"epsilon is above {EPSILON_EXACT_MAX:g}, beyond Opacus' PRV; go by PLD")
    groups: Groups = {}
    for event in events:
        _count(groups, event)
    accountant = PRVAccountant()
    accountant.history = [(noise, q, steps) for (q, noise), steps in groups.items()]
    try:
        with warnings.catch_warnings(action="ignore"):
            return float(accountant.get_epsilon(delta=delta))
    except (RuntimeError, ValueError, ArithmeticError, MemoryError) as error:
        raise Refused(
            f"Opacus' PRV accountant has no answer here ({type(error).__name__}); go by PLD"
        ) from None


def epsilon_of(
    accountant: str, events: Sequence[Event], *, delta: float, relation: Relation
) -> float:
    """Return epsilon at `delta` by the accountant named: 'pld', 'prv' or 'rdp'.

    Raises:
        ConfigError: No such accountant.
        Refused: 'gdp', whose figure is too low; or 'prv' for replace-one, which it cannot do.
    """
    match accountant:
        case "pld":
            return epsilon_pld(events, delta=delta, relation=relation)
        case "rdp":
            return epsilon_rdp(events, delta=delta, relation=relation)
        case "prv" if relation == "add-remove":
            return epsilon_prv(events, delta=delta)
        case "prv":
            raise Refused("PRV knows the relation add-remove only; use accountant 'pld'")
        case "gdp":
            raise Refused(
                "GDP rests on a central limit and reports less than was spent (8.41 for 9.95 at "
                "sample rate 0.01, noise 0.6, 2000 steps, delta 1e-5); use accountant 'pld'"
            )
    raise ConfigError(f"no accountant is called {accountant!r}; known: pld, prv, rdp")


def _count(groups: Groups, event: Event) -> None:
    """Add an event's steps to its group, which becomes the last."""
    key = (event.sample_rate, event.noise_multiplier)
    groups[key] = groups.pop(key, 0) + event.steps


def _events_of(groups: Groups) -> tuple[Event, ...]:
    return tuple(
        Event(sample_rate=q, noise_multiplier=noise, steps=steps)
        for (q, noise), steps in groups.items()
    )


def _is_huge(events: Sequence[Event], delta: float) -> bool:
    tiny = min(event.noise_multiplier for event in events) < NOISE_EXACT_MIN
    return tiny or epsilon_rdp(events, delta=delta) > EPSILON_EXACT_MAX


@lru_cache(maxsize=4)
def _step(sample_rate: float, noise: float, relation: Relation, interval: float) -> Any:
    """Return one step's distribution; rounded up (connect the dots), so never too small."""
    return pld.from_gaussian_mechanism(
        standard_deviation=noise,
        value_discretization_interval=interval,
        sampling_prob=sample_rate,
        neighboring_relation=_NEIGHBOURS[relation],
    )


@lru_cache(maxsize=1024)
def _rdp_curve(sample_rate: float, noise: float) -> Any:
    """Return one step's Rényi divergences at the accountant's orders, add-remove."""
    accountant, log = RdpAccountant(), logging.getLogger("absl")
    one: Any = GaussianDpEvent(noise)
    before, log.disabled = log.disabled, True  # it warns of orders it leaves out, which is sound
    try:
        accountant.compose(PoissonSampledDpEvent(sample_rate, one) if sample_rate < 1 else one)
    finally:
        log.disabled = before
    return accountant.rdp


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ConfigError(f"delta must be above 0 and below 1, got {delta!r}")
