"""How many workers a machine has room for."""

import os

import pytest

from intramural.simulations.processors import worker_count


@pytest.mark.parametrize(
    ("processors", "threads", "gpus", "count"),
    [(7, 1, "", 7), (7, 2, "", 3), (7, 8, "", 1), (7, 1, "-1", 7), (7, 1, "3,GPU-8c", 2)],
    ids=["one each", "two each", "too few", "GPUs hidden", "GPUs"],
)
def test_workers_share_the_processors_that_the_process_is_bound_to_or_have_a_gpu_each(
    monkeypatch: pytest.MonkeyPatch, processors: int, threads: int, gpus: str, count: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    assert worker_count(threads=threads) == count
