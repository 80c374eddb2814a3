"""A population: the records of very many simulated sites in one memory-mapped file.

A folder a site would cost a million folders. Here all records lie in one Arrow file, in the order
they were read, and a site is a list of rows: dealt, and kept in two arrays on disk, or drawn from
a seed when they are asked for. Nothing in memory grows with the number of sites.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from intramural.core.canonical import digest_json
from intramural.core.errors import DataError
from intramural.core.files import write_json
from intramural.core.messages import Split
from intramural.core.seeds import generator
from intramural.core.tokens import Ids
from intramural.data.records import Record
from intramural.data.split import key_of, side_of

RECORDS, FACTS, STARTS, ROWS = "records.arrow", "population.json", "starts.npy", "rows.npy"
COLUMNS = ("text", "target", "group", "person")
BATCH_ROWS = 10_000
"""Records that are tokenised at a time."""
CHUNK_BYTES = 1 << 26
"""Tokens that lie in one piece in the file, at least; where rows are alike, a piece is a matrix."""
TAKEN_MAX = 1 << 16
"""Tokens that are copied for a site, and kept as long as its agent; more stay in the file."""
SPLITS: tuple[Split, ...] = get_args(Split)
Rows = NDArray[np.int64]
"""Positions of a site's records in the file, ascending, shape `(records,)`."""
Pair = tuple[NDArray[np.int32], NDArray[np.int32]]
"""One record's token ids and targets."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Sites that hold `records` records each, drawn from the file without repeats in a site."""

    records: int
    seed: int


class Population:
    """The sites of a population, by number from 0."""

    def __init__(self, folder: Path) -> None:
        """Open what `write_population` wrote; nothing is read yet but its facts.

        Raises:
            DataError: The folder holds no whole population.
        """
        self.folder = folder
        self._tables: dict[str, TokenTable] = {}
        self._sides: dict[str, NDArray[np.int8]] = {}
        try:
            facts = json.loads((folder / FACTS).read_bytes())
            self._table = _mapped(folder / RECORDS)
            self.sites: int = facts["sites"]
            self._draw = Draw(**facts["draw"]) if facts["draw"] else None
            if self._draw is None:
                self._starts, self._rows = _array(folder / STARTS), _array(folder / ROWS)
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise DataError(
                f"{folder}: holds no whole population ({type(error).__name__}); deal it anew"
            ) from error

    def __len__(self) -> int:
        """Return the number of records in the file."""
        return int(self._table.num_rows)

    def rows_of(self, site: int) -> Rows:
        """Return the rows that a site holds."""
        if self._draw is None:
            return np.array(self._rows[self._starts[site] : self._starts[site + 1]])
        rng = generator(self._draw.seed, "population", site)
        return np.sort(rng.choice(len(self), size=self._draw.records, replace=False))

    def records_of(self, site: int) -> tuple[Record, ...]:
        """Return a site's records; each knows its row."""
        rows = self.rows_of(site)
        columns = [self._table.column(name).take(rows).to_pylist() for name in COLUMNS]
        return tuple(
            Record(text=text, target=target, group=group, person=person, row=row)
            for text, target, group, person, row in zip(*columns, rows.tolist(), strict=True)
        )

    def rows_on(self, site: int, split: Split, *, salt: str) -> Rows:
        """Return the rows of a site's split, without reading the records; as `split_records` deals.

        Raises:
            DataError: Records have both groups and persons, whose chains depend on the site.
        """
        if salt not in self._sides:
            self._sides[salt] = self._load_sides(salt)
        rows = self.rows_of(site)
        found: Rows = rows[self._sides[salt][rows] == SPLITS.index(split)]
        return found

    @cached_property
    def has_chains(self) -> bool:
        """Whether records have both groups and persons: then a split must be made of records."""
        nulls = [self._table.column(name).null_count for name in ("group", "person")]
        return all(count < len(self) for count in nulls)

    def _load_sides(self, salt: str) -> NDArray[np.int8]:
        """Return each record's side, from the file of that salt, which is made at first use."""
        if self.has_chains:
            raise DataError(f"{self.folder}: groups and persons chain records; read the records")
        path = self.folder / f"sides-{digest_json(salt)[7:23]}.npy"
        if not path.is_file():
            names = [self._table.column(name).to_pylist() for name in ("text", "group", "person")]
            found = (
                SPLITS.index(side_of(key_of(text, group, person), salt))
                for text, group, person in zip(*names, strict=True)
            )
            sides = np.fromiter(found, dtype=np.int8, count=len(self))
            _write_beside(path, lambda sink: sink.write(_npy(sides)))
        return _array(path)

    def tokens(self, key: str, make: Callable[[Sequence[Record]], Iterable[Pair]]) -> "TokenTable":
        """Return all records' tokens, from the file of that name; it is made if it is not there.

        Args:
            key: Names tokenizer and settings; another key is another file.
            make: Returns ids and targets of some records, in their order.
        """
        if key not in self._tables:
            path = self.folder / f"tokens-{key}.arrow"
            if not path.is_file():
                self._write_tokens(path, make)
            self._tables[key] = TokenTable(path)
        return self._tables[key]

    def _write_tokens(self, path: Path, make: Callable[[Sequence[Record]], Iterable[Pair]]) -> None:
        kind = pa.list_(pa.int32())
        schema = pa.schema([("inputs", kind), ("targets", kind)])

        def write(sink: Any) -> None:
            with pa.ipc.new_file(sink, schema) as file:
                held: list[Any] = []
                for start in range(0, len(self), BATCH_ROWS):
                    part = self._table.slice(start, BATCH_ROWS).select(["text", "target"])
                    records = [
                        Record(text=row["text"], target=row["target"]) for row in part.to_pylist()
                    ]
                    pairs = list(make(records))
                    arrays = [pa.array([pair[side] for pair in pairs], kind) for side in (0, 1)]
                    held.append(pa.record_batch(arrays, schema=schema))
                    is_last = start + BATCH_ROWS >= len(self)
                    if is_last or sum(batch.nbytes for batch in held) >= CHUNK_BYTES:
                        file.write_table(pa.Table.from_batches(held).combine_chunks())
                        held = []

        _write_beside(path, write)


