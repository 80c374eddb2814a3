"""The seam to Flower: any Rule as a Flower Strategy, and Flower's strategies as Rules."""

import inspect
import logging
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower_strategies
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import Strategy

from intramural.core.errors import AggregationError, ConfigError, IntramuralError, WireError
from intramural.core.layout import Layout, Vector
from intramural.core.messages import Update
from intramural.core.route import Part, factor_of
from intramural.strategies.exact_sum import largest
from intramural.strategies.matrix import FLOWER_PREFIX, traits_of
from intramural.strategies.rule import Fold, Rule, State

USABLE = frozenset(
    {"FedAvg", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi", "FedMedian", "FedTrimmedAvg"}
    | {"Krum", "MultiKrum", "Bulyan"}
)
"""Flower's strategies that act on arrays alone. The others need a part at the sites (FedProx, the
differential privacy wrappers), another reply (QFedAvg) or another model (XGBoost)."""
WEIGHT_KEY = "num-examples"
log = logging.getLogger(__name__)


class FlowerRule:
    """A stock Flower strategy inside our loop, unchanged.

    It holds all replies of a round until `finish`, as Flower does: memory grows with the sites.
    What the strategy remembers on itself (first and second moments, velocity) is read into our
    state after each round and put back before the next, so that it survives a restart.
    """

    def __init__(self, name: str, strategy: Strategy, layout: Layout) -> None:
        self.name = FLOWER_PREFIX + name
        self.traits = traits_of(self.name)
        self._strategy = strategy
        self._fresh = dict(vars(strategy))
        self._layout = layout

    @classmethod
    def named(cls, name: str, layout: Layout, options: dict[str, Any]) -> "FlowerRule":
        """Return the rule around Flower's strategy `name`.

        Raises:
            ConfigError: Flower has no such strategy, it needs more than arrays, or it does not
                take these options.
        """
        if name not in USABLE:
            raise ConfigError(f"strategy.rule: 'flwr:{name}' cannot be used; can: {sorted(USABLE)}")
        kind = getattr(flower_strategies, name)
        try:
            strategy = kind(min_train_nodes=1, min_available_nodes=1, **options)
        except TypeError:
            known = sorted(set(inspect.signature(kind).parameters) - {"self"})
            raise ConfigError(f"strategy.options: {name} takes only {known}") from None
        return cls(name, strategy, layout)

    def begin(self, state: State, current: Vector, *, round: int) -> Fold:
        """Open a round: give the strategy its memory, no more, and the current arrays."""
        vars(self._strategy).update(self._fresh)
        _restore(self._strategy, state)
        arrays = self._record(current)
        # the messages it would send are thrown away; what counts is that it sees the arrays
        list(self._strategy.configure_train(round, arrays, ConfigRecord(), cast(Grid, _OneNode())))
        return Fold(round=round, current=current, state=state, work={})

    def add(self, fold: Fold, update: Update) -> None:
        """Keep one update; it is combined in `finish`."""
        if not largest(update.delta) < np.inf:
            raise AggregationError("update holds a value that is not finite; it was left out")
        arrays = self._record(fold.current + update.delta)
        metrics = MetricRecord({WEIGHT_KEY: update.weight})
        content = RecordDict({"arrays": arrays, "metrics": metrics})
        fold.work[update.site] = Message(content, len(fold.work) + 1, "train")
        fold.weight += update.weight
        fold.sites.append(update.site)

    def finish(self, fold: Fold) -> tuple[Vector, State]:
        """Let the strategy combine the updates, in order of the sites' names."""
        replies = [fold.work[site] for site in sorted(fold.work)]
        arrays, _ = self._strategy.aggregate_train(fold.round, replies)
        if arrays is None:
            raise AggregationError(f"{self.name} gave no arrays for {len(replies)} updates")
        named = {name: array.numpy().astype(np.float32) for name, array in arrays.items()}
        return self._layout.flatten(named), _remembered(self._strategy)

    def _record(self, vector: Vector) -> ArrayRecord:
        return ArrayRecord({n: Array(a) for n, a in self._layout.unflatten(vector).items()})


class _OneNode:
    """A grid with one node, for strategies that ask how many there are."""

    def get_node_ids(self) -> list[int]:
        return [1]


def _remembered(strategy: Strategy) -> State:
    """Return the arrays a strategy keeps on itself, by `attribute/key` or `attribute[]/index`."""
    state: State = {}
    for attribute, value in vars(strategy).items():
        items: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, dict) and attribute != "current_arrays":
            items = value.items()
        elif isinstance(value, list):
            items = enumerate(value)
        mark = "[]" if isinstance(value, list) else ""
        for key, array in items:
            if isinstance(array, np.ndarray | np.generic):  # a parameter without axes is a scalar
                state[f"{attribute}{mark}/{key}"] = np.asarray(array)
    return state


