"""Threads that a process can always end with.

Python waits at its end for every thread that is no daemon. An executor tells its threads to end,
but only those that it has written down; where Ctrl-C interrupts the main thread just after it
started one for an executor, nobody tells that one, and the process stays for ever. So the main
thread starts none: a daemon does, which Ctrl-C does not reach.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def processor_count() -> int:
    """Return how many processors this process may use: fewer than there are, if it is bound."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def beside(work: Callable[[], object]) -> threading.Thread:
    """Start a daemon that does some work; the process does not wait for it at its end."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def thread_pool(threads: int, *, name: str) -> ThreadPoolExecutor:
    """Return an executor whose threads are all there, so that it starts none later.

    Where the system has no more threads there are fewer; whoever submits work may hear of it.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    all_there = threading.Barrier(threads)  # an idle one would be used again, and no other started

    def start() -> None:
        try:
            for _ in range(threads):
                pool.submit(all_there.wait)
        except (RuntimeError, MemoryError):  # no more threads, or the process ends
            all_there.abort()

    beside(start).join()
    return pool
