"""How far a round's aggregate of LoRA adapters lies from the mean of the sites' own changes."""

from dataclasses import replace

import numpy as np

from intramural.core.errors import AggregationError
from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout, Vector
from intramural.core.messages import Update
from intramural.core.route import uplink
from intramural.strategies.fedavg import FedAvg
from intramural.strategies.lora import Pairs, moved
from intramural.strategies.rule import Fold

PRODUCTS_MAX = 1 << 27
"""Elements of all products together beyond which nothing is measured: a gigabyte for the sum."""


class AggregationErrorMeter:
    """`|dW' - sum_k p_k dW_k| / |sum_k p_k dW_k|` of a round, over all adapted layers together.

    dW is a layer's whole change, `residual + scale * B A`: of site k after its training, and dW' of
    the arrays that the rule made. Frobenius norms, in float64. A late update counts with the
    discount that the rule gives it, for what it changes; what a server optimizer, a norm bound or a
    robust rule makes of updates counts as error. It takes one product of factors for each layer and
    update, and as much memory as four models of the adapted layers.
    """

    def __init__(self, federation: FederationConfig, layout: Layout) -> None:
        """Measure on the coordinator's layout, by the weights that the federation sets."""
        self._pairs = Pairs(federation, layout)
        self._federation, self._layout = federation, layout
        self._mean = FedAvg.of(federation)
        self._size = self._pairs.products_layout.size
        self._fold: Fold | None = None
        self._current: Vector | None = None

    @property
    def applies(self) -> bool:
        """Whether there are pairs on both sides, few enough to multiply."""
        return 0 < self._size <= PRODUCTS_MAX

    def begin(self, current: Vector, round: int) -> None:
        """Open a round."""
        if self.applies:
            self._current = current
            with np.errstate(over="ignore", invalid="ignore"):  # `add` finds it, and ends measuring
                products = self._pairs.products(current, {})
            self._fold = self._mean.begin({}, products, round=round)

    def add(self, update: Update) -> None:
        """Take an update in that the rule took."""
        if self._fold is None or self._current is None:
            return
        up = uplink(self._federation, self._layout, round=self._fold.round)
        deltas = up.unflatten(update.delta)
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                change = self._pairs.products(self._current, deltas)
                change -= self._fold.current
            self._mean.add(self._fold, replace(update, delta=change))
        except AggregationError:  # a robust rule takes updates whose product no sum can hold
            self._fold = None

    def finish(self, following: Vector) -> float | None:
        """Return the error of the arrays that the rule made; None where there is none to tell."""
        fold, current, self._fold, self._current = self._fold, self._current, None, None
        if fold is None or current is None or not fold.sites:
            return None
        mean, _ = self._mean.finish(fold)
        off = whole = 0.0
        for pair in self._pairs:
            wanted = moved(mean, pair.product, None)
            made = self._pairs.scale * (
                moved(following, pair.b, None) @ moved(following, pair.a, None)
            )
            if pair.residual is not None:
                wanted += moved(current, pair.residual, None)
                made += moved(following, pair.residual, None)
            off += float(np.square(made - wanted).sum())
            whole += float(np.square(wanted).sum())
        return float(np.sqrt(off / whole)) if whole else None
