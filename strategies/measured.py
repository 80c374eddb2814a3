"""Measured: a rule, with the aggregation error of each round beside it."""

from intramural.core.layout import Vector
from intramural.core.messages import Update
from intramural.strategies.lora_error import AggregationErrorMeter
from intramural.strategies.rule import Fold, Rule, State

AGGREGATION_ERROR = "aggregation_error"


class Measured:
    """Changes nothing of what the rule makes, and tells how far it lies from the sites' mean."""

    def __init__(self, inner: Rule, meter: AggregationErrorMeter) -> None:
        """Measure `inner`."""
        self.name, self.traits = inner.name, inner.traits
        self._inner = inner
        self._meter = meter

    def begin(self, state: State, current: Vector, *, round: int) -> Fold:
        """Open a round."""
        inner = self._inner.begin(state, current, round=round)
        self._meter.begin(current, round)
        return Fold.around(inner, current=current, state=state)

    def add(self, fold: Fold, update: Update) -> None:
        """Fold an update in; one that the rule refuses is not measured."""
        self._inner.add(fold.work, update)
        self._meter.add(update)
        fold.weight = fold.work.weight

    def finish(self, fold: Fold) -> tuple[Vector, State]:
        """Return what the rule returns; the fold's measures then hold the error."""
        following, state = self._inner.finish(fold.work)
        error = self._meter.finish(following)
        fold.measures |= fold.work.measures
        if error is not None:
            fold.measures[AGGREGATION_ERROR] = error
        return following, state
