"""Threads: all of a pool's are there at once, and Ctrl-C at any moment leaves none to wait for."""

import subprocess
import sys
import threading

import pytest

from intramural.core.threads import beside, thread_pool


@pytest.mark.parametrize("threads", [1, 4])
def test_a_pool_has_all_its_threads_and_starts_none_later(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with thread_pool(threads, name="some") as pool:
        monkeypatch.delattr(threading.Thread, "start")
        at_once = threading.Barrier(threads)
        waits = [pool.submit(at_once.wait) for _ in range(threads)]  # each needs all the others
        assert sorted(wait.result(timeout=10) for wait in waits) == list(range(threads))
        assert pool.submit(lambda: threading.current_thread().name).result()[:4] == "some"


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_where_there_can_be_no_more_threads_nobody_waits_for_them(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def full(thread: threading.Thread) -> None:
        if len(started) == 3:
            raise error
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", full)
    pool = thread_pool(4, name="few")
    pool.shutdown(wait=True)  # the two that there are wait for nobody
    assert [thread.name for thread in started[1:]] == ["few_0", "few_1"]


def test_what_is_done_beside_is_no_reason_to_wait_at_the_end() -> None:
    code = (
        "import threading; from intramural.core.threads import beside;"
        "beside(threading.Event().wait); print('over')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30, check=True)
    assert ran.stdout == b"over\n"
    done: list[int] = []
    beside(lambda: done.append(1)).join()
    assert done == [1]


INTERRUPTED = """
import os, signal, sys, threading
from intramural.core.threads import thread_pool

start = threading.Thread.start

def start_and_interrupt(thread):
    start(thread)
    if thread.name == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGINT)

threading.Thread.start = start_and_interrupt
try:
    pool = thread_pool(2, name="some")
    for _ in range(1000):
        threading.Event().wait(0.01)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("thread", ["some_0", "some_1"])
def test_a_process_interrupted_while_its_pool_starts_ends(thread: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED, thread]
    ran = subprocess.run(command, capture_output=True, timeout=30, check=True)
    assert ran.stdout == b"interrupted\n"
