"""CSV, whole and broken."""

import csv
import io
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intramural.core.errors import DataError
from intramural.data.judge import VALUE_CHARS_MAX
from intramural.data.readers import read_records
from intramural.data.rows import LINE_BYTES_MAX
from intramural.data.text import normalise
from tests.data.builders import CANARY, TWO, read, texts, write


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbftext,label\nx,a\ny,b\n",
        b"text,label\r\nx,a\r\ny,b\r\n",
        b"text,label\nx,a\ny,b",
        b"\n  \ntext,label\n\nx,a\n   \ny,b\n\n",
        b'"text","label"\n"x","a"\n"y","b"\n',
        b"label, text ,other\na,x,\nb,y,\xff\xff\n",
    ],
    ids=["bom", "crlf", "no-last-line-end", "blank-lines", "quoted", "unread-column"],
)
def test_csv_reads_the_same_records_from_every_dialect(tmp_path: Path, content: bytes) -> None:
    result = read(tmp_path, content)
    assert texts(result) == ["x", "y"]
    assert result.skipped == {}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"canary-8d1f \xff,a", "column 'text': not UTF-8"),
        (b"canary-8d1f \xe2\x82,a", "column 'text': not UTF-8"),
        (b"canary-8d1f\0,a", "column 'text': NUL character"),
        (b"canary-8d1f", "wrong number of fields"),
        (b"canary-8d1f,a,b", "wrong number of fields"),
        (b'"canary-8d1f" canary-8d1f,a', "malformed CSV"),
        (b"canary-8d1f\rcanary-8d1f,a", "malformed CSV"),
        (b",", "column 'text': missing or empty"),
    ],
)
def test_a_bad_csv_row_costs_itself_alone(tmp_path: Path, bad: bytes, reason: str) -> None:
    path = write(tmp_path, b"text,label\nx,a\n" + bad + b"\ny,b\n")
    result = read_records(path, TWO)
    assert texts(result) == ["x", "y"]
    assert result.skipped == {reason: 1}
    with pytest.raises(DataError, match=r"line 3[,:]") as caught:
        read_records(path, TWO, strict=True)
    assert CANARY not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_line_numbers_count_the_lines_inside_quoted_fields(tmp_path: Path) -> None:
    # Lines 2 to 4 hold one record, line 5 is blank, 6 and 7 hold one, line 8 is bad.
    path = write(tmp_path, 'text,label\n"one\ntwo\nthree",a\n\n"four\nfive",b\nsix,\n')
    assert texts(read_records(path, TWO)) == ["one two three", "four five"]
    with pytest.raises(DataError, match="line 8, column 'label': missing or empty"):
        read_records(path, TWO, strict=True)


def test_a_bad_record_is_placed_at_its_first_line(tmp_path: Path) -> None:
    path = write(tmp_path, 'text,label\nx,a\n"one\ntwo",\n')
    with pytest.raises(DataError, match="line 3, column 'label'"):
        read_records(path, TWO, strict=True)


def test_a_file_cut_inside_quotes_loses_the_cut_record_only(tmp_path: Path) -> None:
    path = write(tmp_path, f'text,label\nx,a\n"{CANARY} \u20ac'.encode()[:-1])
    result = read_records(path, TWO)
    assert texts(result) == ["x"]
    assert result.skipped == {"malformed CSV": 1}


def test_a_quote_that_never_closes_does_not_swallow_the_file(tmp_path: Path) -> None:
    # The open field takes lines up to the csv limit, then rows are read again.
    row = "x" * 1000 + ",a\n"
    content = 'text,label\n"open,a\n' + row * 400
    result = read(tmp_path, content)
    lost = VALUE_CHARS_MAX // len(row) + 1  # the rows that fit into one field, and the breaking one
    assert result.skipped == {"value too long": 1}
    assert abs(len(result.records) - (400 - lost)) <= 1


def test_the_longest_value_is_what_the_csv_module_takes() -> None:
    assert csv.field_size_limit() == VALUE_CHARS_MAX


def test_a_value_at_the_limit_is_read(tmp_path: Path) -> None:
    assert len(texts(read(tmp_path, f"text,label\n{'x' * VALUE_CHARS_MAX},a\n"))[0]) == (
        VALUE_CHARS_MAX
    )
    with pytest.raises(DataError, match="1 with value too long"):
        read(tmp_path, f"text,label\n{'x' * (VALUE_CHARS_MAX + 1)},a\n")


