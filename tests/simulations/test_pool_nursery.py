"""Workers that are copies of one process: as those that start by themselves, whatever dies."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.common.constant import ErrorCode

from intramural.core.errors import ConfigError, RoundError
from intramural.simulations.pool import PoolGrid
from intramural.simulations.pool_nursery import can_fork
from tests.simulations.test_pool import ask, firsts, orders, pids, pool
from tests.simulations.test_pool_faults import SCRIPT, WAIT_S, await_true, lives

pytestmark = pytest.mark.skipif(not can_fork(), reason="processes are copied on Linux alone")
LIBRARIES = ("colorsys", "no.such.module")
"""A small one, which nothing else imports; what is missing is the matter of whoever needs it."""


@pytest.fixture(scope="module")
def copies() -> Iterator[PoolGrid]:
    with pool(20, 2, libraries=LIBRARIES) as grid:
        yield grid


def nursery_of(grid: PoolGrid) -> int:
    assert grid._nursery is not None
    return grid._nursery.process.pid


def test_copies_answer_as_workers_of_their_own_and_are_children_of_the_nursery(
    copies: PoolGrid,
) -> None:
    replies = ask(copies, range(1, 9), start=100.0)
    assert firsts(replies) == [101, 102, 103, 104, 105, 106, 107, 108]
    assert set(pids(replies)) == set(copies.pids)
    for pid in copies.pids:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        assert int(stat[1]) == nursery_of(copies)
        assert int(stat[2]) == pid  # a group of its own, ended as a whole


def test_a_copy_that_is_killed_fails_one_message_and_is_replaced(copies: PoolGrid) -> None:
    old = copies.pids
    replies = ask(copies, range(1, 10), die=3, sleep_s=0.1)
    assert [reply.has_error() for reply in replies] == [n == 3 for n in range(1, 10)]
    assert replies[2].error.code == ErrorCode.CLIENT_APP_CRASHED
    [gone] = set(old) - set(copies.pids)
    assert not lives(gone)
    assert firsts(ask(copies, range(1, 10), start=10.0)) == list(range(11, 20))


def test_a_copy_that_hangs_is_ended_at_the_limit() -> None:
    with pool(3, 1, limit_s=1.0, libraries=LIBRARIES) as grid:
        ask(grid, (1,))
        slow = orders([1], sleep_s=60.0)
        replies = list(grid.send_and_receive([*slow, *orders((2, 3))]))
        assert [reply.has_error() for reply in replies] == [True, False, False]


def test_without_its_nursery_no_worker_lives_and_the_run_ends() -> None:
    grid = pool(3, 2, libraries=LIBRARIES)
    ask(grid, (1, 2, 3))
    workers = grid.pids
    os.kill(nursery_of(grid), signal.SIGKILL)
    await_true(lambda: not any(lives(pid) for pid in workers))
    with pytest.raises(RoundError, match="before it was ready"):
        ask(grid, (1, 2, 3))


def test_closing_ends_copies_and_nursery_also_before_any_was_made() -> None:
    grid = pool(4, 1, libraries=LIBRARIES)
    processes = [nursery_of(grid), *pids(ask(grid, (1, 2)))]
    grid.push_messages(orders((1, 2, 3), sleep_s=60.0))
    grid.close()
    assert not any(lives(pid) for pid in processes)
    unused = pool(4, 2, libraries=("time",) * 3)
    nursery = nursery_of(unused)
    unused.close()
    assert not lives(nursery)


def test_an_app_that_cannot_be_imported_by_a_copy_ends_the_run() -> None:
    grid = pool(1, 1, app="tests.simulations:app", libraries=LIBRARIES)
    with pytest.raises(ConfigError, match=r"cannot be imported .* AttributeError"):
        ask(grid, (1,))


def test_each_copy_has_the_environment_of_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    with pool(4, 2, libraries=LIBRARIES) as grid:
        ask(grid, (1, 2, 3, 4))
        seen = [hand._environment["CUDA_VISIBLE_DEVICES"] for hand in grid._hands]
    assert seen == ["4", "7"]


def test_where_one_gpu_is_named_a_worker_sees_all_so_that_its_number_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    with pool(4, None, device="cuda:1") as grid:
        ask(grid, (1,))
        (hand,) = grid._hands
    assert "CUDA_VISIBLE_DEVICES" not in hand._environment


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill-9"])
def test_no_copy_outlives_its_pool(number: signal.Signals) -> None:
    script = SCRIPT.replace("pool(4, 1)", f"pool(4, 1, libraries={LIBRARIES})").replace(
        "print(*grid.pids", "print(grid._nursery.process.pid, *grid.pids"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    *workers, states = process.stdout.readline().split()
    assert len(workers) == 2
    process.send_signal(number)
    process.communicate(timeout=WAIT_S)
    await_true(lambda: not any(lives(int(pid)) for pid in workers))
    if number == signal.SIGKILL:
        Path(states).rmdir()
