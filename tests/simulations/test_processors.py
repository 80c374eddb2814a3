"""How many workers a machine has room for."""

import os

import pytest

from intramural.simulations.processors import worker_count


@pytest.mark.parametrize(
    ("threads", "gpus", "device", "count"),
    [
        (1, "", "auto", 7),
        (2, "", "cpu", 3),
        (8, "", "auto", 1),
        (1, "-1", "auto", 7),
        (1, "3,GPU-8c", "auto", 2),
        (1, "3,GPU-8c", "cuda", 2),
        (1, "3,GPU-8c", "cpu", 7),
        (1, "3,GPU-8c", "cuda:1", 1),
        (1, "", "mps", 1),
    ],
    ids=str,
)
def test_workers_share_the_processors_that_the_process_is_bound_to_or_have_a_gpu_each(
    monkeypatch: pytest.MonkeyPatch, threads: int, gpus: str, device: str, count: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    assert worker_count(threads=threads, device=device) == count
