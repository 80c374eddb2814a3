"""Cells: the simulations that a sweep is made of."""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from intramural.core.canonical import canonical_json, digest_json
from intramural.core.config import check_config, read_table
from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.seeds import generator
from intramural.server.planning import check_federation
from intramural.simulations.partition import parse_spec
from intramural.simulations.sites import FOLDERS_MAX
from intramural.simulations.sweep_config import (
    METRICS,
    PARTITION,
    SITES,
    Choice,
    Range,
    SweepConfig,
)

DRAWS_MAX = 1000
"""Draws in a row that give no new cell, after which there are taken to be no more."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One simulation of a sweep."""

    number: int
    """From 1, in the order of sweep.toml."""
    parameters: dict[str, Any]
    """What is swept, by dotted key."""
    table: dict[str, Any] = field(repr=False)
    """Its federation.toml."""
    federation: FederationConfig
    sites: int
    partition: str
    digest: str
    """Of everything that decides its result; a finished cell is known by it."""

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.number:03d}-{self.digest[:8]}"


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a sweep starts from."""

    sweep: Path
    """sweep.toml."""
    federation: Path
    """federation.toml: every key that is not swept."""
    sites: int
    partition: str
    salt: str
    """Digest of the records and of all options that change a cell's result."""
    base_of: Callable[[str], str] = str
    """Returns the digest of a base model's content; by default its name stands for it."""


def cells_of(config: SweepConfig, source: Source) -> tuple[Cell, ...]:
    """Return the sweep's cells, each with its checked federation.

    Raises:
        ConfigError: Some cell is no federation, or cannot be judged; every problem is listed once,
            with the file it is in.
    """
    problems = list(_problems(config, source))
    if problems:
        raise ConfigError("\n".join(problems))
    base, cells = read_table(source.federation), []
    for number, parameters in enumerate(_draws(config, source), start=1):
        try:
            cells.append(_cell(number, parameters, base, source))
        except ConfigError as error:
            problems += str(error).splitlines()
            continue
        problems += _unjudged(config, cells[-1], source)
    if len({cell.federation.privacy is None for cell in cells}) > 1:
        problems.append(
            f"{source.sweep}: parameters: some cells have [privacy] and some have not, so nothing "
            "could be said of what tuning spends; sweep them apart"
        )
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return tuple(cells)


def _problems(config: SweepConfig, source: Source) -> Iterator[str]:
    """Yield what is wrong with sweep.toml, whatever the federation."""
    file, sweep = source.sweep, config.sweep
    if not config.choices:
        yield f"{file}: parameters: nothing is swept; name a key of federation.toml and its values"
    if sweep.kind == "random" and sweep.cells is None:
        yield f"{file}: sweep.cells: missing; a random sweep needs a number of cells"
    if sweep.kind == "grid" and sweep.cells is not None:
        yield f'{file}: sweep.cells: a grid has every combination; leave it out, or kind = "random"'
    for key, choice in config.choices.items():
        if sweep.kind == "grid" and isinstance(choice, Range):
            yield f'{file}: parameters.{key}: a grid needs a list of values; or kind = "random"'
    if "federation.name" in config.parameters:
        yield (
            f"{file}: parameters.federation.name: the name salts the split into training, "
            "validation and test records, so cells would not compare; leave it out"
        )
    for spec in dict.fromkeys((*(config.simulation.partition or ()), source.partition)):
        try:
            parse_spec(spec)
        except ConfigError as error:
            yield f"{file}: simulation.partition: {error}"


def _draws(config: SweepConfig, source: Source) -> Iterator[dict[str, Any]]:
    """Yield each cell's parameters, no two alike."""
    choices = config.choices
    if config.sweep.kind == "grid":
        lists = [choice for choice in choices.values() if isinstance(choice, tuple)]
        for values in itertools.product(*lists):
            yield dict(zip(choices, values, strict=True))
        return
    rng, wanted = generator(config.sweep.seed, "sweep"), config.sweep.cells or 0
    seen: set[bytes] = set()
    misses = 0
    while len(seen) < wanted:
        drawn = {key: _drawn(choices[key], rng) for key in sorted(choices)}
        mark = canonical_json(drawn)
        misses = misses + 1 if mark in seen else 0
        if misses == DRAWS_MAX:
            raise ConfigError(
                f"{source.sweep}: sweep.cells: {wanted} cells are asked for, and only {len(seen)} "
                "different ones were found; lower it, or give more values"
            )
        if mark not in seen:
            seen.add(mark)
            yield {key: drawn[key] for key in choices}


