"""The pool of workers: what it delivers, in which order, and what it holds meanwhile."""

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from intramural.core.layout import lent_by, wire_bytes, written_to_send
from intramural.core.wire import FLAT, VECTOR, encode_vector
from intramural.simulations.grid import Delivery, LocalGrid
from intramural.simulations.inprocess import InProcessGrid
from intramural.simulations.pool import PoolGrid
from tests.simulations import pool_apps
from tests.simulations.pool_apps import APP, ORDER

SIZE = 1000


def pool(nodes: int, workers: int | None, *, app: str = APP, **rest: Any) -> PoolGrid:
    return PoolGrid(nodes, run_config={}, app=app, workers=workers, **rest)


@dataclass
class Hooks:
    """What a shared pool's hooks do and see."""

    kept_back: set[int] = field(default_factory=set)
    seen: list[Delivery] = field(default_factory=list)

    def before(self, message: Message) -> None:
        if message.metadata.dst_node_id in self.kept_back:
            raise RuntimeError("faults")


HOOKS = Hooks()


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run") / "states"


@pytest.fixture(scope="module")
def two(states: Path) -> Iterator[PoolGrid]:
    """Return a pool of two workers, shared, for a start takes time: each test has its nodes."""
    hooks: dict[str, Any] = {"before": HOOKS.before, "observe": HOOKS.seen.append}
    with pool(99, 2, threads=3, states=states, **hooks) as grid:
        yield grid


def orders(nodes: Iterable[int], *, start: float = 0.0, **order: Any) -> list[Message]:
    """Return a training message a node, all of one content, whose vector holds `start`."""
    vector = encode_vector(np.full(SIZE, start, dtype=np.float32))
    content = RecordDict({VECTOR: vector, ORDER: ConfigRecord(order)})
    return [Message(content, node, "train") for node in nodes]


def ask(grid: LocalGrid, nodes: Iterable[int], **order: Any) -> list[Message]:
    return list(grid.send_and_receive(orders(nodes, **order)))


def vector_of(reply: Message, name: str = VECTOR) -> NDArray[np.float32]:
    record = reply.content[name]  # not by `array_records`, which makes a reference cycle
    assert isinstance(record, ArrayRecord)
    return np.frombuffer(record[FLAT].data, dtype="<f4")


def firsts(replies: Iterable[Message]) -> list[float]:
    """Return the first value of each reply's vector: the start plus the node's number."""
    return [float(vector_of(reply)[0]) for reply in replies]


