"""Parquet, whole and broken."""

import datetime
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from intramural.core.errors import DataError
from intramural.data.parquet import BATCH_ROWS
from intramural.data.readers import read_records
from intramural.data.records import Columns
from tests.data.builders import CANARY, TWO, texts


def save(folder: Path, **columns: object) -> Path:
    path = folder / "notes.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def test_parquet_rows_are_counted_across_batches(tmp_path: Path) -> None:
    n = 2 * BATCH_ROWS
    path = save(tmp_path, text=["x"] * n + [None], label=["a"] * (n + 1))
    assert len(read_records(path, TWO).records) == n
    with pytest.raises(DataError, match=rf"row {n + 1}, column 'text': missing or empty"):
        read_records(path, TWO, strict=True)


def test_parquet_numbers_keep_all_their_digits(tmp_path: Path) -> None:
    path = save(
        tmp_path,
        text=["x", "y"],
        label=pa.array([Decimal("1.50"), Decimal("3.00")], pa.decimal128(10, 2)),
        who=pa.array([Decimal(2**60 + 1), None], pa.decimal128(20, 0)),
        ward=[2**53 + 1, 2],
    )
    columns = Columns(text="text", target="label", person="who", group="ward")
    (record,) = read_records(path, columns).records
    assert (record.target, record.person, record.group) == (
        "1.5",
        str(2**60 + 1),
        str(2**53 + 1),
    )


@pytest.mark.parametrize(
    "bad",
    [
        pa.array([None, b"canary-8d1f"]),
        pa.array([None, datetime.date(2020, 1, 1)]),
        pa.array([None, {"canary-8d1f": 1}]),
        pa.array([None, ["canary-8d1f"]]),
    ],
)
def test_parquet_values_that_are_no_text_are_refused(tmp_path: Path, bad: pa.Array) -> None:
    path = save(tmp_path, text=bad, label=["a", "b"])
    with pytest.raises(DataError, match="1 with column 'text': not text") as caught:
        read_records(path, TWO)
    assert CANARY not in str(caught.value)


def test_a_parquet_text_that_is_not_utf8_costs_itself_alone(tmp_path: Path) -> None:
    data = b"xcanary-8d1f\xffy"
    offsets = b"".join(end.to_bytes(4, "little") for end in (0, 1, len(data) - 1, len(data)))
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    path = save(
        tmp_path, text=pa.StringArray.from_buffers(3, buffers[1], buffers[2]), label=["a"] * 3
    )
    result = read_records(path, TWO)
    assert texts(result) == ["x", "y"]
    assert result.skipped == {"column 'text': not UTF-8": 1}


@pytest.mark.parametrize("keep", [3, 40, -1, -9])
def test_a_cut_parquet_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = save(tmp_path, text=[CANARY], label=["a"])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="is no whole Parquet file; write or copy it again"):
        read_records(path, TWO)


def test_a_damaged_parquet_page_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, text=[CANARY * 1000], label=["a"])
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36  # the first page's header follows the 4 magic bytes
    path.write_bytes(content)
    with pytest.raises(DataError, match="is damaged after row 0") as caught:
        read_records(path, TWO)
    assert CANARY not in str(caught.value)


def test_parquet_lists_its_schema_where_a_column_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'text', 'label' is missing; the file has 'a', 'b'"):
        read_records(save(tmp_path, a=["x"], b=["y"]), TWO)


def test_a_parquet_file_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no rows"):
        read_records(
            save(tmp_path, text=pa.array([], pa.string()), label=pa.array([], pa.string())), TWO
        )


def test_a_parquet_column_may_have_a_dot_in_its_name(tmp_path: Path) -> None:
    path = save(tmp_path, **{"note.text": ["x"], "label": ["a"]})
    assert texts(read_records(path, Columns(text="note.text", target="label"))) == ["x"]
