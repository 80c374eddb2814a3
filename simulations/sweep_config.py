"""sweep.toml: which federations a sweep tries, and what it judges them by."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
from pydantic import Field, PlainValidator

from intramural.core.canonical import canonical_json
from intramural.core.config import Section, check_config, read_table
from intramural.core.federation import FederationConfig
from intramural.core.values import Count, Text

SITES, PARTITION = "simulation.sites", "simulation.partition"
"""How the options of `simulate` are called among a cell's parameters."""
METRICS: Final[dict[str, dict[str, bool]]] = {
    "classification": {
        "macro_f1": True,
        "accuracy": True,
        "balanced_accuracy": True,
        "loss": False,
    },
    "generation": {
        "loss": False,
        "token_loss": False,
        "perplexity": False,
        "token_accuracy": True,
        "example_accuracy": True,
    },
}
"""Metrics of each task that a sweep can be judged by, and whether more is better; the first is the
default."""
DIGITS = 6
"""Significant digits of a drawn number: it is written in a file, and read by people."""


class Range(Section):
    """Where random numbers are drawn from; two whole numbers give whole numbers."""

    low: int | float
    high: int | float
    log: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether whole numbers are drawn."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def draw(self, rng: np.random.Generator) -> int | float:
        """Return one number, both ends included."""
        low, high = float(self.low), float(self.high)
        if self.is_whole and not self.log:
            return int(rng.integers(int(self.low), int(self.high), endpoint=True))
        if self.log:
            number = math.exp(rng.uniform(math.log(low), math.log(high)))
        else:
            number = rng.uniform(low, high)
        number = min(max(float(f"{number:.{DIGITS}g}"), low), high)
        return round(number) if self.is_whole else number


Choice = tuple[Any, ...] | Range


def _choice(given: Any) -> Choice:
    """Return the values, or the range, of one parameter."""
    if isinstance(given, Range | tuple):
        return given
    if isinstance(given, list):
        if not given:
            raise ValueError("is an empty list; give at least one value")
        if len({canonical_json(value) for value in given}) < len(given):
            raise ValueError("names a value twice; a cell is run once")
        return tuple(given)
    if not isinstance(given, dict):
        raise ValueError("is one value; give a list, or { low = .., high = .. }; one value is [x]")
    numbers = [given.get("low"), given.get("high")]
    if set(given) - {"low", "high", "log"} or not all(
        isinstance(number, int | float) and not isinstance(number, bool) for number in numbers
    ):
        raise ValueError("must be a list, or { low = .., high = .., log = true } with two numbers")
    found = Range(low=given["low"], high=given["high"], log=given.get("log", False))
    if not found.low < found.high or (found.log and found.low <= 0):
        raise ValueError("needs low below high, and above 0 with log = true")
    return found


class Sweep(Section):
    """The table [sweep]."""

    kind: Literal["grid", "random"]
    """'grid' (every combination) or 'random' (so many draws)"""
    cells: Count | None = None
    """random: number of cells"""
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
    """random: seed of the draws; more cells keep the first ones"""
    metric: Text | None = None
    """what cells are judged by, on the sites' validation records, never on test records; absent:
    macro_f1, or the loss of a generation"""


class Dealing(Section):
    """The table [simulation]: options of `simulate` that are swept, or fixed."""

    sites: Annotated[tuple[Count, ...], Field(min_length=1)] | None = None
    """numbers of sites to try, a list; absent: the option --sites"""
    partition: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    """partitions to try, a list; absent: the option --partition"""


class SweepConfig(Section):
    """A sweep."""

    sweep: Sweep
    """how cells are chosen, and judged"""
    parameters: dict[str, Annotated[Any, PlainValidator(_choice)]] = Field(default_factory=dict)
    """keys of federation.toml, such as training.learning_rate, each with its values"""
    simulation: Dealing = Dealing()
    """sites and partitions to try"""

    @property
    def choices(self) -> dict[str, Choice]:
        """What each parameter can be, by its dotted key."""
        dealt = {SITES: self.simulation.sites, PARTITION: self.simulation.partition}
        return self.parameters | {key: values for key, values in dealt.items() if values}


def load_sweep(path: Path) -> SweepConfig:
    """Read sweep.toml; keys may be written dotted, nested or quoted.

    Raises:
        ConfigError: As `load_config`.
    """
    table = read_table(path)
    if isinstance(table.get("parameters"), dict):
        table["parameters"] = dict(_flat(table["parameters"]))
    return check_config(table, SweepConfig, source=str(path))


def metric_of(config: SweepConfig, federation: FederationConfig) -> tuple[str, bool]:
    """Return the metric that cells are judged by, and whether more of it is better."""
    known = METRICS[federation.task.kind]
    name = config.sweep.metric or next(iter(known))
    return name, known[name]


def _flat(table: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and what they are set to; a table with `low` or `high` is a range."""
    for key, value in table.items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, dict) and value and not {"low", "high"} & set(value):
            yield from _flat(value, name)
        else:
            yield name, value
