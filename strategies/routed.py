"""Routed: a rule on the part of the coordinator's vector that the sites train in a round."""

from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout, Vector, written
from intramural.core.messages import Update
from intramural.core.route import Part, trained_factor, uplink
from intramural.strategies.rule import Fold, Rule, State


class Routed:
    """Lets a rule see the trained part alone; the rest of the arrays stays as it is.

    Where the part changes from round to round (RoLoRA), the rule's memory of each is kept apart.
    """

    def __init__(self, inner: Rule, federation: FederationConfig, layout: Layout) -> None:
        """Route `inner` as the federation's rule wants; `layout` is the coordinator's."""
        self.name, self.traits = federation.strategy.rule, inner.traits
        self._inner = inner
        self._federation = federation
        self._layout = layout
        self._parts: dict[str, Part] = {}

    def part(self, round: int) -> Part:
        """Return where a round's update lies in the coordinator's vector."""
        turn = trained_factor(self._federation.strategy.rule, round) or ""
        if turn not in self._parts:
            up = uplink(self._federation, self._layout, round=round)
            self._parts[turn] = Part(self._layout, up)
        return self._parts[turn]

    def begin(self, state: State, current: Vector, *, round: int) -> Fold:
        """Open a round on its part."""
        prefix = self._prefix(round)
        own = {n.removeprefix(prefix): a for n, a in state.items() if n.startswith(prefix)}
        inner = self._inner.begin(own, self.part(round).gather(current), round=round)
        return Fold.around(inner, current=current, state=state)

    def add(self, fold: Fold, update: Update) -> None:
        """Fold in an update of the round's uplink layout."""
        self._inner.add(fold.work, update)
        fold.weight = fold.work.weight

    def finish(self, fold: Fold) -> tuple[Vector, State]:
        """Return the current arrays with the part replaced, and all parts' memories."""
        values, own = self._inner.finish(fold.work)
        prefix, part = self._prefix(fold.round), self.part(fold.round)
        kept = {n: a for n, a in fold.state.items() if not n.startswith(prefix)}
        state = kept | {prefix + name: array for name, array in own.items()}

        def write(out: Vector) -> None:
            out[:] = fold.current
            part.scatter(values, out)

        return written(fold.current.size, write), state

    def _prefix(self, round: int) -> str:
        turn = trained_factor(self._federation.strategy.rule, round)
        return f"{turn}/" if turn else ""
