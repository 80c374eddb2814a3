"""Rows of a Parquet file. The one file that knows pyarrow."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from intramural.core.errors import DataError
from intramural.data.rows import Row, open_records, require_columns

BATCH_ROWS = 256

# What a reader of text files leaves in the place of an undecodable byte.
_UNDECODABLE = "\udcff"


def parquet_rows(path: Path, wanted: Collection[str]) -> Iterator[Row]:
    """Yield the rows of a Parquet file; no column but the wanted ones is read.

    Raises:
        DataError: The file cannot be opened, is cut or damaged, or lacks a wanted column.
    """
    number = 0
    with open_records(path) as file:
        try:
            table = pq.ParquetFile(file)
            names = list(table.schema_arrow.names)
        except (pa.ArrowException, OSError):
            raise DataError(f"{path}: is no whole Parquet file; write or copy it again") from None
        require_columns(path, wanted, names, has_schema=True)
        batches = table.iter_batches(batch_size=BATCH_ROWS, columns=list(wanted))
        while (batch := _next_batch(path, batches, number)) is not None:
            columns = {name: _values(batch.column(name)) for name in wanted}
            for index in range(batch.num_rows):
                number += 1
                values = {name: column[index] for name, column in columns.items()}
                yield Row(place=f"row {number}", values=values)


def _next_batch(path: Path, batches: Any, number: int) -> Any:
    """Return the next batch, or None after the last."""
    try:
        return next(batches, None)
    except (pa.ArrowException, OSError):
        raise DataError(f"{path}: is damaged after row {number}; write or copy it again") from None


def _values(column: Any) -> list[object]:
    """Return a column's values; a text that is not UTF-8 becomes a lone surrogate."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> object:
    try:
        value: object = scalar.as_py()
    except UnicodeDecodeError:
        return _UNDECODABLE
    return value
