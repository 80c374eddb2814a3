"""Pages: how this process gets large pieces of memory, and whether it keeps them."""

import ctypes
import sys
from functools import cache
from typing import Any

import numpy as np

LARGE_BYTES = 1 << 22
"""From this size on NumPy asks for large pages, and so do we."""
_PAGE_BYTES = 1 << 12
_MADV_HUGEPAGE = 14
# of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_KEPT_BYTES = 2**31 - 1
_OWN_BYTES = 1 << 25
"""The most that glibc takes for _M_MMAP_THRESHOLD: pieces from here on are got and given back one
by one."""
KEPT_BY_WORKER_BYTES = 1 << 25
"""What one of several processes may keep: enough for a small batch's activations, and little beside
a model."""


@cache
def _c_function(name: str) -> Any:
    """Return the C library's function, or None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)


def ask_for_large_pages(memory: memoryview) -> None:
    """Have memory that was not touched yet come in large pages, where the system has them.

    It then takes two thirds of the time to fill. A wish: nothing tells whether it was granted.
    """
    if memory.nbytes < LARGE_BYTES or (advise := _c_function("madvise")) is None:
        return
    start = np.frombuffer(memory, dtype=np.uint8).ctypes.data
    first = -(-start // _PAGE_BYTES) * _PAGE_BYTES
    advise(
        ctypes.c_void_p(first),
        ctypes.c_size_t((start + memory.nbytes - first) // _PAGE_BYTES * _PAGE_BYTES),
        ctypes.c_int(_MADV_HUGEPAGE),
    )


def keep_freed_memory(most: int | None = None) -> None:
    """Have this process keep pieces of memory that it frees, for the next that it needs.

    A round makes and frees activations, vectors and gradients, again and again. By default glibc
    gives large ones back to the system and gets them anew, page by page. What the process holds at
    most stays about the same; it holds it for longer. Without glibc this does nothing.

    `most`: about how many bytes at the end of the heap, of pieces smaller than a large model's
    vectors; what lies between pieces in use is kept in any case. None: all.
    """
    if (set_option := _c_function("mallopt")) is None:
        return
    if most is None:
        options = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _KEPT_BYTES}
    else:
        options = {_M_MMAP_THRESHOLD: _OWN_BYTES, _M_TRIM_THRESHOLD: most}
    for option, value in options.items():
        set_option(ctypes.c_int(option), ctypes.c_int(value))
