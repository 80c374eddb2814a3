"""Commits: which rounds stand after a run fell back to an older checkpoint."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from intramural.core.journal import Entry, Journal
from intramural.server.commits import commits_of
from intramural.server.run import _make_up
from tests.server.fakes import small, start

Kinds = list[tuple[str, int]]


def entries_of(path: Path, kinds: Kinds) -> list[Entry]:
    """Write a run's journal and return its entries."""
    with closing(Journal(path / "journal.jsonl")) as journal:
        for kind, round_ in kinds:
            journal.append(kind, round=round_)
        return journal.entries


def c(*rounds: int) -> Kinds:
    return [("committed", round_) for round_ in rounds]


def back(round_: int) -> Kinds:
    return [("resumed", round_)]


GOOD: dict[str, tuple[Kinds, list[int], list[int]]] = {
    "nothing": ([("started", 0)], [], []),
    "plain": ([("started", 0), *c(1, 2)], [1, 2], []),
    "went on": ([*c(1, 2), *back(2), *c(3)], [1, 2, 3], []),
    "fell back": ([*c(1, 2), *back(1)], [1], [2]),
    "and went on": ([*c(1, 2), *back(1), *c(2, 3)], [1, 2, 3], [2]),
    "twice": ([*c(1, 2), *back(1), *c(2), *back(1), *c(2)], [1, 2], [2, 2]),
    "far": ([*c(1, 2, 3), *back(1), *c(2)], [1, 2], [2, 3]),
}


@pytest.mark.parametrize("case", GOOD)
def test_a_run_stands_at_what_it_went_on_from(tmp_path: Path, case: str) -> None:
    kinds, standing, repeated = GOOD[case]
    found = commits_of(entries_of(tmp_path, kinds))
    assert [entry.body["round"] for entry in found.standing] == standing
    assert list(found.repeated) == repeated
    assert found.problem is None


BAD: dict[str, Kinds] = {
    "entry 1 commits round 1 after 1": c(1, 1),
    "entry 1 commits round 3 after 1": c(1, 3),
    "entry 0 commits round 2 after 0": c(2),
    "entry 3 commits round 2 after 2": [*c(1, 2), *back(2), *c(2)],
    "entry 4 commits round 2 after 2": [*c(1, 2), *back(1), *c(2, 2)],
    "entry 3 commits round 3 after 1": [*c(1, 2), *back(1), *c(3)],
    "entry 2 commits round 2 after 2": [*c(1, 2, 2), *back(1), *c(2)],  # what came later heals not
    "entry 1 goes on from round 2, and 1 is the last": [*c(1), *back(2), *c(3)],
    "entry 3 commits round 1 after 2": [*c(1, 2), ("started", 0), *c(1)],  # a run begins once
}


@pytest.mark.parametrize("problem", BAD)
def test_a_round_is_committed_twice_only_where_the_run_fell_back_between(
    tmp_path: Path, problem: str
) -> None:
    assert commits_of(entries_of(tmp_path, BAD[problem])).problem == problem


def test_a_commit_that_a_crash_kept_from_the_journal_is_made_up_also_after_a_fall_back(
    tmp_path: Path,
) -> None:
    entries_of(tmp_path, [*c(1, 2), *back(1)])
    found = replace(start(small()), round=2, history=[{"round": 1}, {"round": 2}])
    with closing(Journal(tmp_path / "journal.jsonl")) as journal:
        for _ in range(2):  # the second time there is nothing to make up
            _make_up(journal, found)
            assert [(e.kind, e.body["round"]) for e in journal.entries[3:]] == c(2)
