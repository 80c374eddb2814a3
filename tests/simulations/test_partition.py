"""Partitions: every record dealt once, groups whole, no site empty."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intramural.core.errors import ConfigError, DataError
from intramural.data.records import Record
from intramural.simulations.partition import Partition, parse_spec, partition


def record(group: int | str, target: str = "a") -> Record:
    return Record(text="x", target=target, group=str(group), person=None)


def deal(records: list[Record], spec: str, *, sites: int, seed: int = 0) -> Partition:
    return partition(records, spec, sites=sites, rng=np.random.default_rng(seed))


def sizes(result: Partition) -> list[int]:
    return [len(site) for site in result]


drawn = st.sampled_from(
    ["iid", "dirichlet:0.01", "dirichlet:1e-9", "dirichlet:100", "size:0", "size:1.5", "size:5000"]
)
tables = st.lists(
    st.builds(record, st.integers(0, 12), st.sampled_from("abc")), min_size=1, max_size=60
)
UNIFORM = [record(index, "abcd"[index % 4]) for index in range(1000)]


@given(tables, drawn, st.integers(1, 6), st.integers(0, 5))
def test_every_record_is_dealt_once_and_groups_stay_whole(
    table: list[Record], spec: str, sites: int, seed: int
) -> None:
    groups = {r.group for r in table}
    if len(groups) < sites:
        with pytest.raises(DataError, match=f"{len(groups)} groups of records cannot fill {sites}"):
            deal(table, spec, sites=sites, seed=seed)
        return
    result = deal(table, spec, sites=sites, seed=seed)
    assert len(result) == sites
    assert result.rows_left_out == 0
    assert min(sizes(result)) >= 1
    assert sorted(np.concatenate(result.sites).tolist()) == list(range(len(table)))
    assert all(np.all(np.diff(site) > 0) for site in result)
    held = [{table[index].group for index in site} for site in result]
    assert sum(map(len, held)) == len(groups)


@given(drawn, st.integers(0, 5), st.integers(0, 5))
def test_where_a_group_goes_does_not_depend_on_the_order_of_records(
    spec: str, seed: int, shuffle: int
) -> None:
    table = [record(index // 2, "ab"[index % 3 == 0]) for index in range(40)]
    order = np.random.default_rng(shuffle).permutation(len(table))
    one = deal(table, spec, sites=3, seed=seed)
    two = deal([table[i] for i in order], spec, sites=3, seed=seed)
    for site, other in zip(one, two, strict=True):
        assert site.tolist() == sorted(order[other].tolist())


@pytest.mark.parametrize("spec", ["iid", "dirichlet:0.5", "size:1"])
def test_the_generator_decides_and_nothing_else(spec: str) -> None:
    one, same = deal(UNIFORM, spec, sites=4), deal(UNIFORM, spec, sites=4)
    other = deal(UNIFORM, spec, sites=4, seed=1)
    assert [s.tolist() for s in one] == [s.tolist() for s in same]
    assert [s.tolist() for s in one] != [s.tolist() for s in other]


def test_iid_gives_equal_sizes_and_mixed_targets() -> None:
    result = deal(UNIFORM, "iid", sites=4)
    assert sizes(result) == [250, 250, 250, 250]
    for site in result:
        counts = Counter(UNIFORM[index].target for index in site)
        # 62.5 of each target expected, with a standard deviation of about 6; five of them.
        assert all(32 < count < 93 for count in counts.values())
        assert len(counts) == 4


def test_size_follows_the_power_law() -> None:
    # Shares 1, 1/2, 1/3, 1/4 of 25/12 together: 480, 240, 160, 120 of 1,000 rows.
    assert sizes(deal(UNIFORM, "size:1", sites=4)) == [480, 240, 160, 120]


def test_large_groups_are_weighed_by_their_rows() -> None:
    table = [record("large")] * 50 + [record(index) for index in range(50)]
    result = deal(table, "iid", sites=2)
    # Middles decide: the large group may straddle the cut by at most half its rows.
    assert 25 <= min(sizes(result)) <= 50


def test_a_small_alpha_gives_each_target_to_few_sites() -> None:
    narrow, wide = (deal(UNIFORM, spec, sites=5) for spec in ("dirichlet:0.05", "dirichlet:1000"))

    def largest_share(result: Partition, target: str) -> float:
        held = [sum(UNIFORM[i].target == target for i in site) for site in result]
        return float(max(held) / sum(held))

    assert min(largest_share(narrow, target) for target in "abcd") > 0.5
    # Dirichlet(1000, ...) over 5 sites: 0.2 with a standard deviation of 0.4 / sqrt(5001) = 0.006.
    assert max(largest_share(wide, target) for target in "abcd") < 0.25


def test_a_group_of_several_targets_counts_for_its_most_frequent() -> None:
    # Rows 0 to 14 are groups that are mostly 'b', rows 15 to 29 groups that are mostly 'a'.
    table = [record(group, target) for group in range(5) for target in "abb"]
    table += [record(group, target) for group in range(5, 10) for target in "aab"]
    low, high = list(range(15)), list(range(15, 30))
    seen = [
        [site.tolist() for site in deal(table, "dirichlet:1e-6", sites=2, seed=seed)]
        for seed in range(20)
    ]
    # Each target goes to one of two sites, whole: 'b' to the first and 'a' to the second a quarter
    # of the time, and the reverse as often.
    assert [low, high] in seen
    assert [high, low] in seen


def test_an_empty_site_gets_the_smallest_group_of_the_largest_site() -> None:
    table = [record("a")] * 3 + [record("b")] * 2 + [record("c")]
    result = deal(table, "size:5000", sites=2)  # site 0 has all the share
    assert [site.tolist() for site in result] == [[0, 1, 2, 3, 4], [5]]


def test_column_gives_one_site_to_each_of_the_most_frequent_values() -> None:
    table = [record(index) for index in range(8)]
    result = partition(
        table,
        "column:state",
        sites=3,
        rng=np.random.default_rng(0),
        column_values=["NY", "CA", "CA", "TX", "AK", "CA", "NY", "TX"],
    )
    # CA 3 rows; NY and TX 2 each, in the order of the alphabet; AK's one row is left out.
    assert [site.tolist() for site in result] == [[1, 2, 5], [0, 6], [3, 7]]
    assert result.rows_left_out == 1


def test_column_with_fewer_values_than_sites_is_refused_without_the_values() -> None:
    with pytest.raises(
        DataError, match="column 'state' has 1 values, too few for 2 sites"
    ) as caught:
        partition(
            [record(0), record(1)],
            "column:state",
            sites=2,
            rng=np.random.default_rng(0),
            column_values=["canary-8d1f"] * 2,
        )
    assert "canary-8d1f" not in str(caught.value)


@pytest.mark.parametrize("values", [None, ["CA"]])
def test_column_needs_a_value_for_each_record(values: list[str] | None) -> None:
    with pytest.raises(ConfigError, match="needs one value of the column for each record"):
        partition(
            [record(0), record(1)],
            "column:state",
            sites=1,
            rng=np.random.default_rng(0),
            column_values=values,
        )


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "IID",
        "iid:",
        "iid:3",
        "dirichlet",
        "dirichlet:",
        "dirichlet:0",
        "dirichlet:-1",
        "dirichlet:nan",
        "dirichlet:inf",
        "dirichlet:x",
        "size",
        "size:-1",
        "size:inf",
        "column",
        "column:",
        "shards:2",
    ],
)
def test_an_unknown_specification_lists_the_known_ones(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"use one of 'iid', 'dirichlet:ALPHA'"):
        parse_spec(spec)


def test_specifications_are_parsed() -> None:
    assert parse_spec("iid").kind == "iid"
    assert parse_spec("dirichlet:0.3").number == 0.3
    assert parse_spec("size:0").number == 0
    assert parse_spec("column:a:b").column == "a:b"


def test_sites_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="sites must be at least 1, got 0"):
        deal(UNIFORM, "iid", sites=0)


def test_shares_of_a_law_are_finite_however_steep() -> None:
    result = deal(UNIFORM, "size:300", sites=3)
    # 2 ** -300 of 1,000 rows is none: both other sites get one group of one row.
    assert sizes(result) == [998, 1, 1]
    assert math.fsum(sizes(result)) == 1000