def blocks(pid: int) -> int:
    """Return how many pieces of the pool's shared memory a process has."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return sum("memfd:intramural" in line for line in maps)


def told(reply: Message) -> dict[str, Any]:
    record = reply.content["told"]
    assert isinstance(record, ConfigRecord)
    return dict(record)


def pids(replies: Iterable[Message]) -> list[int]:
    return [told(reply)["pid"] for reply in replies]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_replies_come_in_the_order_of_their_messages_whoever_is_faster(
    workers: int, request: pytest.FixtureRequest
) -> None:
    # the first node is slow, and each worker has more messages than slots (2)
    own = contextlib.nullcontext(request.getfixturevalue("two")) if workers == 2 else None
    with own or pool(11, workers) as grid:
        for start in (0.0, 100.0):
            slow = orders([1], start=start, sleep_s=0.15)
            ids = list(grid.push_messages([*slow, *orders(range(2, 12), start=start)]))
            found = []
            for reply in grid.pull_messages(reversed(ids)):
                found.append((reply.metadata.reply_to_message_id, vector_of(reply)[-1]))
            assert found == [(i, start + node) for node, i in enumerate(ids, start=1)]


def test_a_push_is_shared_evenly_and_nodes_return_to_the_worker_that_knows_them(
    two: PoolGrid,
) -> None:
    nodes = (21, 22, 23, 24)
    first = dict(zip(nodes, pids(ask(two, nodes)), strict=True))
    assert sorted(first.values()) == sorted(two.pids * 2)  # 2 and 2
    assert pids(ask(two, (24, 22, 23, 21))) == [first[node] for node in (24, 22, 23, 21)]
    assert first[21] == first[23]
    # one push of two messages: still one each, and the second node has moved for good
    stays, moves = pids(ask(two, (21, 23)))
    assert (stays == first[21], moves == first[21]) == (True, False)
    assert pids(ask(two, (23, 21))) == [moves, stays]
    assert len(set(pids(ask(two, (25, 25, 25, 25))))) == 1  # a node does one thing at a time


def test_a_node_that_is_at_work_gets_its_next_message_where_it_is(two: PoolGrid) -> None:
    ids = list(two.push_messages(orders((31, 32, 33, 34), sleep_s=0.1)))
    more = list(two.push_messages(orders((31, 33))))  # both at one worker, and at work
    replies = list(two.pull_messages([*ids, *more]))
    assert pids(replies)[4:] == [pids(replies)[0]] * 2


def test_the_app_reads_the_shared_vector_without_a_copy_and_cannot_write_to_it(
    two: PoolGrid,
) -> None:
    for reply in ask(two, (1, 2)):
        assert (told(reply)["writable"], told(reply)["threads"]) == (False, "3")


def test_a_reply_that_is_kept_is_not_overwritten(two: PoolGrid) -> None:
    replies = ask(two, range(1, 10))  # nine held, on four slots
    later = ask(two, range(1, 10), start=50.0)
    assert firsts(replies) == list(range(1, 10))
    assert firsts(later) == list(range(51, 60))


def test_a_reply_that_is_kept_until_the_next_costs_no_new_memory(two: PoolGrid) -> None:
    def inodes() -> set[int]:
        maps = [Path(f"/proc/{pid}/maps").read_text().splitlines() for pid in two.pids]
        return {int(line.split()[4]) for of in maps for line in of if "memfd:intramural" in line}

    made = []
    for keep in (1, 2):
        two._settle()
        seen: set[int] = set()
        held: list[NDArray[np.float32]] = []
        for reply in two.pull_messages(two.push_messages(orders(range(1, 21)))):
            held = [*held, vector_of(reply)][-keep:] if keep > 1 else [vector_of(reply)]
            del reply
            seen |= inodes()
        del held
        made.append(len(seen))
    # Four slots, which the test before may have left to be made anew, and a broadcast before and
    # now; who keeps two at a time has most of his twenty replies in memory of their own.
    assert made[0] <= 10
    assert made[1] >= 14


def test_a_lent_vector_reaches_the_workers_from_where_it_was_written(two: PoolGrid) -> None:
    with lent_by(two.lend):
        vector = written_to_send(SIZE, lambda out: out.fill(3.0))
    block = two._lender.block_of(wire_bytes(vector))
    assert block is not None
    content = RecordDict({VECTOR: encode_vector(vector), ORDER: ConfigRecord({})})
    for _ in range(2):  # it is there for as long as somebody may send it
        messages = [Message(content, node, "train") for node in (51, 52, 53)]
        assert firsts(two.send_and_receive(messages)) == [54.0, 55.0, 56.0]
    assert block.descriptor >= 0


def test_memory_does_not_grow_with_the_messages(two: PoolGrid) -> None:
    two._settle()  # what was read longer in the test before
    before = blocks(os.getpid())
    most, here = 0, 0
    for _ in range(3):
        for reply in two.pull_messages(two.push_messages(orders(range(1, 21)))):
            assert vector_of(reply).size == SIZE
            del reply
            most = max(most, *(blocks(pid) for pid in two.pids))
            here = max(here, blocks(os.getpid()) - before)
    assert most == 3  # one broadcast, two slots
    assert 1 <= here <= 4  # the replies in two slots of two workers


@pytest.mark.parametrize("read_s", [0.0, 0.15])
def test_a_worker_has_one_block_where_a_reply_is_read_before_the_next_is_made(
    read_s: float,
) -> None:
    most, held, timers = 0, [], []
    with pool(8, 2) as grid:
        ids = grid.push_messages(orders(range(1, 9), sleep_s=0.6))
        for reply in grid.pull_messages(ids):
            held.append(vector_of(reply))
            del reply
            if read_s:  # as a sum does that is folded beside what comes next
                timers.append(threading.Timer(read_s, held.clear))
                timers[-1].start()
            else:
                held.clear()
            most = max(most, *(blocks(pid) for pid in grid.pids))
        for timer in timers:
            timer.join()
    assert most == 2  # one broadcast, one reply


def test_replies_may_be_asked_for_in_any_order(two: PoolGrid) -> None:
    one_node = [orders([41], start=float(k))[0] for k in range(7)]  # so they have one worker
    ids = list(two.push_messages(one_node))
    assert firsts(two.pull_messages(ids[-1:])) == [47]  # six lie before it, on two slots
    assert firsts(list(two.pull_messages(ids))) == [41, 42, 43, 44, 45, 46]
    assert list(two.pull_messages([*ids, "m0"])) == []
    outer = iter(two.pull_messages(two.push_messages(orders([41, 41]))))
    first = next(outer)
    others = list(two.push_messages([orders([41], start=float(k))[0] for k in range(5)]))
    assert firsts(two.pull_messages(others)) == [41, 42, 43, 44, 45]  # while the first is read
    assert firsts([first, *outer]) == [41, 41]


@pytest.mark.parametrize("kind", ["pool", "inprocess"])
def test_a_nodes_state_follows_it_and_lies_on_disk_unless_it_is_empty(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = tmp_path / "states"
    if kind == "pool":
        grid: LocalGrid = request.getfixturevalue("two")
        folder = request.getfixturevalue("states")
    else:
        grid = InProcessGrid(pool_apps.app, 99, run_config={}, states=folder)
    where = pids(ask(grid, (51, 52, 53), remember=True, start=2.0))
    counts = [told(reply)["count"] for reply in ask(grid, (51, 53, 54))]
    assert counts == [2, 2, 1]
    # one push of two messages that live together: the first stays, the second moves
    stays, moves = (told(reply) for reply in ask(grid, (51, 53), remember=True, start=2.0))
    assert (stays["count"], moves["count"]) == (2, 2)
    if kind == "pool":
        assert where[0] == where[2] == stays["pid"] != moves["pid"]
    [failed] = ask(grid, (53,), **{"raise": 53}, remember=True)
    assert failed.has_error()
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["node-51.state", "node-52.state", "node-53.state"]
    [state] = grid.send_and_receive([Message(RecordDict(), 53, "query")])
    assert list(state.content) == ["seen", "kept"]
    assert vector_of(state, "kept").tolist() == [106.0] * SIZE  # 2 times node 53


def test_a_hook_can_keep_a_message_back_and_deliveries_are_observed(two: PoolGrid) -> None:
    HOOKS.seen.clear()
    HOOKS.kept_back.add(62)
    replies = ask(two, (61, 62, 63), sleep_s=0.05)
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert replies[1].error.reason == "RuntimeError"
    assert [(d.node, d.kind, d.failed) for d in HOOKS.seen] == [
        (61, "train", False),
        (62, "train", True),
        (63, "train", False),
    ]
    assert {d.worker for d in HOOKS.seen} <= {0, 1}
    for delivery in (HOOKS.seen[0], HOOKS.seen[2]):
        assert 0.05 <= delivery.ended_s - delivery.began_s < 5


def test_in_process_deliveries_are_observed_too() -> None:
    seen: list[Delivery] = []
    grid = InProcessGrid(pool_apps.app, 2, run_config={}, observe=seen.append)
    ask(grid, (1, 2), sleep_s=0.01, **{"raise": 2})
    assert [(d.node, d.worker, d.failed) for d in seen] == [(1, 0, False), (2, 0, True)]
    assert seen[0].began_s + 0.01 <= seen[0].ended_s <= seen[1].began_s


def test_flowers_own_arrays_arrive_as_bytes(two: PoolGrid) -> None:
    arrays = [np.arange(6.0).reshape(2, 3), np.array([], dtype=np.int64)]
    content = RecordDict({"a": ArrayRecord(arrays)})
    for reply in two.send_and_receive([Message(content, n, "evaluate") for n in (71, 72)]):
        one, empty = reply.content.array_records["a"].to_numpy_ndarrays()
        np.testing.assert_array_equal(one, [[0, 1, 2], [3, 4, 5]])
        assert (empty.size, str(empty.dtype)) == (0, "int64")
        assert reply.content.config_records["types"]["all"] == "bytes bytes"
