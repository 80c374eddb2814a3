"""Splits: grouped, agreed on without talking."""

import hashlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intramural.core.errors import DataError
from intramural.data.records import Record
from intramural.data.split import Splits, grouping_keys, side_of, split_records


def record(group: str | None = None, person: str | None = None, text: str = "x") -> Record:
    return Record(text=text, target="a", group=group, person=person)


def sides(splits: Splits) -> list[Sequence[Record]]:
    return [splits.train, splits.validation, splits.test]


MANY = [record(group=str(index % 500), text=str(index)) for index in range(2000)]
owners = st.sampled_from([None, "1", "2", "3", "4"])
tables = st.lists(st.builds(record, group=owners, person=owners, text=st.sampled_from("xyz")))


@given(st.text(), st.text())
def test_side_is_the_hash_as_a_fraction(key: str, salt: str) -> None:
    # The same by other means: the first 8 of 32 bytes, as a float.
    content = (salt + "|" + key).encode()
    fraction = int(hashlib.sha256(content).hexdigest()[:16], 16) / 2.0**64
    expected = ["train", "validation", "test"][(fraction >= 0.6) + (fraction >= 0.8)]
    assert side_of(key, salt) == expected


def test_sides_have_their_shares_of_many_groups() -> None:
    keys = [side_of(str(index), "salt") for index in range(10_000)]
    # Standard deviation of a share p is sqrt(p (1 - p) / 10,000): below 0.005; four of them.
    assert abs(keys.count("train") / 10_000 - 0.6) < 0.02
    assert abs(keys.count("validation") / 10_000 - 0.2) < 0.02


def test_split_keeps_every_record_once_and_in_order() -> None:
    splits = split_records(MANY, salt="s")
    assert sorted(int(r.text) for side in sides(splits) for r in side) == list(range(2000))
    for side in sides(splits):
        assert [int(r.text) for r in side] == sorted(int(r.text) for r in side)


def test_no_group_is_on_two_sides() -> None:
    train, validation, test = (
        {r.group for r in side} for side in sides(split_records(MANY, salt="s"))
    )
    assert min(map(len, (train, validation, test))) > 0
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_sites_that_never_met_agree_on_every_group() -> None:
    one = split_records(MANY[:1200], salt="s")
    other = split_records(MANY[800:], salt="s")
    assert not {r.group for r in one.train} & {r.group for r in other.test}
    assert {r.group for r in one.test} & {r.group for r in other.test}


def test_another_salt_gives_another_split() -> None:
    assert split_records(MANY, salt="s").test != split_records(MANY, salt="t").test


def test_equal_texts_stay_together_where_nothing_else_groups() -> None:
    keys = grouping_keys([record(text="a b"), record(text="a\n b "), record(text="c")])
    assert keys == ["text:a b", "text:a b", "text:c"]


def test_equal_texts_of_two_people_may_part() -> None:
    assert grouping_keys([record(person="1"), record(person="2")]) == ["person:1", "person:2"]


def test_a_chain_of_groups_and_people_is_one_group_named_by_its_smallest() -> None:
    table = [
        record(group="b", person="1"),
        record(group="c", person="1"),
        record(group="c", person="2"),
        record(group="a", person="2"),
        record(group="1", person="3"),
        record(person="2"),
    ]
    # b - 1 - c - 2 - a is one chain; group 1 is not person 1.
    assert grouping_keys(table) == ["group:a"] * 4 + ["group:1", "group:a"]


def components(table: list[Record]) -> list[set[int]]:
    """Second implementation: each row merges the sets of rows that it shares something with."""

    def linked(one: Record, two: Record) -> bool:
        if one.group is None and one.person is None:
            return two.group is None and two.person is None and one.text == two.text
        same_group = one.group is not None and one.group == two.group
        return same_group or (one.person is not None and one.person == two.person)

    sets: list[set[int]] = []
    for index, row in enumerate(table):
        touched = [s for s in sets if any(linked(row, table[other]) for other in s)]
        sets = [s for s in sets if s not in touched] + [{index}.union(*touched)]
    return sets


@given(tables)
def test_keys_are_equal_exactly_where_a_chain_connects(table: list[Record]) -> None:
    keys = grouping_keys(table)
    by_key = [{i for i, k in enumerate(keys) if k == key} for key in set(keys)]
    assert sorted(map(sorted, by_key)) == sorted(map(sorted, components(table)))


@given(tables, st.randoms(use_true_random=False))
def test_keys_do_not_depend_on_the_order_of_records(table: list[Record], random: object) -> None:
    order = list(range(len(table)))
    random.shuffle(order)  # type: ignore[attr-defined]
    keys = grouping_keys(table)
    assert grouping_keys([table[i] for i in order]) == [keys[i] for i in order]


def test_a_long_chain_is_followed_without_recursion() -> None:
    table = [record(group=str(i // 2), person=str((i + 1) // 2)) for i in range(20_000)]
    assert set(grouping_keys(table)) == {"group:0"}


def test_a_split_without_test_records_is_refused_with_counts() -> None:
    with pytest.raises(DataError) as caught:
        split_records([record(group="canary-8d1f")] * 5, salt="s")
    assert "records 5, groups 1; add records, or name a finer group column" in str(caught.value)
    assert "canary-8d1f" not in str(caught.value)


@pytest.mark.parametrize("missing", ["train", "test"])
def test_train_and_test_must_not_be_empty(missing: str) -> None:
    table = [r for r in MANY if side_of(f"group:{r.group}", "s") != missing]
    with pytest.raises(DataError, match=f"no record for {missing}: "):
        split_records(table, salt="s")


def test_validation_may_be_empty() -> None:
    table = [r for r in MANY if side_of(f"group:{r.group}", "s") != "validation"]
    assert split_records(table, salt="s").validation == ()
