"""Threads that share the parts of a long vector; NumPy lets go of the interpreter's lock."""

from collections.abc import Callable
from concurrent.futures import Executor
from functools import cache
from typing import TypeVar

from intramural.core.threads import processor_count, thread_pool

T = TypeVar("T")

CHUNK = 1 << 17
"""Elements of one vector handled at once: few enough to stay in cache, enough to keep threads from
waiting."""
THREADS_MAX = 4
"""Each thread has a chunk of scratch; more threads than this gain nothing but memory traffic."""


def thread_count() -> int:
    """Return how many threads share a vector."""
    return min(processor_count(), THREADS_MAX)


def in_parts(size: int, parts: int, work: Callable[[int, int], T]) -> list[T]:
    """Run `work(start, stop)` on equal parts of `range(size)`; results are in the parts' order."""
    if parts == 1:
        return [work(0, size)]
    edges = [size * i // parts for i in range(parts + 1)]
    return list(_pool().map(work, edges[:-1], edges[1:]))


@cache
def _pool() -> Executor:
    return thread_pool(thread_count(), name="aggregation")
