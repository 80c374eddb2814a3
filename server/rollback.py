"""Rollback: going back to the arrays before a round that made things worse than [gate] allows."""

from collections.abc import Mapping, Sequence
from typing import Any

from intramural.core.federation_rounds import Gate
from intramural.core.layout import Vector
from intramural.server.holdout import HOLDOUT
from intramural.strategies.rule import State

ROLLED_BACK = "rolled_back"
SOURCES = {"sites": "metrics", "coordinator": HOLDOUT}
"""Key of a round's record that holds a judge's metrics."""
LESS_IS_BETTER = frozenset({"loss", "perplexity"})
Kept = tuple[Vector, State]
"""Arrays and the rule's memory."""


class Rollback:
    """Keeps what was before the round under way, and says whether to go back to it."""

    def __init__(self, gate: Gate | None) -> None:
        """Judge by the federation's gate; None: nothing is kept, and every round passes."""
        self._gate = gate
        self._before: Kept | None = None

    def remember(self, vector: Vector, memory: State) -> None:
        """Keep what a round is about to replace."""
        if self._gate is not None:
            self._before = vector, memory

    def judge(
        self, record: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, Any], Kept | None]:
        """Return what the round's record gains, and what to go back to; nothing if it passes."""
        before, self._before = self._before, None
        if self._gate is None or before is None:
            return {}, None
        found = verdict(self._gate, record, history)
        return found, before if found else None


def verdict(
    gate: Gate, record: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what a round's record gains if its arrays are dropped; nothing if they are kept.

    The metric is held against that of the last arrays kept, as the committed history has it, so
    that a resumed run decides as the first one did. The first round has nothing to be held against,
    and is kept. Arrays that nobody could evaluate are not: a diverged model gives no loss.

    Args:
        gate: The federation's.
        record: Of the round, with its arrays' metrics.
        history: Records of the rounds before.
    """
    source = SOURCES[gate.judge]
    kept = [found for r in history if not r.get(ROLLED_BACK) and (found := r.get(source))]
    if not kept:
        return {}
    before, now = kept[-1][gate.metric], record[source].get(gate.metric)
    if now is not None:
        worse = now - before if gate.metric in LESS_IS_BETTER else before - now
        if worse <= gate.tolerance:
            return {}
    return {ROLLED_BACK: True, "gate": {"metric": gate.metric, "kept": before, "round": now}}
