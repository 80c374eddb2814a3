"""Rows: what a CSV or JSONL file holds, read line by line in bounded memory, not yet judged."""

import csv
import json
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from intramural.core.errors import DataError

LINE_BYTES_MAX = 1 << 20
"""Bytes of a line, its end included; a longer one is passed over in pieces, never held."""

NAMES_SHOWN_MAX = 20
NAME_CHARS_SHOWN_MAX = 40
BOM = b"\xef\xbb\xbf"

_HEADER_REMEDY = "save it as UTF-8, with one short header line and commas"

# Stands for an over-long line among the lines given to the csv module. Undecodable bytes become
# surrogates above U+DC80, so this one cannot come from a file.
_TOO_LONG = "\ud800"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row as the file holds it: either values, or the reason why it has none."""

    place: str
    """Where the row starts, such as 'line 3'."""
    values: Mapping[str, object] = field(default_factory=dict, repr=False)
    """Raw values by column. Undecodable bytes are left in as lone surrogates."""
    problem: str | None = None
    """Why the row cannot be used, one of `judge.REMEDIES`; None if it may be."""


def open_records(path: Path) -> BinaryIO:
    """Open a regular, non-empty file for reading.

    Raises:
        DataError: It is missing, a folder, a device, unreadable or empty.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise DataError(f"{path}: is a folder; name one file in it")
        # Opening a pipe would wait for its writer, and a device may never end.
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path}: is not a regular file; copy the records into one")
        if status.st_size == 0:
            raise DataError(f"{path}: is empty; name a file with records")
        return open(path, "rb")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror}; check the path") from None


def csv_rows(path: Path, wanted: Collection[str]) -> Iterator[Row]:
    """Yield the rows of a CSV file (UTF-8, commas, one header line), blank lines left out.

    A quoted field may span lines; `place` names the row's first. Quoting is read strictly: a stray
    quote costs the lines up to where it shows as an error, and no record is made of the pieces.

    Raises:
        DataError: As `open_records`, or the header is unreadable or lacks a wanted column.
    """
    with open_records(path) as file:
        reader = csv.reader(_text_lines(file), strict=True)
        header = _csv_header(path, reader, wanted)
        while True:
            place = f"line {reader.line_num + 1}"
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                long = str(error).startswith("field larger")
                yield Row(place=place, problem="value too long" if long else "malformed CSV")
                continue
            if len(fields) < 2 and not "".join(fields).strip():
                continue
            if any(_TOO_LONG in cell for cell in fields):
                yield Row(place=place, problem="line too long")
            elif len(fields) != len(header):
                yield Row(place=place, problem="wrong number of fields")
            else:
                yield Row(place=place, values=dict(zip(header, fields, strict=True)))


def jsonl_rows(path: Path, wanted: Collection[str]) -> Iterator[Row]:
    """Yield the rows of a file with one JSON object a line, blank lines left out.

    Raises:
        DataError: As `open_records`, or, after the last row, no object has a wanted column.
    """
    first: dict[str, object] = {}
    seen: set[str] = set()
    with open_records(path) as file:
        for number, (line, too_long) in enumerate(_byte_lines(file), start=1):
            place = f"line {number}"
            if too_long:
                yield Row(place=place, problem="line too long")
                continue
            if not line.strip():
                continue
            value, problem = _parse_json(line)
            if not isinstance(value, dict):
                yield Row(place=place, problem=problem or "not a JSON object")
                continue
            first = first or value
            seen.update(name for name in wanted if name in value)
            yield Row(place=place, values=value)
    if first:
        require_columns(path, wanted, [*seen, *(name for name in first if name not in seen)])


def require_columns(
    path: Path, wanted: Collection[str], found: Sequence[str], *, has_schema: bool = False
) -> None:
    """Refuse a file that lacks a wanted column, or holds one twice.

    Args:
        path: The file, for the message.
        wanted: Columns that must be there.
        found: Columns that are there.
        has_schema: True where `found` is a schema. Otherwise it is listed only if a wanted column
            is in it: the first line of a file without a header is a record, which must not reach
            a message.

    Raises:
        DataError: A wanted column is missing, or is there twice.
    """
    for name in wanted:
        if found.count(name) > 1:
            raise DataError(f"{path}: column {name!r} is there twice; rename one of them")
    missing = [repr(name) for name in wanted if name not in found]
    if not missing:
        return
    if len(missing) == len(wanted) and not has_schema:
        raise DataError(
            f"{path}: none of the columns {', '.join(missing)} is there; the {len(found)} of the"
            " first row are not shown, as they may be a record; name columns that the file has,"
            " and give a CSV file a header line, with commas"
        )
    names = [repr(name[:NAME_CHARS_SHOWN_MAX]) for name in found][:NAMES_SHOWN_MAX]
    more = f" and {len(found) - len(names)} more" if len(found) > len(names) else ""
    raise DataError(
        f"{path}: column {', '.join(missing)} is missing; the file has {', '.join(names)}{more};"
        " name one of these"
    )


def _csv_header(path: Path, lines: Iterator[list[str]], wanted: Collection[str]) -> list[str]:
    """Return the names in the header, which is the first line that is not blank."""
    try:
        header = next((fields for fields in lines if "".join(fields).strip()), None)
    except csv.Error:
        raise DataError(f"{path}: the header is malformed CSV; {_HEADER_REMEDY}") from None
    if header is None:
        raise DataError(f"{path}: is empty; name a file with records")
    # The marker of an over-long line is a surrogate too.
    if not is_unicode("".join(header)):
        raise DataError(f"{path}: the header is too long or not UTF-8; {_HEADER_REMEDY}")
    names = [name.strip() for name in header]
    require_columns(path, wanted, names)
    return names


def is_unicode(text: str) -> bool:
    """Return whether `text` is free of lone surrogates, which stand for undecodable bytes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _parse_json(line: bytes) -> tuple[object, str | None]:
    """Return the line's value and None, or None and the reason why it has none."""
    try:
        return json.loads(line.decode("utf-8")), None
    except UnicodeDecodeError:
        return None, "not UTF-8"
    # Deep nesting exhausts the parser's stack; a very long number is a plain ValueError.
    except (ValueError, RecursionError):
        return None, "not JSON"


def _text_lines(file: BinaryIO) -> Iterator[str]:
    """Yield decoded lines for the csv module; an over-long one is replaced by a marker."""
    for line, too_long in _byte_lines(file):
        text = line.decode("utf-8", errors="surrogateescape")
        yield text + _TOO_LONG + "\n" if too_long else text


def _byte_lines(file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """Yield each line and whether it was too long.

    Of a line that was, only a quote is left, and that only if its quotes were odd in number: it
    opens or closes a quoted CSV field as the line itself would have, so that neighbours stay whole.
    """
    if file.read(len(BOM)) != BOM:
        file.seek(0)
    while line := file.readline(LINE_BYTES_MAX + 1):
        if len(line) <= LINE_BYTES_MAX:
            yield line, False
        else:
            quotes = line.count(b'"')
            while line and not line.endswith(b"\n"):
                line = file.readline(LINE_BYTES_MAX)
                quotes += line.count(b'"')
            yield b'"' * (quotes % 2), True
