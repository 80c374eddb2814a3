"""Small builders of updates, and the one way to run a rule's round."""

from collections.abc import Iterable, Sequence

import numpy as np

from intramural.core.layout import Vector
from intramural.core.messages import Update
from intramural.strategies.rule import Rule, State


def update(delta: Sequence[float] | Vector, *, site: str = "a", weight: int = 1) -> Update:
    return Update(
        site=site,
        round=1,
        layout="l",
        weight=weight,
        loss=0.0,
        seconds=0.0,
        delta=np.asarray(delta, dtype=np.float32),
    )


def run_round(
    rule: Rule, state: State, current: Vector, updates: Iterable[Update], *, round_: int = 1
) -> tuple[Vector, State]:
    fold = rule.begin(state, current, round=round_)
    for one in updates:
        rule.add(fold, one)
    return rule.finish(fold)
