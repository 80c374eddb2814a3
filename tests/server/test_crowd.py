"""A crowd answers as a directory of greeted sites would, and costs nothing."""

import sys

import pytest

from intramural.core.site import simulated_name
from intramural.server.crowd import Crowd, Names


@pytest.mark.parametrize("count", [1, 9, 10, 1000])
def test_names_are_those_of_simulated_sites_in_order(count: int) -> None:
    names = Names(count)
    listed = [simulated_name(number, count) for number in range(count)]
    assert list(names) == listed == sorted(listed)
    assert names[1:3] == listed[1:3]
    assert names[-1] == listed[-1]
    with pytest.raises(IndexError):
        names[count]


def test_a_name_of_another_width_or_none_is_no_site() -> None:
    nodes = Crowd(1000).nodes
    assert nodes["site-0001"] == 1
    assert nodes["site-1000"] == 1000
    for stranger in ("site-1", "site-0000", "site-1001", "clinic-0001", "site-", "site-00a1", ""):
        assert stranger not in nodes
        with pytest.raises(KeyError):
            nodes[stranger]


def test_a_million_sites_take_no_more_memory_than_ten() -> None:
    large, small = Crowd(1_000_000), Crowd(10)
    assert len(large.eligible) == len(large.nodes) == 1_000_000
    assert "site-0765432" in large.nodes
    parts = [(c, c.__dict__, c.eligible.__dict__, c.nodes.__dict__) for c in (large, small)]
    sizes = [sum(map(sys.getsizeof, part)) for part in parts]
    assert sizes[0] == sizes[1]


def test_everybody_is_there_and_no_greeting_is_ever_open() -> None:
    crowd = Crowd(3)
    assert crowd.greet(lambda arrival: None)
    crowd.missed("site-1")
    crowd.answered("site-1")
    assert list(crowd.eligible) == ["site-1", "site-2", "site-3"]
    assert crowd.reasons_of(2) == set()
