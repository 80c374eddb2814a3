"""NormBound: what cuts updates to a length before another rule sees them."""

from dataclasses import replace

import numpy as np

from intramural.core.errors import AggregationError
from intramural.core.layout import Vector
from intramural.core.messages import Update
from intramural.strategies.rule import Fold, Rule, State
from intramural.strategies.site_dp import norm_of

SLACK = 2.0**-22
"""Share of the bound given up for the rounding of the factor and of each product."""


class NormBound:
    """delta <- delta * min(1, bound / |delta|), site by site, then the inner rule.

    |delta| is the L2 norm, in float64. One site cannot pull further than `bound`; many small pulls
    in one direction remain. Under a mean, a hostile share p of the sites moves the step by at most
    2 p bound.

    Source: Sun et al. 2019, Section 4 (norm thresholding), https://arxiv.org/abs/1911.07963.
    """

    def __init__(self, inner: Rule, bound: float) -> None:
        """Cut to `bound`, above 0, what goes to `inner`."""
        assert bound > 0, bound
        self.name = inner.name
        # the coordinator cuts, so it must see each update
        self.traits = replace(inner.traits, sums_only=False)
        self.bound = bound
        self._inner = inner

    def begin(self, state: State, current: Vector, *, round: int) -> Fold:
        """Open a round of the inner rule."""
        return self._inner.begin(state, current, round=round)

    def add(self, fold: Fold, update: Update) -> None:
        """Cut an update and hand it on.

        Raises:
            AggregationError: A value is not finite, or the inner rule refuses; the fold is as
                before.
        """
        norm = norm_of(update.delta)
        if not norm < np.inf:
            raise AggregationError("update holds a value that is not finite; it was left out")
        if norm > self.bound:
            factor = np.float32(self.bound * (1.0 - SLACK) / norm)
            update = replace(update, delta=update.delta * factor)
        self._inner.add(fold, update)

    def finish(self, fold: Fold) -> tuple[Vector, State]:
        """Return what the inner rule returns."""
        return self._inner.finish(fold)
