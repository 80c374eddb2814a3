"""Reading a site's file into records. Bad rows are counted, or refused, and never shown."""

from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from intramural.core.errors import DataError
from intramural.data.judge import Unusable, judge
from intramural.data.records import Columns, Record, Records
from intramural.data.rows import Row, csv_rows, jsonl_rows
from intramural.data.text import normalise

SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet")


def read_records(
    path: Path, columns: Columns, *, labels: Collection[str] | None = None, strict: bool = False
) -> Records:
    """Return the records of a CSV, JSONL or Parquet file, chosen by its suffix.

    A CSV file has a header line, commas and UTF-8; a JSONL file one object a line. Only the named
    columns are judged: what other columns hold does not matter. Texts, targets, persons and groups
    come back cleaned by `text.normalise`.

    Args:
        path: The file.
        columns: Which columns to read.
        labels: If given, a row with any other target is bad; None takes every target.
        strict: True refuses the file at its first bad row; False skips such rows and counts them.

    Returns:
        At least one record, and how many rows were skipped for which reason.

    Raises:
        DataError: The suffix is unknown; the file cannot be read, or lacks a column; a row is bad
            and `strict` is true; or no row is usable. The message names files, columns, line
            numbers and counts, and no value of any row.
    """
    known = None if labels is None else frozenset(normalise(label) for label in labels)
    records: list[Record] = []
    skipped: Counter[str] = Counter()
    for row in _rows(path, columns.names):
        try:
            records.append(judge(row, columns, known))
        except Unusable as problem:
            if strict:
                place = row.place + (": " if problem.column is None else ", ")
                raise DataError(f"{path}: {place}{problem}; {problem.remedy}") from None
            skipped[str(problem)] += 1
    if not records:
        raise _nothing_usable(path, skipped)
    return Records(records=tuple(records), skipped=dict(skipped))


def _rows(path: Path, wanted: Collection[str]) -> Iterator[Row]:
    """Return the rows of a file, by its suffix."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: is of no known format; use one of {', '.join(SUFFIXES)}")
    if suffix == ".csv":
        return csv_rows(path, wanted)
    if suffix == ".parquet":
        # Loading pyarrow takes longer than reading most files, so only Parquet pays for it.
        from intramural.data.parquet import parquet_rows

        return parquet_rows(path, wanted)
    return jsonl_rows(path, wanted)


def _nothing_usable(path: Path, skipped: Counter[str]) -> DataError:
    """Return the error for a file that gave no record."""
    if not skipped:
        return DataError(f"{path}: has no rows; name a file with records")
    reasons = "; ".join(f"{count} with {reason}" for reason, count in skipped.most_common())
    return DataError(
        f"{path}: none of {skipped.total()} rows is usable ({reasons});"
        " correct the rows, or the columns named for them"
    )