def _drawn(choice: Choice, rng: np.random.Generator) -> Any:
    if isinstance(choice, Range):
        return choice.draw(rng)
    return choice[int(rng.integers(len(choice)))]


def _cell(number: int, parameters: dict[str, Any], base: dict[str, Any], source: Source) -> Cell:
    """Return one cell.

    Raises:
        ConfigError: It is no federation; each line names the file that is wrong.
    """
    table = copy.deepcopy(base)
    keys = [key for key in parameters if key not in (SITES, PARTITION)]
    for key in keys:
        _set(table, key.split("."), parameters[key])
    try:
        federation = check_config(table, FederationConfig, source="")
    except ConfigError as error:
        raise ConfigError(
            "\n".join(_placed(line, keys, source) for line in str(error).splitlines())
        ) from None
    _find_base(table, source.federation.parent)
    sites = int(parameters.get(SITES, source.sites))
    dealt = str(parameters.get(PARTITION, source.partition))
    facts = {
        "manifest": federation.digest,
        "base": source.base_of(table["model"]["base"]),
        "sites": sites,
        "partition": dealt,
        "of": source.salt,
    }
    return Cell(
        number=number,
        parameters=parameters,
        table=table,
        federation=check_config(table, FederationConfig, source=str(source.federation)),
        sites=sites,
        partition=dealt,
        digest=digest_json(facts).removeprefix("sha256:"),
    )


def _set(table: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for name in path[:-1]:
        inner = table.get(name)
        table[name] = inner = inner if isinstance(inner, dict) else {}
        table = inner
    table[path[-1]] = value


def _find_base(table: dict[str, Any], folder: Path) -> None:
    """Name a base model that lies beside federation.toml by its whole path: cells lie elsewhere."""
    beside = folder / str(table["model"]["base"])
    if beside.is_dir():
        table["model"]["base"] = str(beside.resolve())


def _placed(line: str, keys: Sequence[str], source: Source) -> str:
    """Return an error's line with the file that it is in: the sweep's where it sets the key."""
    _, key, told = line.split(": ", 2)
    swept = any(f"{key}.".startswith(f"{k}.") or f"{k}.".startswith(f"{key}.") for k in keys)
    return (
        f"{source.sweep}: parameters.{key}: {told}"
        if swept
        else f"{source.federation}: {key}: {told}"
    )


def _unjudged(config: SweepConfig, cell: Cell, source: Source) -> Iterator[str]:
    """Yield why a cell could not be run, or not be compared by the metric."""
    federation = cell.federation
    known, asked = METRICS[federation.task.kind], config.sweep.metric
    if asked is not None and asked not in known:
        names = ", ".join(known)
        yield f"{source.sweep}: sweep.metric: no metric of the task, got {asked!r}; use {names}"
    if federation.privacy is None and not federation.evaluation.every:
        yield (
            f"{source.federation}: evaluation.every: 0, so nothing is measured on validation "
            "records; set 1 or more"
        )
    if cell.sites > FOLDERS_MAX or cell.partition.startswith("draw:"):
        yield (
            f"{source.sweep}: simulation: {cell.sites} sites by {cell.partition!r} are a crowd, "
            f"which no cell can be; deal records to at most {FOLDERS_MAX} sites"
        )
    if cell.sites < federation.sites.min:
        yield (
            f"{source.sweep}: simulation.sites: {cell.sites} is below sites.min = "
            f"{federation.sites.min}; raise it, or lower sites.min"
        )
    if federation.gate is not None and federation.gate.judge == "coordinator":
        yield (
            f"{source.federation}: gate.judge = 'coordinator': a sweep's cells have no "
            "holdout.toml; set 'sites'"
        )
    try:
        check_federation(federation)
    except ConfigError as error:
        yield from (f"{source.federation}: {line}" for line in str(error).splitlines())
