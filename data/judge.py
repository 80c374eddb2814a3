"""Judging rows: which become records, and for what reason the others do not."""

import math
from collections.abc import Set as AbstractSet
from decimal import Decimal

from intramural.data.records import Columns, Record
from intramural.data.rows import LINE_BYTES_MAX, Row, is_unicode
from intramural.data.text import normalise

VALUE_CHARS_MAX = 131_072
"""Longest value, in characters: the csv module's own limit, so that every format agrees."""

REMEDIES = {
    "line too long": f"shorten it to {LINE_BYTES_MAX} bytes",
    "value too long": f"shorten it to {VALUE_CHARS_MAX} characters",
    "malformed CSV": "close or double its quotes, and end lines with LF or CRLF",
    "wrong number of fields": "give it one field for each column of the header",
    "not JSON": "put one JSON object on the line",
    "not a JSON object": "put one JSON object on the line",
    "not UTF-8": "save the file as UTF-8",
    "NUL character": "remove it",
    "missing or empty": "fill it in",
    "not text": "write it as text",
    "neither text nor a finite number": "write it as text or a number",
    "unknown label": "correct it, or add it to the task's labels",
}
"""What to do about each reason for which a row is not used."""


class Unusable(Exception):
    """A row cannot be used; holds a reason and a column, and nothing of the row."""

    def __init__(self, reason: str, column: str | None = None) -> None:
        """State one of `REMEDIES`, and the column if only one is at fault."""
        super().__init__(reason if column is None else f"column {column!r}: {reason}")
        self.column = column
        self.remedy = REMEDIES[reason]


def judge(row: Row, columns: Columns, labels: AbstractSet[str] | None) -> Record:
    """Return the record that a row holds, its values cleaned.

    A text must be text; targets, persons and groups may also be numbers or truth values. A value
    that cleans to nothing counts as missing, and so does NaN.

    Raises:
        Unusable: The row, or a value in a column we read, is of no use.
    """
    if row.problem is not None:
        raise Unusable(row.problem)
    record = Record(
        text=_clean(row, columns.text, numbers=False),
        target=_clean(row, columns.target),
        person=None if columns.person is None else _clean(row, columns.person),
        group=None if columns.group is None else _clean(row, columns.group),
    )
    if labels is not None and record.target not in labels:
        raise Unusable("unknown label", columns.target)
    return record


def _clean(row: Row, column: str, *, numbers: bool = True) -> str:
    """Return one value as cleaned text; a number is refused unless `numbers`."""
    value = row.values.get(column)
    if value is None or (isinstance(value, float | Decimal) and math.isnan(value)):
        raise Unusable("missing or empty", column)
    if not isinstance(value, str):
        if not numbers:
            raise Unusable("not text", column)
        value = _spell(value, column)
    if len(value) > VALUE_CHARS_MAX:
        raise Unusable("value too long", column)
    if not is_unicode(value):
        raise Unusable("not UTF-8", column)
    if "\0" in value:
        raise Unusable("NUL character", column)
    if not (text := normalise(value)):
        raise Unusable("missing or empty", column)
    return text


def _spell(value: object, column: str) -> str:
    """Return a number or truth value as text.

    Equal numbers are spelt alike whatever held them: 3, 3.0 and Decimal('3.00') all give '3'.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    # An integer is never taken through a float: identifiers may have more than 15 digits.
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, float | Decimal) or math.isinf(value):
        raise Unusable("neither text nor a finite number", column)
    return str(int(value)) if value == int(value) else str(float(value))