class TokenTable:
    """Token ids and targets of a population's records, memory-mapped."""

    def __init__(self, path: Path) -> None:
        """Open a file that `Population.tokens` wrote."""
        table = _mapped(path)
        self._inputs, self._targets = _Side(table.column("inputs")), _Side(table.column("targets"))

    def of(self, rows: Sequence[int] | Rows) -> tuple[Ids, Ids]:
        """Return the ids and the targets of some rows; nobody shall write to them."""
        wanted = np.asarray(rows, dtype=np.int64)
        return self._inputs.of(wanted), self._targets.of(wanted)


class _Side:
    """The ids of all records, or their targets, in the pieces of the file."""

    def __init__(self, column: Any) -> None:
        self._pieces = [
            _cells(chunk.values.to_numpy(), chunk.offsets.to_numpy()) for chunk in column.chunks
        ]
        self._edges = np.cumsum([0, *map(len, column.chunks)])

    def of(self, rows: Rows) -> Ids:
        """Return some rows: one matrix, which is faster, if they are few, alike, and in a piece."""
        places = self._edges.searchsorted(rows, side="right") - 1
        first = int(places[0]) if len(rows) else 0
        piece = self._pieces[first]
        if (
            isinstance(piece, np.ndarray)
            and len(rows) * piece.shape[1] <= TAKEN_MAX
            and (places == first).all()
        ):
            taken: NDArray[np.int32] = piece.take(rows - self._edges[first], axis=0)
            return taken
        offsets = (rows - self._edges[places]).tolist()
        return [self._pieces[i][row] for i, row in zip(places.tolist(), offsets, strict=True)]


def _cells(values: NDArray[np.int32], starts: NDArray[np.int32]) -> "NDArray[np.int32] | _Ragged":
    """Return the rows that begin at `starts`; as one matrix, the faster, if they are alike."""
    sizes = np.diff(starts)
    if len(sizes) and (sizes == sizes[0]).all():
        return values[starts[0] : starts[-1]].reshape(len(sizes), sizes[0])
    return _Ragged(values, starts)


class _Ragged:
    """Rows of different lengths."""

    def __init__(self, values: NDArray[np.int32], starts: NDArray[np.int32]) -> None:
        self._values, self._starts = values, starts

    def __getitem__(self, row: int) -> NDArray[np.int32]:
        return self._values[self._starts[row] : self._starts[row + 1]]


def write_population(
    folder: Path, records: Sequence[Record], dealt: Sequence[Rows] | Draw, *, sites: int
) -> Population:
    """Write a population and open it; the small file of facts comes last.

    Args:
        folder: Where; made if it is not there.
        records: All of them.
        dealt: Each site's rows, or how they are drawn.
        sites: How many there are.

    Raises:
        DataError: A site would draw more records than there are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    columns = {name: [getattr(r, name) for r in records] for name in COLUMNS}
    table = pa.table(
        {name: pa.array(values, pa.large_string()) for name, values in columns.items()}
    )

    def write(sink: Any) -> None:
        with pa.ipc.new_file(sink, table.schema) as file:
            file.write_table(table.combine_chunks())

    _write_beside(folder / RECORDS, write)
    draw = None
    if isinstance(dealt, Draw):
        if dealt.records > len(records):
            raise DataError(
                f"a site cannot draw {dealt.records} of {len(records)} records; lower draw:RECORDS"
            )
        draw = {"records": dealt.records, "seed": dealt.seed}
    else:
        starts = np.cumsum([0, *(len(rows) for rows in dealt)], dtype=np.int64)
        np.save(folder / STARTS, starts)
        np.save(folder / ROWS, np.concatenate([np.sort(rows) for rows in dealt]))
    write_json(folder / FACTS, {"sites": sites, "draw": draw})
    return Population(folder)


def _write_beside(path: Path, write: Callable[[Any], None]) -> None:
    """Write a file under another name first: whoever finds it finds it whole."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with pa.OSFile(str(beside), "wb") as sink:
        write(sink)
    beside.replace(path)


def _npy(array: NDArray[Any]) -> bytes:
    content = BytesIO()
    np.save(content, array)
    return content.getvalue()


def _array(path: Path) -> NDArray[Any]:
    """Return a memory-mapped array, plain: a `memmap` answers to an index in Python, slowly."""
    mapped: NDArray[Any] = np.load(path, mmap_mode="r").view(np.ndarray)
    return mapped


def _mapped(path: Path) -> Any:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
