"""Federated averaging, with server learning rate and momentum, on flat vectors."""

from typing import Literal

import numpy as np

from intramural.core.errors import AggregationError
from intramural.core.federation import FederationConfig
from intramural.core.layout import Vector, written_to_send
from intramural.core.messages import Update
from intramural.strategies.exact_sum import ExactSum
from intramural.strategies.rule import Fold, State, Traits

FRACTION_BITS = {"equal": 36, "examples": 30}
"""Grid of the sum. Weights in records are large, so a coarser grid leaves the mean as fine."""


class FedAvg:
    """next = current + learning_rate * velocity; velocity = momentum * velocity + mean(delta).

    mean(delta) = sum_k w_k delta_k / sum_k w_k, w_k the capped number of records, or 1. With a
    staleness power p it is sum_k (1 + s_k)**-p w_k delta_k / sum_k w_k for an update that started
    s_k rounds ago: late ones move the arrays less, and do not make the others move them more.

    Source: McMahan et al. 2017, Algorithm 1, https://arxiv.org/abs/1602.05629; server momentum:
    Hsu et al. 2019, https://arxiv.org/abs/1909.06335; staleness: Nguyen et al. 2022 (FedBuff),
    https://arxiv.org/abs/2106.06639.
    """

    name = "fedavg"
    traits = Traits(
        sums_only=True,
        exact_for_lora=False,
        mixed_ranks=False,
        byzantine=False,
        site_dp=True,
        asynchronous=True,
    )

    def __init__(
        self,
        *,
        weights: Literal["examples", "equal"] = "examples",
        weight_cap: int | None = None,
        learning_rate: float = 1.0,
        momentum: float = 0.0,
        staleness_power: float | None = None,
    ) -> None:
        self.staleness_power = staleness_power
        self.weights = weights
        self.weight_cap = weight_cap
        self.learning_rate = learning_rate
        self.momentum = momentum
        self._idle: ExactSum | None = None
        """The last round's sum, kept for its memory alone; the results lie elsewhere."""

    @classmethod
    def of(cls, federation: FederationConfig) -> "FedAvg":
        """Return the mean as a federation weighs it; the server's step is left to the registry."""
        settings, late = federation.strategy, federation.asynchrony
        return cls(
            weights=settings.weights,
            weight_cap=settings.weight_cap,
            staleness_power=None if late is None else late.staleness_power,
        )

    def weight_of(self, update: Update) -> int:
        """Return what the update counts for: 1, or its records up to the cap."""
        if self.weights == "equal":
            return 1
        return min(update.weight, self.weight_cap or update.weight)

    def begin(self, state: State, current: Vector, *, round: int) -> Fold:
        """Open a round; it holds two models and one update, whatever the number of sites."""
        total, self._idle = self._idle, None
        if total is None or total.size != current.size:
            total = ExactSum(current.size, fraction_bits=FRACTION_BITS[self.weights])
        return Fold(round=round, current=current, state=state, work=total)

    def add(self, fold: Fold, update: Update) -> None:
        """Fold one update in, exactly: the order of updates changes no bit.

        Raises:
            AggregationError: A value is not finite or far too large, or the weight is below 1;
                the fold is as before.
        """
        weight = self.weight_of(update)
        if weight < 1:
            raise AggregationError(f"update weighs {weight!r} records; it must be at least 1")
        fold.work.add(update.delta, weight * self.discount(fold.round - update.round))
        fold.weight += weight
        fold.sites.append(update.site)

    def discount(self, late: int) -> float:
        """Return what an update counts for that started so many rounds ago.

        A round that [gate] rolled back counts as one, though it left the arrays as they were.
        """
        if self.staleness_power is None:
            return 1.0
        assert late >= 0, "an update from a round to come"
        return float((1 + late) ** -self.staleness_power)

    def finish(self, fold: Fold) -> tuple[Vector, State]:
        """Return the next arrays and, with momentum, the velocity.

        Raises:
            AggregationError: No update was added.
        """
        if not fold.sites:
            raise AggregationError("no update to aggregate; lower sites.min or wait for sites")
        state: State = {}
        is_plain = not self.momentum and self.learning_rate == 1.0

        def write(step: Vector) -> None:
            fold.work.mean(fold.weight, out=step, plus=fold.current if is_plain else None)
            if is_plain:
                return
            if self.momentum:
                step += np.float32(self.momentum) * fold.state.get("velocity", np.float32(0))
                state["velocity"] = step.copy()
            if self.learning_rate != 1.0:
                step *= np.float32(self.learning_rate)
            step += fold.current

        following = written_to_send(fold.current.size, write)
        self._idle = fold.work
        return following, state
