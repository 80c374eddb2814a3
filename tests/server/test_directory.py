"""Directory and Post: who is who, and what was sent and came."""

from collections.abc import Callable
from dataclasses import replace

from flwr.app import Message

from intramural.core.messages import Hello, Reply, Request, Welcome
from intramural.server.directory import Directory
from intramural.server.post import Arrival, Post
from tests.server.fakes import BASE, LAYOUT, SlowGrid, app_of, honest, small

HELLO = Hello(manifest=small().digest)


def directory_of(grid: SlowGrid) -> Directory:
    return Directory(Post(grid, lambda _: LAYOUT), small(), run="", layout=LAYOUT, base=BASE)


def greet(directory: Directory) -> bool:
    def receive(arrival: Arrival) -> None:
        assert directory.took(arrival)

    return directory.greet(receive)


def grid_of(answer: Callable[[str, Request], Reply], nodes: int) -> SlowGrid:
    return SlowGrid(app_of(answer), nodes, run_config={}, slow={})


def impostor(site: str, request: Request) -> Reply:
    reply = honest(site, request)
    return replace(reply, site="site-1") if isinstance(reply, Welcome) else reply


def test_every_node_is_greeted_once() -> None:
    asked: list[str] = []

    def answer(site: str, request: Request) -> Reply:
        asked.append(site)
        return honest(site, request)

    directory = directory_of(grid_of(answer, 3))
    assert greet(directory)
    assert greet(directory)
    assert asked == ["site-1", "site-2", "site-3"]
    assert directory.nodes == {"site-1": 1, "site-2": 2, "site-3": 3}


def test_of_two_nodes_with_one_name_the_first_keeps_it_while_it_is_there() -> None:
    directory = directory_of(grid := grid_of(impostor, 2))
    greet(directory)
    assert directory.nodes == {"site-1": 1}
    assert directory.why == "two nodes say they are site 'site-1'"
    grid.connected = {2}
    greet(directory)
    assert directory.nodes == {}


def test_a_site_that_comes_back_on_another_node_is_itself() -> None:
    directory = directory_of(grid := grid_of(impostor, 2))
    grid.connected = {1}
    greet(directory)
    grid.connected = {2}
    greet(directory)
    assert directory.nodes == {"site-1": 2}
    assert directory.refusals == {}


def test_a_node_that_left_is_greeted_anew_and_may_have_been_mended() -> None:
    broken = True

    def answer(site: str, request: Request) -> Reply:
        if broken:
            raise RuntimeError
        return honest(site, request)

    directory = directory_of(grid := grid_of(answer, 1))
    greet(directory)
    assert directory.why == "flower-2"
    grid.connected = set()
    greet(directory)
    grid.connected, broken = {1}, False
    greet(directory)
    assert directory.nodes == {"site-1": 1}
    assert directory.refusals == {}


def test_a_node_that_leaves_before_it_answers_is_waited_for_no_longer() -> None:
    directory = directory_of(grid := grid_of(honest, 2))
    grid.silent = {2}
    assert not greet(directory)
    grid.connected = {1}
    assert greet(directory)
    assert directory.nodes == {"site-1": 1}


def test_a_greeting_that_is_given_up_still_counts_when_it_comes() -> None:
    directory = directory_of(grid := grid_of(honest, 2))
    grid.silent = {2}
    assert not greet(directory)
    directory.give_up()
    assert greet(directory)
    assert directory.why == "a node does not answer its greeting"
    grid.silent, grid.connected = set(), {1, 2}
    for arrival in directory._post.arrivals():
        assert directory.took(arrival)
    assert greet(directory)
    assert directory.nodes == {"site-1": 1, "site-2": 2}
    assert directory.refusals == {}


def test_a_reply_to_nothing_that_was_asked_is_dropped() -> None:
    grid = grid_of(honest, 1)
    post = Post(grid, lambda _: LAYOUT)
    post.send(HELLO, {"site-1": 1}, tag=("hello", 0, 0))
    pulled = grid.pull_messages

    def twice(ids: list[str]) -> list[Message]:
        found = list(pulled(ids))
        return found + found

    grid.pull_messages = twice  # type: ignore[assignment, method-assign]
    assert [arrival.site for arrival in post.arrivals()] == ["site-1"]
    assert list(post.arrivals()) == []


def test_the_vector_s_bytes_are_counted_for_every_site() -> None:
    grid = grid_of(honest, 2)
    post = Post(grid, lambda _: LAYOUT)
    post.send(HELLO, {"a": 1, "b": 2}, tag=("hello", 0, 0))
    one = post.bytes_down // 2
    assert post.bytes_down == 2 * one > 0
    assert post.bytes_up == 0
    assert len(list(post.arrivals())) == 2
    assert post.bytes_up > 0
    post.reset_count()
    assert (post.bytes_up, post.bytes_down) == (0, 0)
