"""Accountant: from the noisy steps that were taken to the epsilon they cost."""

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from importlib.metadata import version
from typing import Any, Final, Literal

import numpy as np
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.privacy_accountant import NeighboringRelation
from dp_accounting.rdp import RdpAccountant
from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon
from numpy.typing import NDArray

from intramural.core.errors import ConfigError, Refused

Relation = Literal["add-remove", "replace-one"]
"""What neighbouring data sets differ in: one unit more or less, or one unit's content."""

ACCOUNTANT: Final = f"PLD, dp-accounting {version('dp-accounting')}"
"""Who computes an epsilon; written beside every one."""
BOUND: Final = f"RDP upper bound, dp-accounting {version('dp-accounting')}"
"""Who answers where a PLD would fill the memory."""
SECOND_OPINION: Final = f"PRV, opacus {version('opacus')}"
"""Who checks the figures of `ACCOUNTANT`."""

RECORD_INTERVAL: Final = 1e-4
"""Width of a privacy-loss bin, in epsilon, for what is written down."""
SCREEN_INTERVAL: Final = 1e-3
"""Ten times faster and never lower: some 0.05 % more, but 0.3 % at epsilon 0.9 and 22 % at 0.07.
For curves, searches, and a first look at what a charge would cost."""

EPSILON_EXACT_MAX: Final = 150.0
"""Above this Rényi's bound is the answer: such an epsilon protects nobody, and its distribution
would fill the memory."""
NOISE_EXACT_MIN: Final = 0.05
"""Noise multiplier below which a single step's distribution would fill the memory."""
PRV_EPSILON_ERROR: Final = 0.01
"""What Opacus' PRV may be off by, in epsilon; it adds as much to its estimate and tells that."""
_NEIGHBOURS: Final = {
    "add-remove": NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace-one": NeighboringRelation.REPLACE_ONE,
}


Mechanism = tuple[float, float]
"""Sample rate and noise multiplier of a step: all that its cost depends on."""
Groups = tuple[tuple[Mechanism, int], ...]
"""Mechanisms in order, and the steps of each."""


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


def epsilon_pld(
    events: Sequence[Event], *, delta: float, relation: Relation, interval: float = RECORD_INTERVAL
) -> float:
    """Return epsilon at `delta` by privacy-loss distributions: the figure of record.

    Equal events are added up first, so a thousand equal rounds cost one self-composition; unsampled
    events are one Gaussian, whatever their noise. The last answers and compositions are kept.

    Args:
        events: In any order.
        delta: Above 0 and below 1.
        relation: Neighbouring relation of the answer.
        interval: Width of a privacy-loss bin, in epsilon; wider is faster and never lower.

    Raises:
        ConfigError: `delta` is no probability.

    Guarantees:
        The events are (epsilon, delta)-DP together, under `relation`, for units drawn by Poisson
        sampling with a secret coin. Discretisation and cut tails only raise the figure. Void where
        batches were shuffled, cut or skipped, or a unit's norm exceeded its bound. Arithmetic is
        float64, in dp-accounting; its rounding (about 1e-12) is not bounded.

    Source: Doroshenko et al. 2022, https://arxiv.org/abs/2207.04380, as in dp-accounting.
    """
    _check_delta(delta)
    if not events:
        return 0.0
    if is_huge(events, delta):
        return epsilon_rdp(events, delta=delta, relation=relation)
    return _known(groups_of(events), delta, relation, interval)


def answered_by(events: Sequence[Event], *, delta: float) -> str:
    """Return whose figure `epsilon_pld` of these events is: `ACCOUNTANT`, or `BOUND`."""
    return BOUND if events and is_huge(events, delta) else ACCOUNTANT


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
    if is_huge(events, delta):  # it would ask for more memory than there is, or hang
        raise Refused(f"epsilon is above {EPSILON_EXACT_MAX:g}, beyond Opacus' PRV; go by PLD")
    accountant = PRVAccountant()
    accountant.history = [(noise, q, steps) for (q, noise), steps in groups_of(events)]
    try:
        with warnings.catch_warnings(action="ignore"):
            return float(accountant.get_epsilon(delta=delta, eps_error=PRV_EPSILON_ERROR))
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


def cross_check(
    events: Sequence[Event], *, delta: float, relation: Relation
) -> dict[str, float | None]:
    """Return epsilon by 'prv', the second opinion, and by 'rdp', the upper bound.

    None where there is no answer, or no finite one. Nothing is decided by either.
    """
    found: dict[str, float | None] = {}
    for name in ("prv", "rdp"):
        try:
            epsilon = epsilon_of(name, events, delta=delta, relation=relation)
        except Refused:
            epsilon = math.inf
        found[name] = epsilon if math.isfinite(epsilon) else None
    return found


