"""Processors and GPUs: what this machine has for workers, and what each may use of it."""

import glob
import os
from collections.abc import Sequence

from intramural.core.threads import processor_count

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


def gpus_for(device: str) -> list[str]:
    """Return the GPUs that workers are dealt, one each, where `device` leaves it open which.

    They have the names of CUDA_VISIBLE_DEVICES. 'cuda:1' is a number among all that this process
    sees; so a worker must see them, too.
    """
    if device not in ("auto", "cuda"):
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name and name != "-1"]
    return [str(number) for number in range(len(glob.glob("/dev/nvidia[0-9]*")))]


def worker_count(*, threads: int, device: str = "auto") -> int:
    """Return how many workers this machine has room for: one for each GPU, else by processors."""
    if gpus := gpus_for(device):
        return len(gpus)
    return max(1, processor_count() // threads) if device in ("auto", "cpu") else 1


def worker_environment(
    *, threads: int, number: int = 0, gpus: Sequence[str] = ()
) -> dict[str, str]:
    """Return what a worker's environment has besides this process's.

    With GPUs, worker `number` has one of them for itself, or shares it where workers are more.
    """
    changes = dict.fromkeys(_THREADS, str(threads))
    if gpus:
        changes["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    return changes
