"""JSONL, whole and broken."""

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intramural.core.errors import DataError
from intramural.data.readers import read_records
from intramural.data.records import Columns
from tests.data.builders import CANARY, TWO, read, texts, write

GOOD = b'{"text": "x", "label": "a"}\n'


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"text": "canary-8d1f", "label": "a"', "not JSON"),
        (b'{"text": "canary-8d1f\xff", "label": "a"}', "not UTF-8"),
        (b'{"text": "canary-8d1f\0", "label": "a"}', "not JSON"),
        (b'{"text": "canary-8d1f\\u0000", "label": "a"}', "column 'text': NUL character"),
        (b'{"text": "canary-8d1f\\ud800", "label": "a"}', "column 'text': not UTF-8"),
        (b'["canary-8d1f"]', "not a JSON object"),
        (b'"canary-8d1f"', "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": "canary-8d1f", "label": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"text": 5, "label": "a"}', "column 'text': not text"),
        (b'{"text": 5.5, "label": "a"}', "column 'text': not text"),
        (b'{"text": true, "label": "a"}', "column 'text': not text"),
        (b'{"text": ["canary-8d1f"], "label": "a"}', "column 'text': not text"),
        (b'{"text": NaN, "label": "a"}', "column 'text': missing or empty"),
        (b'{"label": "a"}', "column 'text': missing or empty"),
        (b'{"text": "canary-8d1f", "label": NaN}', "column 'label': missing or empty"),
        (b'{"text": "canary-8d1f", "label": null}', "column 'label': missing or empty"),
        (
            b'{"text": "canary-8d1f", "label": Infinity}',
            "column 'label': neither text nor a finite number",
        ),
        (
            b'{"text": "canary-8d1f", "label": {"canary-8d1f": 1}}',
            "column 'label': neither text nor a finite number",
        ),
    ],
)
def test_a_bad_json_line_costs_itself_alone(tmp_path: Path, bad: bytes, reason: str) -> None:
    path = write(tmp_path, GOOD + bad + b"\r\n\n" + GOOD, "notes.jsonl")
    result = read_records(path, TWO)
    assert texts(result) == ["x", "x"]
    assert result.skipped == {reason: 1}
    with pytest.raises(DataError, match=r"line 2[,:]") as caught:
        read_records(path, TWO, strict=True)
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "spelling"),
    [
        ("3", "3"),
        ("3.0", "3"),
        ("-0.5", "-0.5"),
        ("true", "true"),
        ("9" * 400, "9" * 400),
        ('"3.0"', "3.0"),
    ],
)
def test_numbers_and_truth_values_make_targets(tmp_path: Path, value: str, spelling: str) -> None:
    result = read(tmp_path, f'{{"text": "x", "label": {value}}}', "notes.jsonl")
    assert result.records[0].target == spelling


def test_a_byte_order_mark_and_a_cut_last_line_are_survived(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + GOOD + '{"text": "\u20ac'.encode()[:-1]
    result = read(tmp_path, content, "notes.jsonl")
    assert texts(result) == ["x"]
    assert result.skipped == {"not UTF-8": 1}


def test_a_column_that_no_object_has_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column 'label' is missing; the file has 'text', 'lable'"):
        read(tmp_path, b'{"text": "x", "lable": "a"}\n' * 2, "notes.jsonl")


def test_keys_are_not_shown_where_none_is_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the columns") as caught:
        read(tmp_path, json.dumps({CANARY: 1}), "notes.jsonl")
    assert CANARY not in str(caught.value)


def test_a_column_that_some_objects_lack_costs_those_rows(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + b'{"text": "y", "label": "b", "who": 4}\n', "notes.jsonl")
    result = read_records(path, Columns(text="text", target="label", person="who"))
    assert texts(result) == ["y"]
    assert result.skipped == {"column 'who': missing or empty": 1}


def test_blank_lines_alone_are_no_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no rows"):
        read(tmp_path, b"\n  \n", "notes.jsonl")


@given(st.binary(max_size=200), st.sampled_from(["notes.csv", "notes.jsonl", "notes.parquet"]))
def test_any_bytes_give_records_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str
) -> None:
    folder = tmp_path_factory.mktemp("bytes", numbered=True)
    with contextlib.suppress(DataError):
        assert read(folder, content, name).records


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
objects = st.dictionaries(st.sampled_from(["text", "label"]), scalars)


@given(st.lists(objects, max_size=5))
def test_every_json_object_is_read_or_counted(
    tmp_path_factory: pytest.TempPathFactory, table: list[dict[str, object]]
) -> None:
    table = [{"text": "x", "label": "a"}, *table]
    folder = tmp_path_factory.mktemp("jsonl", numbered=True)
    result = read(folder, "\n".join(map(json.dumps, table)), "notes.jsonl")
    assert len(result.records) + sum(result.skipped.values()) == len(table)