def groups_of(events: Sequence[Event]) -> Groups:
    """Return the steps of each mechanism: all that a composition depends on."""
    groups: dict[Mechanism, int] = {}
    for event in events:
        key = (event.sample_rate, event.noise_multiplier)
        groups[key] = groups.get(key, 0) + event.steps
    return tuple(sorted(groups.items()))


def is_huge(events: Sequence[Event], delta: float) -> bool:
    """Return whether Rényi's bound must answer: see `EPSILON_EXACT_MAX` and `NOISE_EXACT_MIN`."""
    tiny = min(event.noise_multiplier for event in events) < NOISE_EXACT_MIN
    return tiny or epsilon_rdp(events, delta=delta) > EPSILON_EXACT_MAX


@lru_cache(maxsize=64)
def _known(groups: Groups, delta: float, relation: Relation, interval: float) -> float:
    return epsilon_at(_composed(groups, relation, interval), delta)


@lru_cache(maxsize=4)
def _composed(groups: Groups, relation: Relation, interval: float) -> Any:
    """Return the distribution of all steps together."""
    sampled = tuple(group for group in groups if group[0][0] < 1)
    before = compose_sampled(sampled, relation, interval) if sampled else None
    return add_gaussians(before, groups, relation, interval)


def add_gaussians(before: Any, groups: Groups, relation: Relation, interval: float) -> Any:
    """Return a distribution, or None, composed with the unsampled steps among the groups."""
    # Gaussians on one vector add up to one: their precisions do
    precision = math.fsum(steps / noise**2 for (q, noise), steps in groups if q == 1)
    if not precision:
        return before
    gaussian = _step(1.0, precision**-0.5, relation, interval)
    return gaussian if before is None else before.compose(gaussian)


@lru_cache(maxsize=4)
def compose_sampled(groups: Groups, relation: Relation, interval: float) -> Any:
    """Return the distribution of sampled steps together; there must be some."""
    parts = [
        _step(q, noise, relation, interval).self_compose(steps) for (q, noise), steps in groups
    ]
    return reduce(lambda composed, part: composed.compose(part), parts)


@lru_cache(maxsize=8)
def _step(sample_rate: float, noise: float, relation: Relation, interval: float) -> Any:
    """Return one step's distribution; rounded up (connect the dots), so never too small."""
    return pld.from_gaussian_mechanism(
        standard_deviation=noise,
        value_discretization_interval=interval,
        sampling_prob=sample_rate,
        neighboring_relation=_NEIGHBOURS[relation],
    )


def epsilon_at(distribution: Any, delta: float) -> float:
    """Return the smallest epsilon that a distribution allows at `delta`; infinite if none does.

    What dp-accounting finds in a loop over some 100,000 bins, found in milliseconds; and asked of
    dp-accounting if its own delta at that epsilon is not the one wanted.
    """
    sides = (distribution._pmf_remove, distribution._pmf_add)
    epsilon = max(_epsilon_of(side.to_dense_pmf(), delta) for side in sides)
    if math.isfinite(epsilon) and distribution.get_delta_for_epsilon(epsilon) <= delta * (1 + 1e-9):
        return epsilon
    return float(distribution.get_epsilon_for_delta(delta))


def _epsilon_of(pmf: Any, delta: float) -> float:
    """Return the epsilon of one side: of a unit that comes, or of one that goes.

    delta(epsilon) is the infinite loss's probability, and (1 - exp(epsilon - loss)) probability
    added up over the losses above epsilon; so `upper` - exp(epsilon) `lower`, the greatest losses
    first. Those of at most 0 never count.
    """
    if pmf._infinity_mass > delta:
        return math.inf
    last = pmf._lower_loss + pmf.size - 1
    bins: NDArray[np.float64] = np.arange(last, max(0, pmf._lower_loss - 1), -1, dtype=np.float64)
    losses = pmf._discretization * bins
    probabilities = pmf._probs[::-1][: len(losses)]
    upper = pmf._infinity_mass + np.cumsum(probabilities)
    lower = np.cumsum(probabilities * np.exp(-losses))
    counts = (upper > delta) & (lower > 0)  # the rest is less than delta, or rounding
    found = np.log(np.where(counts, upper - delta, 1.0) / np.where(counts, lower, 1.0))
    ends = np.flatnonzero(counts[:-1] & (found[:-1] >= losses[1:]))  # no smaller loss counts
    if not len(losses) or (len(ends) == 0 and upper[-1] <= lower[-1] + delta):
        return 0.0
    return float(found[ends[0] if len(ends) else -1])


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
