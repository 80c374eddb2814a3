"""Memory that a process keeps: it need not be got anew, and large pieces are given back."""

import os
import subprocess
import sys

import pytest

glibc = pytest.mark.skipif(
    sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names,
    reason="only glibc can be told to keep memory",
)

LOOP = """
import resource, sys
import numpy as np
from intramural.core.pages import keep_freed_memory

def held_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() >> 20

if sys.argv[1] != "none":
    keep_freed_memory(*map(int, sys.argv[2:]))
np.full(1 << 20, 1.0)
faults, before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, held_mb()
for _ in range(50):
    parts = [np.full(1 << 17, 1.0) for _ in range(16)]  # 16 MiB, in pieces of one
    del parts
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
parts = [np.full(1 << 17, 1.0) for _ in range(100)]
del parts
print(faults, held_mb() - before)
"""


def looped(*words: str) -> tuple[int, int]:
    """Return pages got in 50 turns of 16 MiB, and MiB held once 100 came and went."""
    ran = subprocess.run(
        [sys.executable, "-c", LOOP, *words], capture_output=True, text=True, check=True, timeout=60
    )
    faults, held = map(int, ran.stdout.split())
    return faults, held


@glibc
def test_memory_that_is_kept_is_not_got_anew() -> None:
    pages = 16 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert looped("none")[0] > 10 * pages  # what it is for
    assert looped("keep", str(1 << 25))[0] < 3 * pages
    assert looped("keep")[0] < 3 * pages


@glibc
def test_no_more_is_kept_than_was_said() -> None:
    assert looped("keep", str(1 << 25))[1] <= 32
    assert looped("keep")[1] >= 64
