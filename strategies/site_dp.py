"""SiteDPFedAvg: federated averaging that hides each site's whole update, for differential privacy.

Rests on four things: each update is clipped before it is added; all weigh the same; noise joins
the sum before anybody sees it; and the sum is divided by a number that no site can change.
"""

from collections.abc import Callable
from math import ceil, fsum, inf, log2, sqrt

import numpy as np
from numpy.typing import NDArray

from intramural.core.errors import AggregationError
from intramural.core.layout import Vector
from intramural.core.messages import Update
from intramural.strategies.exact_sum import ExactSum
from intramural.strategies.fedavg import FedAvg
from intramural.strategies.rule import Fold, State, Traits
from intramural.strategies.threads import CHUNK

Noise = Callable[[int, float], NDArray[np.float32]]
"""Returns so many independent draws from N(0, std**2); private if its generator is."""

NOISE_REACH = 16.0
"""Standard deviations that the sum's grid has room for; a generator's tail ends before 10."""
TERM_BITS = 50
"""Bits of the largest term on the grid; `ExactSum` takes terms below 2**51."""
SLACK = 2.0**-40
"""Share of clip_norm given up for the rounding of norm and factor, a thousand times smaller."""


def norm_of(vector: Vector) -> float:
    """Return the L2 norm, in float64; infinite or NaN if a value is."""
    parts = []
    for start in range(0, vector.size, CHUNK):
        chunk = vector[start : start + CHUNK].astype(np.float64)
        parts.append(float(np.square(chunk, out=chunk).sum()))
    return sqrt(fsum(parts)) if np.isfinite(parts).all() else inf


class SiteDPFedAvg:
    """next = current + learning_rate * velocity; velocity = momentum * velocity + noised mean.

    noised mean = (sum_k clip(delta_k) + N(0, (noise_multiplier * clip_norm)**2 I)) / divisor, where
    clip(delta) = delta * min(1, clip_norm / |delta|).

    Guarantees:
        Each `finish` is one Gaussian mechanism with this noise multiplier. Its neighbours are folds
        with and without one site's update: adding one moves the sum by an L2 norm of at most
        `clip_norm`, the grid's rounding included. Noise and sum meet on that grid as integers, so
        all that follows (mean, momentum, float32) is post-processing. T results, whether used
        or not, compose to T unsampled Gaussian mechanisms; drawing cohorts is not counted.
        Holds against whoever sees arrays: the other sites, and the public. Void if the noise can
        be foretold, or if one organisation answers under two names. The coordinator is trusted:
        it sees the updates. Arrays alone are covered: metrics, losses, and the list of sites that
        answered are not noised.

    The divisor is a constant of the federation (sites.min): the number that answered depends on who
    takes part, and dividing by it would let through what the noise shall hide. With more sites
    than that a step is longer, with fewer shorter.

    Source: McMahan et al. 2018, Algorithm 1 (without sampling, equal weights, a fixed denominator),
    https://arxiv.org/abs/1710.06963.
    """

    name = "site-dp-fedavg"
    # sums_only is false: the coordinator clips, so it must see each update
    traits = Traits(sums_only=False, exact_for_lora=False, mixed_ranks=False, byzantine=False)

    def __init__(
        self,
        *,
        clip_norm: float,
        noise_multiplier: float,
        divisor: int,
        noise: Noise,
        learning_rate: float = 1.0,
        momentum: float = 0.0,
    ) -> None:
        """Take what the federation fixed; nothing of it may follow from an update."""
        assert clip_norm > 0, clip_norm
        assert noise_multiplier > 0, noise_multiplier
        assert divisor >= 1, divisor
        self.clip_norm = clip_norm
        self.noise_std = noise_multiplier * clip_norm
        """Of the noise on the sum."""
        self.divisor = divisor
        self._noise = noise
        self._average = FedAvg(weights="equal", learning_rate=learning_rate, momentum=momentum)
        reach = max(clip_norm, NOISE_REACH * self.noise_std)
        self._fraction_bits = TERM_BITS - ceil(log2(reach))
        self._idle: ExactSum | None = None
        """The last round's sum, kept for its memory alone, as `FedAvg` does."""

    def begin(self, state: State, current: Vector, *, round: int) -> Fold:
        """Open a round; it holds two models of memory, and an update or the noise."""
        total, self._idle = self._idle, None
        if total is None or total.size != current.size:
            total = ExactSum(current.size, fraction_bits=self._fraction_bits)
        return Fold(round=round, current=current, state=state, work=total)

    def add(self, fold: Fold, update: Update) -> None:
        """Clip an update and fold it in, exactly: the order of updates changes no bit.

        Raises:
            AggregationError: A value is not finite, or the site is in the sum already; the fold is
                as before.
        """
        if update.site in fold.sites:
            raise AggregationError("site is in this round's sum already; it may count once")
        factor = self._factor(update.delta)
        fold.work.add(update.delta, factor)
        fold.weight += 1
        fold.sites.append(update.site)

    def _factor(self, delta: Vector) -> float:
        """Return what brings a delta within the bound once each value is rounded to the grid."""
        norm = norm_of(delta)
        if not norm < inf:
            raise AggregationError("update holds a value that is not finite; it was left out")
        rounding = sqrt(delta.size) * 2.0 ** -(self._fraction_bits + 1)
        bound = self.clip_norm * (1 - SLACK) - rounding
        return min(1.0, bound / norm) if norm else 1.0

    def finish(self, fold: Fold) -> tuple[Vector, State]:
        """Draw noise, and return the next arrays and, with momentum, the velocity.

        Each call is a release, to be charged before it is made.

        Raises:
            AggregationError: No update was added.
        """
        if not fold.sites:
            raise AggregationError("no update to aggregate; lower sites.min or wait for sites")
        # not named and not kept, so that its memory is gone before the result's is taken
        fold.work.add(self._noise(fold.current.size, self.noise_std), 1.0)
        fold.work.settle()
        fold.weight = float(self.divisor)
        following = self._average.finish(fold)
        self._idle = fold.work
        return following
