"""A population gives each site its own rows, without keeping anything for those never asked."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from intramural.core.errors import DataError
from intramural.data import population
from intramural.data.population import Draw, Pair, Population, write_population
from intramural.data.records import Record
from intramural.data.split import split_records

RECORDS = tuple(
    Record(text=f"text {i}", target="ab"[i % 2], group=f"g{i // 2}" if i % 3 else None)
    for i in range(50)
)


@pytest.fixture
def dealt(tmp_path: Path) -> Population:
    parts = [np.array([4, 0, 9]), np.array([7]), np.arange(10, 50)]
    return write_population(tmp_path, RECORDS, parts, sites=3)


def letters(records: Sequence[Record]) -> Iterator[Pair]:
    """Stand in for a tokenizer: a record's ids are its characters."""
    for record in records:
        ids = np.array([ord(c) for c in record.text], dtype=np.int32)
        yield ids, np.array(["ab".index(record.target)], dtype=np.int32)


def test_a_site_holds_the_records_dealt_to_it_in_their_order(dealt: Population) -> None:
    assert dealt.records_of(0) == (RECORDS[0], RECORDS[4], RECORDS[9])
    assert dealt.records_of(1) == (RECORDS[7],)
    assert dealt.records_of(2) == RECORDS[10:]
    assert [r.row for r in dealt.records_of(0)] == [0, 4, 9]
    assert dealt.sites == 3
    assert len(dealt) == 50


def test_it_is_read_back_from_its_folder(dealt: Population) -> None:
    assert Population(dealt.folder).records_of(0) == dealt.records_of(0)


def test_drawn_sites_hold_so_many_different_records_each_and_always_the_same(
    tmp_path: Path,
) -> None:
    drawn = write_population(tmp_path, RECORDS, Draw(records=7, seed=3), sites=1_000_000)
    for site in (0, 1, 999_999):
        rows = drawn.rows_of(site)
        assert len(set(rows.tolist())) == 7
        assert rows.tolist() == sorted(rows.tolist()) == Population(tmp_path).rows_of(site).tolist()
    assert drawn.rows_of(0).tolist() != drawn.rows_of(1).tolist()
    counts = np.bincount(np.concatenate([drawn.rows_of(s) for s in range(1000)]), minlength=50)
    # Each record is at a site with probability 7/50: 140 of 1,000, give or take 11 (binomial).
    assert abs(counts - 140).max() < 5 * 11
    assert not list(tmp_path.glob("*.npy"))


def test_a_site_cannot_draw_more_records_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot draw 51 of 50"):
        write_population(tmp_path, RECORDS, Draw(records=51, seed=0), sites=2)


def test_tokens_are_made_once_and_found_by_row(
    dealt: Population, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(population, "BATCH_ROWS", 7)  # rows lie in several batches
    asked: list[int] = []

    def make(records: Sequence[Record]) -> Iterator[Pair]:
        asked.append(len(records))
        return letters(records)

    inputs, targets = dealt.tokens("k", make).of([49, 0, 13])
    assert ["".join(map(chr, ids)) for ids in inputs] == ["text 49", "text 0", "text 13"]
    assert [int(t[0]) for t in targets] == [1, 0, 1]
    assert sum(asked) == 50
    Population(dealt.folder).tokens("k", make)
    assert sum(asked) == 50
    dealt.tokens("other", make)
    assert sum(asked) == 100


@pytest.mark.parametrize("most", [10**6, 8])
@pytest.mark.parametrize("piece_bytes", [1, 10**6])
def test_tokens_of_alike_records_are_one_matrix_where_they_are_few_and_lie_together(
    dealt: Population, monkeypatch: pytest.MonkeyPatch, piece_bytes: int, most: int
) -> None:
    monkeypatch.setattr(population, "BATCH_ROWS", 7)
    monkeypatch.setattr(population, "CHUNK_BYTES", piece_bytes)
    monkeypatch.setattr(population, "TAKEN_MAX", most)

    def make(records: Sequence[Record]) -> Iterator[Pair]:
        for record in records:
            number = int(record.text.split()[1])
            yield np.full(3, number, dtype=np.int32), np.array([-number], dtype=np.int32)

    inputs, targets = dealt.tokens("k", make).of([49, 0, 13])
    assert [ids.tolist() for ids in inputs] == [[49] * 3, [0] * 3, [13] * 3]
    assert [t.tolist() for t in targets] == [[-49], [0], [-13]]
    together = piece_bytes > 1
    assert isinstance(inputs, np.ndarray) == (together and most > 9)
    assert isinstance(targets, np.ndarray) == together  # of three numbers, under both bounds


@pytest.mark.parametrize("column", ["group", "person", None])
def test_sides_are_those_of_the_records_split_one_by_one(
    tmp_path: Path, column: str | None
) -> None:
    records = [
        Record(
            text=f"text {i // 2}",
            target="a",
            group=f"g{i % 60}" if column == "group" else None,
            person=f"p{i % 60}" if column == "person" else None,
        )
        for i in range(200)
    ]
    made = write_population(tmp_path, records, Draw(records=40, seed=1), sites=9)
    for site in range(9):
        split = split_records(made.records_of(site), salt="tiny")
        for side in ("train", "validation", "test"):
            rows = made.rows_on(site, side, salt="tiny").tolist()
            assert rows == [record.row for record in getattr(split, side)]
    other = [made.rows_on(site, "train", salt="other").tolist() for site in range(9)]
    assert other != [made.rows_on(site, "train", salt="tiny").tolist() for site in range(9)]


def test_records_in_chains_have_no_sides_of_their_own(tmp_path: Path) -> None:
    chained = [Record(text="t", target="a", group="g", person=f"p{i}") for i in range(5)]
    made = write_population(tmp_path, chained, Draw(records=2, seed=1), sites=2)
    assert made.has_chains
    with pytest.raises(DataError, match="read the records"):
        made.rows_on(0, "train", salt="tiny")


def test_a_folder_without_a_whole_population_is_named(dealt: Population) -> None:
    (dealt.folder / "records.arrow").write_bytes(b"cut")
    with pytest.raises(DataError, match="holds no whole population"):
        Population(dealt.folder)
    with pytest.raises(DataError, match="holds no whole population"):
        Population(dealt.folder / "nowhere")
