"""The data that comes with the repository is whole, and reads without a bad row."""

import csv
from collections import Counter
from pathlib import Path

import pytest

from intramural.data.readers import read_records
from intramural.data.records import Columns
from intramural.data.split import grouping_keys, split_records

ROOT = Path(__file__).resolve().parents[2]
ICD10 = Columns(text="title", target="chapter", group="category")
NAICS = Columns(text="description", target="sector", group="group")
GENERATION = Columns(text="title", target="description", group="group")


@pytest.mark.parametrize(
    ("file", "columns", "rows", "targets", "groups"),
    [
        ("examples/icd10/titles.csv", ICD10, 11_982, 21, 1_915),
        ("examples/naics/descriptions.csv", NAICS, 1_491, 20, 410),
        ("examples/naics/descriptions.csv", GENERATION, 1_491, 1_491, 410),
        ("tests/fixtures/icd10_200.csv", ICD10, 200, 4, 40),
    ],
)
def test_example_data_has_the_rows_that_its_sources_file_states(
    file: str, columns: Columns, rows: int, targets: int, groups: int
) -> None:
    records = read_records(ROOT / file, columns, strict=True).records
    assert len(records) == rows
    assert len({record.target for record in records}) == targets
    assert len(set(grouping_keys(records))) == groups


def test_the_fixture_is_a_balanced_slice_of_the_example() -> None:
    records = read_records(ROOT / "tests/fixtures/icd10_200.csv", ICD10, strict=True).records
    assert set(Counter(record.target for record in records).values()) == {50}
    assert set(Counter(record.group for record in records).values()) == {5}
    assert set(records) <= set(read_records(ROOT / "examples/icd10/titles.csv", ICD10).records)


@pytest.mark.parametrize("salt", range(10))
def test_the_fixture_fills_three_sides_with_most_labels(salt: int) -> None:
    records = read_records(ROOT / "tests/fixtures/icd10_200.csv", ICD10, strict=True).records
    splits = split_records(records, salt=str(salt))
    for side in (splits.train, splits.validation, splits.test):
        assert len({record.target for record in side}) >= 2


@pytest.mark.parametrize("file", ["icd10/titles.csv", "naics/descriptions.csv"])
def test_example_data_is_sorted_by_code(file: str) -> None:
    with open(ROOT / "examples" / file, encoding="utf-8", newline="") as lines:
        codes = [row["code"] for row in csv.DictReader(lines)]
    assert codes == sorted(set(codes))
