"""Partitions: how one file's records are dealt to simulated sites."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from intramural.core.errors import ConfigError, DataError
from intramural.data.records import Record
from intramural.data.split import grouping_keys

SPECS = (
    "'iid', 'dirichlet:ALPHA' (above 0), 'size:POWER' (0 or above), 'column:NAME', 'draw:RECORDS'"
)

Indices = NDArray[np.int64]
"""Positions in the records, ascending, shape `(rows,)`."""
Group = list[int]
"""Positions of the records that share one grouping key."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A parsed specification."""

    kind: Literal["iid", "dirichlet", "size", "column", "draw"]
    number: float = 0.0
    """dirichlet: concentration; size: power; draw: records of a site; else 0."""
    column: str = ""
    """column: its name; else empty."""


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Which records each site holds; no record is at two sites, and no site is empty."""

    sites: tuple[Indices, ...]
    rows_left_out: int
    """Records at no site; 0 but for 'column' with more values than sites."""

    def __iter__(self) -> Iterator[Indices]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


def parse_spec(spec: str) -> Scheme:
    """Read a specification such as 'dirichlet:0.3'.

    Raises:
        ConfigError: It is none of `SPECS`.
    """
    kind, colon, value = spec.partition(":")
    if kind == "iid" and not colon:
        return Scheme(kind="iid")
    if kind == "column" and value:
        return Scheme(kind="column", column=value)
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if kind == "dirichlet" and 0 < number < math.inf:
        return Scheme(kind="dirichlet", number=number)
    if kind == "size" and 0 <= number < math.inf:
        return Scheme(kind="size", number=number)
    if kind == "draw" and 1 <= number < math.inf and number == int(number):
        return Scheme(kind="draw", number=number)
    raise ConfigError(f"no partition is called {spec!r}; use one of {SPECS}")


def partition(
    records: Sequence[Record],
    spec: str,
    *,
    sites: int,
    rng: np.random.Generator,
    column_values: Sequence[str] | None = None,
) -> Partition:
    """Deal records to `sites` sites.

    iid: every site gets about the same share of the rows, drawn at random.
    dirichlet:ALPHA: for each target, shares drawn from Dirichlet(ALPHA, ..., ALPHA); the smaller
        ALPHA, the fewer sites hold most of a target.
    size:POWER: site k, from 0, gets a share proportional to (k + 1) ** -POWER, drawn at random.
    column:NAME: one site for each value of a column, the most frequent first; nothing is drawn.

    But for 'column', all records of one grouping key (see `data.split`) go to one site, so shares
    are met as far as whole groups allow. Which site a group goes to does not depend on the order
    of the records. A site that would get none is given the smallest group of the largest site.

    Args:
        records: What to deal.
        spec: One of the above.
        sites: At least 1.
        rng: Draws everything that is drawn.
        column_values: For 'column': each record's value, as long as `records`.

    Raises:
        ConfigError: `spec` or `sites` is wrong, or `column_values` are missing.
        DataError: There are fewer groups, or values of the column, than sites.

    Source of dirichlet: Hsu et al. 2019, https://arxiv.org/abs/1909.06335.
    """
    scheme = parse_spec(spec)
    assert scheme.kind != "draw", "a population's sites draw for themselves"
    if sites < 1:
        raise ConfigError(f"sites must be at least 1, got {sites!r}")
    if scheme.kind == "column":
        if column_values is None or len(column_values) != len(records):
            raise ConfigError(f"partition {spec!r} needs one value of the column for each record")
        return _by_column(column_values, scheme.column, sites)
    groups = _groups(records)
    if len(groups) < sites:
        raise DataError(
            f"{len(groups)} groups of records cannot fill {sites} sites;"
            " simulate fewer sites, or name a finer group column"
        )
    if scheme.kind == "dirichlet":
        dealt: list[list[Group]] = [[] for _ in range(sites)]
        for same_target in _by_target(records, groups):
            shares = rng.dirichlet(np.full(sites, scheme.number))
            for site, share in zip(dealt, _deal(same_target, shares, rng), strict=True):
                site.extend(share)
    else:
        weights = np.arange(1, sites + 1, dtype=np.float64) ** -scheme.number
        dealt = _deal(groups, weights / weights.sum(), rng)
    _fill_empty(dealt)
    return Partition(sites=tuple(_indices(site) for site in dealt), rows_left_out=0)


def _groups(records: Sequence[Record]) -> list[Group]:
    """Return the records' groups, in the order of their keys."""
    groups: defaultdict[str, Group] = defaultdict(list)
    for index, key in enumerate(grouping_keys(records)):
        groups[key].append(index)
    return [groups[key] for key in sorted(groups)]


def _by_target(records: Sequence[Record], groups: Sequence[Group]) -> list[list[Group]]:
    """Return the groups by target; a group of several counts for its most frequent one."""
    by_target: defaultdict[str, list[Group]] = defaultdict(list)
    for group in groups:
        counts = Counter(records[index].target for index in group)
        by_target[min(counts, key=lambda target: (-counts[target], target))].append(group)
    return [by_target[target] for target in sorted(by_target)]


def _deal(
    groups: Sequence[Group], shares: NDArray[np.float64], rng: np.random.Generator
) -> list[list[Group]]:
    """Deal shuffled groups so that site k gets about `shares[k]` of their rows.

    The groups are laid end to end, and the line is cut in proportion to the shares; a group goes
    where its middle lies.
    """
    dealt: list[list[Group]] = [[] for _ in shares]
    shuffled = [groups[index] for index in rng.permutation(len(groups))]
    sizes = np.array([len(group) for group in shuffled], dtype=np.float64)
    middles = (np.cumsum(sizes) - sizes / 2) / sizes.sum()
    # A line in n pieces has n - 1 cuts.
    for group, site in zip(
        shuffled, np.searchsorted(np.cumsum(shares)[:-1], middles, side="right"), strict=True
    ):
        dealt[site].append(group)
    return dealt


def _fill_empty(dealt: list[list[Group]]) -> None:
    """Give each empty site a group; there are at least as many groups as sites."""
    for site in dealt:
        if not site:
            largest = max((s for s in dealt if len(s) > 1), key=lambda s: sum(map(len, s)))
            site.append(largest.pop(min(range(len(largest)), key=lambda i: len(largest[i]))))


def _by_column(values: Sequence[str], column: str, sites: int) -> Partition:
    """Return one site for each of the most frequent values; ties in the order of the values."""
    rows: defaultdict[str, list[int]] = defaultdict(list)
    for index, value in enumerate(values):
        rows[value].append(index)
    if len(rows) < sites:
        raise DataError(
            f"column {column!r} has {len(rows)} values, too few for {sites} sites;"
            " simulate fewer sites, or partition by another column"
        )
    largest = sorted(rows, key=lambda value: (-len(rows[value]), value))[:sites]
    dealt = tuple(_indices([rows[value]]) for value in largest)
    return Partition(sites=dealt, rows_left_out=len(values) - sum(map(len, dealt)))


def _indices(groups: list[Group]) -> Indices:
    """Return the positions of several groups, ascending."""
    return np.array(sorted(index for group in groups for index in group), dtype=np.int64)
