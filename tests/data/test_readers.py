"""What holds for every format: which file, which rows, which words."""

import json
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from intramural.core.errors import DataError
from intramural.data import judge as judging
from intramural.data import rows
from intramural.data.readers import SUFFIXES, read_records
from intramural.data.records import Columns, Record
from tests.data.builders import CANARY, TWO, read, texts, write

FOUR = Columns(text="text", target="label", person="who", group="ward")


def save(folder: Path, suffix: str, table: list[dict[str, object]]) -> Path:
    """Write rows in the format of `suffix`; None becomes an empty cell, null or nothing."""
    path = folder / f"notes{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(table), path)
    elif suffix == ".csv":
        lines = [",".join("" if v is None else str(v) for v in row.values()) for row in table]
        path.write_text("\n".join([",".join(table[0]), *lines]), encoding="utf-8")
    else:
        path.write_text("\n".join(map(json.dumps, table)), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".CSV"])
def test_every_format_gives_the_same_records(tmp_path: Path, suffix: str) -> None:
    table: list[dict[str, object]] = [
        {"who": 7, "text": "  chest   pain ", "label": "heart", "ward": "A", "unread": 1},
        {"who": 8, "text": "cafe\u0301", "label": "other", "ward": "B", "unread": 2},
    ]
    path = save(tmp_path, suffix, table) if suffix != ".CSV" else save(tmp_path, ".csv", table)
    if suffix == ".CSV":
        path = path.rename(tmp_path / "NOTES.CSV")
    result = read_records(path, FOUR, strict=True)
    assert result.skipped == {}
    assert result.records == (
        Record(text="chest pain", target="heart", person="7", group="A"),
        Record(text="caf\u00e9", target="other", person="8", group="B"),
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_skips_and_counts_bad_rows(tmp_path: Path, suffix: str) -> None:
    table: list[dict[str, object]] = [
        {"text": "good", "label": "a"},
        {"text": None, "label": "a"},
        {"text": " \t ", "label": "a"},
        {"text": CANARY, "label": None},
        {"text": CANARY, "label": CANARY},
        {"text": CANARY + "\0", "label": "a"},
        {"text": CANARY * 15_000, "label": "a"},  # 11 characters each: 165,000 > 131,072
        {"text": "also good", "label": "b"},
    ]
    path = save(tmp_path, suffix, table)
    result = read_records(path, TWO, labels=["a", "b"])
    assert texts(result) == ["good", "also good"]
    long = "value too long" if suffix == ".csv" else "column 'text': value too long"
    assert result.skipped == {
        "column 'text': missing or empty": 2,
        "column 'label': missing or empty": 1,
        "column 'label': unknown label": 1,
        "column 'text': NUL character": 1,
        long: 1,
    }


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_strict_names_place_column_reason_and_remedy(tmp_path: Path, suffix: str) -> None:
    path = save(
        tmp_path, suffix, [{"text": "good", "label": "a"}, {"text": "good", "label": CANARY}]
    )
    place = {".csv": "line 3", ".parquet": "row 2"}.get(suffix, "line 2")
    with pytest.raises(DataError) as caught:
        read_records(path, TWO, labels=["a"], strict=True)
    assert str(caught.value) == (
        f"{path}: {place}, column 'label': unknown label;"
        " correct it, or add it to the task's labels"
    )


def test_strict_names_a_row_that_is_bad_as_a_whole(tmp_path: Path) -> None:
    path = write(tmp_path, f"text,label\n{CANARY},a,b\n")
    with pytest.raises(DataError) as caught:
        read_records(path, TWO, strict=True)
    assert str(caught.value) == (
        f"{path}: line 2: wrong number of fields; give it one field for each column of the header"
    )


def test_a_missing_person_or_group_makes_a_row_bad(tmp_path: Path) -> None:
    path = write(tmp_path, "who,text,label,ward\n,x,a,W\n1,x,a,\n1,x,a,W\n")
    result = read_records(path, FOUR)
    assert len(result.records) == 1
    assert result.skipped == {
        "column 'who': missing or empty": 1,
        "column 'ward': missing or empty": 1,
    }


def test_labels_are_compared_as_cleaned(tmp_path: Path) -> None:
    path = write(tmp_path, "text,label\nx, cafe\u0301 \n")
    assert read_records(path, TWO, labels=["caf\u00e9\t"]).records[0].target == "caf\u00e9"


def test_a_file_without_a_usable_row_is_refused_with_counts(tmp_path: Path) -> None:
    path = write(tmp_path, f"text,label\n,{CANARY}\n,{CANARY}\n{CANARY},\n")
    with pytest.raises(DataError) as caught:
        read_records(path, TWO)
    assert str(caught.value) == (
        f"{path}: none of 3 rows is usable (2 with column 'text': missing or empty;"
        " 1 with column 'label': missing or empty);"
        " correct the rows, or the columns named for them"
    )


@pytest.mark.parametrize("name", ["notes.txt", "notes", "notes.csv.gz", "notes.xlsx"])
def test_an_unknown_suffix_names_the_known_ones(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"use one of \.csv, \.jsonl, \.ndjson, \.parquet"):
        read(tmp_path, "text,label\nx,a\n", name)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_no_readable_file_is_refused(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"folder{suffix}").mkdir()
    (tmp_path / f"loop{suffix}").symlink_to(tmp_path / f"loop{suffix}")
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"empty{suffix}").touch()
    for name, message in {
        "folder": "is a folder; name one file in it",
        "absent": "no such file; check the path",
        "loop": "cannot be opened: ",
        "pipe": "is not a regular file",
        "empty": "is empty",
    }.items():
        path = tmp_path / f"{name}{suffix}"
        with pytest.raises(DataError, match=re.escape(f"{path}: {message}")):
            read_records(path, TWO)


def test_every_problem_a_reader_states_has_a_remedy() -> None:
    stated = re.findall(
        r'(?:problem=|problem or |None, |if long else )"([^"]+)"', Path(rows.__file__).read_text()
    )
    raised = re.findall(r'Unusable\("([^"]+)"', Path(judging.__file__).read_text())
    assert len(stated) >= 6
    assert len(raised) >= 6
    assert {*stated, *raised, "value too long"} == set(judging.REMEDIES)
