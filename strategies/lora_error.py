"""How far a round's aggregate of LoRA adapters lies from the mean of the sites' own changes."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from intramural.core.errors import AggregationError
from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout, Vector
from intramural.core.messages import Update
from intramural.core.route import uplink
from intramural.strategies.fedavg import FedAvg
from intramural.strategies.lora import Matrix, Pairs, moved
from intramural.strategies.rule import Fold

PRODUCTS_MAX = 1 << 27
"""Elements of all products together beyond which nothing is measured: a gigabyte for the sum."""
KEPT_MAX = 1.0
"""Numbers of the updates that are kept, by those of their products."""
WHOLE_MAX = float(np.finfo(np.float32).max) ** 2
"""Square of a norm beyond which no error is told: there float32 ends."""


class AggregationErrorMeter:
    """`|dW' - sum_k p_k dW_k| / |sum_k p_k dW_k|` of a round, over all adapted layers together.

    dW is a layer's whole change, `residual + scale * B A`: of site k after its training, and dW' of
    the arrays that the rule made. Frobenius norms, in float64. A late update counts with the
    discount that the rule gives it, for what it changes; what a server optimizer, a norm bound or a
    robust rule makes of updates counts as error.

    Few updates are kept, and their factors multiplied all at once when the round ends. Beyond as
    many numbers as their products have, each update's products are made and added as it comes:
    memory is bounded by five models of the adapted layers and a few copies of the largest, whatever
    the number of sites. What is kept stays until the round ends or another begins. Where products
    are summed, one that no exact sum can hold ends the measuring of its round.
    """

    def __init__(self, federation: FederationConfig, layout: Layout) -> None:
        """Measure on the coordinator's layout, by the weights that the federation sets."""
        self._pairs = Pairs(federation, layout)
        self._federation, self._layout = federation, layout
        self._mean = FedAvg.of(federation)
        self._size = self._pairs.products_layout.size
        self._round = 0
        self._current: Vector | None = None
        """None: nothing is measured."""
        self._kept: list[Update] = []
        self._fold: Fold | None = None
        """Of the products, once they are made one by one."""

    @property
    def applies(self) -> bool:
        """Whether there are pairs on both sides, few enough to multiply."""
        return 0 < self._size <= PRODUCTS_MAX

    def begin(self, current: Vector, round: int) -> None:
        """Open a round."""
        self._round, self._current = round, current if self.applies else None
        self._kept, self._fold = [], None

    def add(self, update: Update) -> None:
        """Take an update in that the rule took; its vector is not kept."""
        if self._current is None:
            return
        if self._mean.weight_of(update) < 1:  # none of the coordinator's; an app's may be
            self._stop()
            return
        numbers = (len(self._kept) + 1) * update.delta.size
        if self._fold is None and numbers <= KEPT_MAX * self._size:
            self._kept.append(replace(update, delta=update.delta.copy()))
            return
        try:
            for one in (*self._kept, update):
                self._add_products(one, self._current)
            self._kept = []
        except AggregationError:  # a robust rule takes updates whose product no sum can hold
            self._stop()

    def _stop(self) -> None:
        """Measure no more in this round."""
        self._current, self._kept, self._fold = None, [], None

    def _add_products(self, update: Update, current: Vector) -> None:
        with np.errstate(over="ignore", invalid="ignore"):  # the sum finds it
            if self._fold is None:
                products = self._pairs.products(current, {})
                self._fold = self._mean.begin({}, products, round=self._round)
            change = self._pairs.products(current, self._deltas(update))
            change -= self._fold.current
        self._mean.add(self._fold, replace(update, delta=change))

    def _deltas(self, update: Update) -> dict[str, Vector]:
        """Return what an update changed, by parameter."""
        return uplink(self._federation, self._layout, round=self._round).unflatten(update.delta)

    def finish(self, following: Vector) -> float | None:
        """Return the error of the arrays that the rule made; None where there is none to tell."""
        current = self._current
        if current is None or not (self._kept or self._fold):
            self._stop()
            return None
        off = whole = 0.0
        with np.errstate(over="ignore", invalid="ignore"):  # what is too large is not told of
            for pair, mean in zip(self._pairs, self._means(current), strict=True):
                factor_b, factor_a = (moved(following, slot, None) for slot in (pair.b, pair.a))
                made = (self._pairs.scale * factor_b) @ factor_a
                wanted = mean
                if pair.residual is not None:
                    wanted = mean + moved(current, pair.residual, None)
                    made += moved(following, pair.residual, None)
                made -= wanted
                off += float(np.square(made, out=made).sum())
                whole += float(np.square(wanted).sum())
        self._stop()
        return float(np.sqrt(off / whole)) if 0 < whole <= WHOLE_MAX and off <= WHOLE_MAX else None

    def _means(self, current: Vector) -> Iterator[Matrix]:
        """Yield each pair's mean product, without the residual, in float64."""
        if self._fold is not None:
            mean, _ = self._mean.finish(self._fold)
            yield from (moved(mean, pair.product, None) for pair in self._pairs)
            return
        # In an order that is not that of their arrival: the last bits depend on it.
        updates = sorted(self._kept, key=lambda update: (update.site, update.round))
        deltas = [self._deltas(update) for update in updates]
        weights = [self._mean.weight_of(update) for update in updates]
        shares = [
            weight * self._mean.discount(self._round - update.round) / sum(weights)
            for weight, update in zip(weights, updates, strict=True)
        ]
        for pair in self._pairs:
            a, b = moved(current, pair.a, None), moved(current, pair.b, None)
            left, right = [(1 - sum(shares)) * b], [a]
            for share, delta in zip(shares, deltas, strict=True):
                left.append(share * moved(current, pair.b, delta.get(pair.b.name)))
                right.append(moved(current, pair.a, delta.get(pair.a.name)))
            factor = np.hstack(left)
            factor *= self._pairs.scale
            yield factor @ np.vstack(right)