def test_a_line_at_the_limit_is_read_and_a_longer_one_is_not(tmp_path: Path) -> None:
    fill = LINE_BYTES_MAX - len("x,a,\n")
    cells = ",".join(["y" * (fill // 16)] * 16)[: fill - 32]
    line = f"x,a,{cells}".ljust(LINE_BYTES_MAX - 1, "y") + "\n"
    assert len(line) == LINE_BYTES_MAX
    header = "text,label," + ",".join(f"c{i}" for i in range(line.count(",") - 1)) + "\n"
    assert texts(read(tmp_path, header + line)) == ["x"]
    with pytest.raises(DataError, match="1 with line too long"):
        read(tmp_path, header + "y" + line)


def test_a_byte_order_mark_does_not_hide_an_over_long_line(tmp_path: Path) -> None:
    # With its line end the line passes the limit by one byte; the mark must not count for it.
    bad = b'{"text": "canary-8d1f", "label": "a"}'.ljust(LINE_BYTES_MAX) + b"\n"
    content = b"\xef\xbb\xbf" + bad + b'{"text": "x", "label": "a"}\n'
    result = read(tmp_path, content, "notes.jsonl")
    assert texts(result) == ["x"]
    assert result.skipped == {"line too long": 1}


@pytest.mark.parametrize(
    ("start", "end", "reason"),
    [
        (b"", b",a", "line too long"),
        (b'"', b'",a', "line too long"),  # two quotes: the next line starts a row
        (b'"', b'\nmore",a', "line too long"),  # opens a field that the next line closes
        (b'"first\n', b'",a', "malformed CSV"),  # closes a field that the line before opened
    ],
)
def test_an_over_long_line_leaves_its_neighbours_whole(
    tmp_path: Path, start: bytes, end: bytes, reason: str
) -> None:
    long = start + b"z" * (2 * LINE_BYTES_MAX) + end
    result = read(tmp_path, b"text,label\nx,a\n" + long + b"\ny,b\n")
    assert texts(result) == ["x", "y"]
    assert result.skipped == {reason: 1}


@pytest.mark.parametrize("name", ["notes.csv", "notes.jsonl"])
def test_a_line_of_100_mb_is_passed_over_in_little_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    good = b'{"text": "x", "label": "a"}\n' if name.endswith("jsonl") else b"text,label\nx,a\n"
    with open(path, "wb") as file:
        file.write(good)
        file.write(CANARY.encode())
        file.truncate(100_000_000)  # a hole: the bytes read as NUL
    start = time.process_time()
    result = read_records(path, TWO)
    seconds = time.process_time() - start
    assert texts(result) == ["x"]
    assert result.skipped == {"line too long": 1}
    assert seconds < 0.5
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as caught:
            read_records(path, TWO, strict=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert CANARY not in str(caught.value)
    assert peak < 8 * LINE_BYTES_MAX


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xef\xbb\xbf", "is empty"),
        (b"\n \n", "is empty"),
        (b"text,label\n", "has no rows"),
        (b"text,label\n\n\n", "has no rows"),
        (b"text,label,text\nx,a,y\n", "column 'text' is there twice; rename one"),
        (b'"text,label\nx,a\n', "the header is malformed CSV"),
        (b"text,label\rx,a\r", "the header is malformed CSV"),
        (b"t\xff,label\nx,a\n", "the header is too long or not UTF-8"),
        ("text,label\nx,a\n".encode("utf-16"), "the header is too long or not UTF-8"),
        (b"text,label" + b" " * LINE_BYTES_MAX, "the header is too long or not UTF-8"),
    ],
)
def test_a_csv_file_without_a_header_and_rows_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, content)


def test_a_missing_column_lists_the_columns_there_are(tmp_path: Path) -> None:
    names = ["text", "long " * 20, *(f"c{i}" for i in range(30))]
    with pytest.raises(DataError) as caught:
        read(tmp_path, ",".join(names) + "\n" + ",".join(names) + "\n")
    message = str(caught.value)
    assert "column 'label' is missing; the file has 'text', '" in message
    assert "'c17' and 12 more" in message  # 32 names, 20 shown: the last of them is c17
    assert "long " * 9 not in message  # cut at 40 characters


def test_the_first_line_of_a_file_without_header_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the columns 'text', 'label' is there") as caught:
        read(tmp_path, f"{CANARY},a,b\n{CANARY},a,b\n")
    assert CANARY not in str(caught.value)
    assert "the 3 of the first row are not shown" in str(caught.value)


@given(
    st.lists(
        st.tuples(
            st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
            st.text(alphabet='ab",\n ', min_size=1),
        ),
        max_size=8,
    )
)
def test_what_the_csv_module_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerows([("text", "label"), *pairs, ("last", "a")])
    folder = tmp_path_factory.mktemp("csv", numbered=True)
    result = read(folder, buffer.getvalue().encode())
    cleaned = [(normalise(text), normalise(label)) for text, label in [*pairs, ("last", "a")]]
    expected = [(text, label) for text, label in cleaned if text and label]
    assert [(r.text, r.target) for r in result.records] == expected
    assert sum(result.skipped.values()) == len(cleaned) - len(expected)
