"""The pool when things go wrong: apps that raise, workers that die or hang, a killed pool."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flwr.common.constant import ErrorCode

from intramural.core.errors import ConfigError, RoundError
from intramural.simulations.grid import Delivery
from intramural.simulations.inprocess import InProcessGrid
from intramural.simulations.pool import PoolGrid
from tests.simulations import pool_apps
from tests.simulations.test_pool import ask, firsts, orders, pids, pool, told

WAIT_S = 20.0
SCRIPT = """
import signal
from tests.simulations.test_pool import orders, pool

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored
with pool(4, 1) as grid:
    list(grid.send_and_receive(orders((1, 2))))
    ids = list(grid.push_messages(orders((1, 2, 3, 4), sleep_s=60.0)))
    print(*grid.pids, grid._home.states.folder, flush=True)
    list(grid.pull_messages(ids))
"""


def await_true(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def lives(pid: int) -> bool:
    """Return whether a process is there and no corpse."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def two() -> Iterator[PoolGrid]:
    """Return a pool of two workers, shared: whoever dies is replaced."""
    with pool(20, 2, observe=SEEN.append) as grid:
        yield grid


SEEN: list[Delivery] = []


def test_an_app_that_raises_is_an_error_reply_as_in_process_and_without_its_text(
    two: PoolGrid,
) -> None:
    before = two.pids
    replies = ask(two, (1, 2, 3), **{"raise": 2})
    assert two.pids == before
    here = ask(InProcessGrid(pool_apps.app, 3, run_config={}), (1, 2, 3), **{"raise": 2})
    assert [reply.has_error() for reply in replies] == [False, True, False]
    for reply in (replies[1], here[1]):
        assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        assert reply.error.reason == "ValueError"


def test_a_worker_that_is_killed_fails_one_message_and_is_replaced(two: PoolGrid) -> None:
    SEEN.clear()
    old = two.pids
    replies = ask(two, range(1, 10), die=3, sleep_s=0.1)  # it has a second one by then
    assert [reply.has_error() for reply in replies] == [n == 3 for n in range(1, 10)]
    assert replies[2].error.code == ErrorCode.CLIENT_APP_CRASHED
    assert firsts(r for r in replies if r.has_content()) == [1, 2, 4, 5, 6, 7, 8, 9]
    assert [d.node for d in SEEN if d.failed] == [3]
    assert all(d.began_s <= d.ended_s for d in SEEN)
    [gone] = set(old) - set(two.pids)
    assert not lives(gone)
    assert firsts(ask(two, range(1, 10), start=10.0)) == list(range(11, 20))


def test_a_worker_that_dies_idle_costs_no_message(two: PoolGrid) -> None:
    [old] = pids(ask(two, (1,)))
    os.kill(old, signal.SIGKILL)
    [new] = pids(ask(two, (1,)))
    assert new != old


def test_what_does_not_come_within_the_timeout_is_forgotten(two: PoolGrid) -> None:
    ask(two, (11, 12))
    slow = orders([11], sleep_s=1.5)
    replies = list(two.send_and_receive([*slow, *orders((12, 13, 14))], timeout=0.7))
    assert 12 in firsts(replies)
    assert 11 not in firsts(replies)
    assert firsts(ask(two, range(11, 17), start=10.0)) == [21, 22, 23, 24, 25, 26]
    assert two._tasks == {}


def test_a_worker_that_hangs_is_ended_at_the_limit_and_one_that_dies_is_replaced() -> None:
    with pool(5, 1, limit_s=1.0) as grid:
        replies = ask(grid, (1, 2, 3), sleep_s=0.5)  # each has its own time
        assert not any(reply.has_error() for reply in replies)
        began_s = time.monotonic()
        slow = orders([1], sleep_s=60.0)
        replies = list(grid.send_and_receive([*slow, *orders((2, 3, 4), die=4), *orders([5])]))
        assert time.monotonic() - began_s < WAIT_S
        assert [reply.has_error() for reply in replies] == [True, False, False, True, False]
        assert replies[0].error.code == ErrorCode.REPLY_MESSAGE_UNAVAILABLE
        assert firsts(replies[1:3] + replies[4:]) == [2, 3, 5]


def test_a_worker_that_never_gets_ready_ends_the_run() -> None:
    grid = pool(1, 1, app="tests.simulations.pool_deadly:app")
    with pytest.raises(RoundError, match="before it was ready"):
        ask(grid, (1,))
    assert grid.pids == []


def test_an_app_that_cannot_be_imported_ends_the_run() -> None:
    grid = pool(1, 1, app="tests.simulations:app")
    processes = grid.pids
    with pytest.raises(ConfigError, match=r"cannot be imported .* AttributeError"):
        ask(grid, (1,))
    assert not any(lives(pid) for pid in processes)


def test_close_ends_the_workers_at_once_and_leaves_no_file() -> None:
    grid = pool(4, 1)
    ids = list(grid.push_messages(orders((1, 2), remember=True)))
    replies = list(grid.pull_messages(ids))
    slow = grid.push_messages(orders((1, 2, 3, 4), sleep_s=60.0))
    processes, states = pids(replies), grid._home.states.folder
    assert len(list(states.iterdir())) == 2
    rest = iter(grid.pull_messages(slow))
    grid.close()
    grid.close()
    assert list(rest) == []
    assert not any(lives(pid) for pid in processes)
    assert not states.exists()
    assert told(replies[0])["count"] == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill-9"])
def test_no_worker_outlives_its_pool(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    *workers, states = process.stdout.readline().split()
    assert workers
    for pid in workers:  # memory without a name: it cannot be left behind
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "memfd:intramural" in maps
        assert "/dev/shm" not in maps
    process.send_signal(number)
    _, errors = process.communicate(timeout=WAIT_S)
    await_true(lambda: not any(lives(int(pid)) for pid in workers))
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in errors
        assert not Path(states).exists()
    else:
        Path(states).rmdir()  # all that is left is an empty folder