def _restore(strategy: Strategy, state: State) -> None:
    """Put back what `_remembered` read."""
    grouped: dict[str, dict[str, Any]] = {}
    for name, array in state.items():
        attribute, _, key = name.partition("/")
        grouped.setdefault(attribute, {})[key] = array
    for attribute, items in grouped.items():
        listed = attribute.endswith("[]")
        value: Any = [items[str(i)] for i in range(len(items))] if listed else items
        setattr(strategy, attribute.removesuffix("[]"), value)


class RuleStrategy(FlowerFedAvg):
    """Any of our rules as a strategy of a stock Flower app.

    Replies are those of Flower's own strategies: one `ArrayRecord` of named arrays after training,
    one `MetricRecord` with `num-examples`. Arrays that are not floating point (counters) are taken
    from the current model. Replies that do not fit are left out, and a round with too few of them
    changes nothing, instead of ending the run. What the rule measures of a round is among its
    training metrics, such as `aggregation-error`.

    Example:
        `RuleStrategy(FedAvg(momentum=0.9), fraction_train=0.5).start(grid, initial_arrays)`
    """

    def __init__(self, rule: Rule, **flower_options: Any) -> None:
        """Wrap `rule`; `flower_options` are those of Flower's FedAvg."""
        super().__init__(**flower_options)
        self.rule = rule
        self.state: State = {}
        self._current: dict[str, np.ndarray[Any, Any]] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remember the current arrays, then sample as FedAvg does."""
        self._current = {name: array.numpy() for name, array in arrays.items()}
        self._prepare()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies one by one, then average their metrics as FedAvg does."""
        layout = self.layout()
        current = layout.flatten({name: self._current[name] for name, _ in layout.entries})
        fold = self.rule.begin(self.state, current, round=server_round)
        kept: list[RecordDict] = []
        for reply in replies:
            try:
                update, metrics = self._read(reply, layout, current, server_round)
                self.rule.add(fold, update)
            except IntramuralError as error:
                log.warning("node %d left out: %s", reply.metadata.src_node_id, error)
                continue
            kept.append(RecordDict({"metrics": metrics}))
        if not kept:
            return None, None
        try:
            vector, self.state = self.rule.finish(fold)
        except AggregationError as error:
            log.warning("round %d changes nothing: %s", server_round, error)
            return None, None
        new = self._current | layout.unflatten(vector)
        arrays = ArrayRecord(
            {n: Array(np.asarray(new[n], a.dtype)) for n, a in self._current.items()}
        )
        averaged = self.train_metrics_aggr_fn(kept, self.weighted_by_key)
        for name, value in fold.measures.items():
            averaged[name.replace("_", "-")] = value
        return arrays, averaged

    def layout(self) -> Layout:
        """Return the layout of the current arrays that are floating point."""
        arrays = self._current.items()
        return Layout(tuple((n, a.shape) for n, a in arrays if np.issubdtype(a.dtype, np.floating)))

    def _prepare(self) -> None:
        """Do what a rule needs once the current arrays are known."""

    def _uplink(self, layout: Layout, server_round: int) -> Layout:
        """Return the layout of what the clients train in a round: all of it."""
        del server_round
        return layout

    def _read(
        self, reply: Message, layout: Layout, current: Vector, server_round: int
    ) -> tuple[Update, MetricRecord]:
        """Return what a reply says.

        Raises:
            WireError: It is an error, or not what Flower's strategies expect, or it moved arrays
                that this round does not train; a reply may leave those out.
        """
        if reply.has_error():
            raise WireError(f"an error came instead of a reply: {reply.error.reason}")
        up = self._uplink(layout, server_round)
        trained = {name for name, _ in up.entries}
        try:
            (records,) = reply.content.array_records.values()
            (metrics,) = reply.content.metric_records.values()
            weight = int(cast(float, metrics[self.weighted_by_key]))
            sent = {
                n: records[n].numpy() for n, _ in layout.entries if n in records or n in trained
            }
        except (ArithmeticError, EOFError, KeyError, TypeError, ValueError):
            raise WireError("reply lacks its arrays, or its weight is no number") from None
        for name in sent.keys() - trained:
            if not np.array_equal(sent[name], self._current[name]):
                raise WireError(
                    f"reply moved {name!r}, which round {server_round} does not train; freeze "
                    f"lora_{factor_of(name)} at the client"
                )
        with np.errstate(over="ignore", invalid="ignore"):  # the rule refuses what overflows
            delta = up.flatten({name: sent[name] for name in trained})
            delta = delta - Part(layout, up).gather(current)
        update = Update(
            site=str(reply.metadata.src_node_id),
            round=server_round,
            layout=up.digest,
            weight=weight,
            loss=0.0,
            seconds=0.0,
            delta=delta,
        )
        return update, metrics
