"""Calibration: from the epsilon that may be spent to the noise that keeps within it."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Final

from intramural.core.errors import ConfigError
from intramural.privacy.accountant import (
    RECORD_INTERVAL,
    SCREEN_INTERVAL,
    Event,
    Relation,
    epsilon_pld,
)

NOISE_MAX: Final = 1000.0
"""Noise multiplier above which `calibrate` gives up: no signal is left."""

TICK: Final = 1e-4
"""Step of a calibrated noise multiplier."""

EPSILON_WIDE_MIN: Final = 2.0
"""Epsilon from which wide bins are good enough to calibrate with: they overstate it by less than
0.05 %, and never understate what narrow ones say, since their edges are edges of those too."""

SECANTS_MAX: Final = 8
"""Looks after which a search halves in between."""


def calibrate(
    *,
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    relation: Relation,
    beside: tuple[Event, ...] = (),
) -> float:
    """Return the smallest noise multiplier, in steps of 1e-4, that keeps within `epsilon`.

    Args:
        epsilon: Privacy to spend in all, above 0.
        delta: Above 0 and below 1.
        sample_rate: Of each step.
        steps: In all.
        relation: Neighbouring relation.
        beside: Events paid from the same epsilon, whose noise is given.

    Returns:
        A multiplier whose PLD epsilon, as written in a ledger, is at most `epsilon`; one step of
        1e-4 less would exceed it (in wider bins, from epsilon 2). The same on every machine.

    Raises:
        ConfigError: `beside` alone costs that much, or no noise up to 1000 is enough.
    """
    return _calibrate(epsilon, delta, sample_rate, steps, relation, beside)


@lru_cache(maxsize=256)
def _calibrate(
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    relation: Relation,
    beside: tuple[Event, ...],
) -> float:
    if not 0 < epsilon < math.inf:
        raise ConfigError(f"epsilon must be above 0 and finite, got {epsilon!r}")

    alone = epsilon_pld(beside, delta=delta, relation=relation) if beside else 0.0
    if alone >= epsilon:
        raise ConfigError(
            f"evaluations alone cost epsilon {alone:.4g} of {epsilon:g} at delta {delta:g}; "
            "raise privacy.metrics_noise or evaluation.every, or leave out privacy.metrics_noise"
        )

    def cost(ticks: int, interval: float) -> float:
        noise = round(ticks * TICK, 4)
        training = Event(sample_rate=sample_rate, noise_multiplier=noise, steps=steps)
        events = (training, *beside)
        return epsilon_pld(events, delta=delta, relation=relation, interval=interval)

    most = round(NOISE_MAX / TICK)
    if cost(most, SCREEN_INTERVAL) > epsilon:
        raise ConfigError(
            f"epsilon {epsilon:g} at delta {delta:g} needs a noise multiplier above "
            f"{NOISE_MAX:g} for {steps} steps at sample rate {sample_rate:g}; raise "
            "privacy.epsilon or the nominal number of units, or train fewer steps"
        )
    # wide bins find the place and the slope there; narrow ones then need three looks
    ticks, slope = _smallest(lambda k: cost(k, SCREEN_INTERVAL) / epsilon, round(1 / TICK), most)
    if epsilon < EPSILON_WIDE_MIN:
        ticks, _ = _smallest(lambda k: cost(k, RECORD_INTERVAL) / epsilon, ticks, most, slope)
    return round(ticks * TICK, 4)


def _smallest(
    share: Callable[[int], float], guess: int, most: int, slope: float = -1.5
) -> tuple[int, float]:
    """Return the smallest whole number whose share is at most 1, and the slope beside it.

    Args:
        share: Falls with its argument, and is at most 1 at `most`.
        guess: Where to look first.
        most: Largest possible answer.
        slope: Of log share by log argument, near the answer; below 0.

    The secant method in logarithms, kept between what is known not to fit and what is; if that
    takes long, halving as well.
    """
    low, high, looks = 0, most, 0
    before: tuple[int, float] | None = None
    while high - low > 1:
        looks += 1
        if looks > SECANTS_MAX and looks % 2:
            guess = (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
        found = share(guess)
        low, high = (low, guess) if found <= 1 else (guess, high)
        if before is not None and 0 < found < math.inf and found != before[1]:
            slope = math.log(found / before[1]) / math.log(guess / before[0])
            slope = min(max(slope, -20.0), -0.2)  # bins make it uneven between neighbours
        if 0 < found < math.inf:
            before = (guess, found)
            guess = math.ceil(min(guess * found ** (-1 / slope), most))
    return high, slope
