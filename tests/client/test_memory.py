"""A site's memory: what a round left, found again by any process, and by a round tried again."""

import os
from pathlib import Path

import numpy as np
import pytest

from intramural.client.memory import SiteMemory
from intramural.core.errors import DataRefused, Refused

RUN = "sha256:" + "1" * 64
MANIFEST = "sha256:" + "7" * 64


def one(value: float) -> dict[str, np.ndarray]:
    return {"own": np.full(3, value, dtype=np.float32)}


def seen(memory: SiteMemory, round_: int, *, run: str = RUN) -> float | None:
    found = memory.before(run, round_)
    return float(found["own"][0]) if found else None


@pytest.mark.parametrize("run", [RUN, ""])
def test_a_round_starts_from_what_the_last_one_before_it_left(tmp_path: Path, run: str) -> None:
    memory = SiteMemory(tmp_path, "a", manifest=MANIFEST)
    assert seen(memory, 1, run=run) is None
    memory.write(run, 1, one(1.0))
    memory.write(run, 4, one(4.0))  # it was not drawn for 2 and 3
    assert [seen(memory, n, run=run) for n in (1, 2, 4, 5, 9)] == [None, 1.0, 1.0, 4.0, 4.0]
    memory.write(run, 4, one(4.5))  # the round is tried again, from the same
    assert [seen(memory, n, run=run) for n in (4, 5)] == [1.0, 4.5]
    for number in (5, 6):
        memory.write(run, number, one(float(number)))
    # four are kept: a coordinator that lost checkpoints 6 and 5 asks round 5 again, or even 2
    assert [seen(memory, n, run=run) for n in (2, 5, 6, 7)] == [1.0, 4.5, 5.0, 6.0]
    memory.write(run, 7, one(7.0))
    assert seen(memory, 5, run=run) == 4.5
    with pytest.raises(DataRefused, match=r"back to round 4, .* keeps nothing of rounds before 4"):
        memory.before(run, 4)


def test_a_site_that_first_took_part_later_starts_a_round_before_from_nothing(
    tmp_path: Path,
) -> None:
    memory = SiteMemory(tmp_path, "a", manifest=MANIFEST)
    memory.write(RUN, 5, one(5.0))
    assert seen(memory, 4) is None


def test_what_one_manifest_s_run_left_is_not_found_under_another(tmp_path: Path) -> None:
    SiteMemory(tmp_path, "a", manifest=MANIFEST).write(RUN, 1, one(1.0))
    other = SiteMemory(tmp_path, "a", manifest="sha256:" + "8" * 64)
    assert seen(other, 2) is None
    other.write(RUN, 9, one(9.0))
    assert seen(SiteMemory(tmp_path, "a", manifest=MANIFEST), 10) == 1.0


def test_a_round_that_was_undone_is_forgotten(tmp_path: Path) -> None:
    memory = SiteMemory(tmp_path, "a", manifest=MANIFEST)
    for number in (1, 2, 3):
        memory.write(RUN, number, one(number))
    memory.write(RUN, 3, one(3.5))
    memory.write(RUN, 2, one(2.5))
    assert seen(memory, 9) == 2.5


def test_another_process_finds_it_and_another_site_or_run_does_not(tmp_path: Path) -> None:
    SiteMemory(tmp_path, "a", manifest=MANIFEST).write(RUN, 1, one(1.0))
    assert seen(SiteMemory(tmp_path, "a", manifest=MANIFEST), 2) == 1.0
    assert seen(SiteMemory(tmp_path, "b", manifest=MANIFEST), 2) is None
    assert seen(SiteMemory(tmp_path, "a", manifest=MANIFEST), 2, run="sha256:" + "2" * 64) is None
    assert seen(SiteMemory(tmp_path, "a", manifest=MANIFEST), 2, run="") is None


def test_a_run_s_name_is_no_path(tmp_path: Path) -> None:
    memory = SiteMemory(tmp_path / "memory", "a", manifest=MANIFEST)
    memory.write("../../elsewhere", 1, one(1.0))
    assert [path.name for path in tmp_path.iterdir()] == ["memory"]
    assert seen(memory, 2, run="../../elsewhere") == 1.0


def test_only_the_site_s_user_can_read_it_and_nothing_half_written_stays(tmp_path: Path) -> None:
    SiteMemory(tmp_path, "a", manifest=MANIFEST).write(RUN, 1, one(1.0))
    (file,) = tmp_path.rglob("*.safetensors")
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.name == "1.safetensors"
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["1.safetensors", "run.json"]


def test_the_runs_of_a_manifest_are_known_by_what_is_kept_the_last_one_last(tmp_path: Path) -> None:
    memory, other = (SiteMemory(tmp_path, "a", manifest=m) for m in (MANIFEST, "sha256:8"))
    assert memory.runs() == []
    for number, run in enumerate(("r2", "r1", "r3")):
        memory.write(run, 1, one(1.0))
        (file,) = tmp_path.rglob("*.safetensors") if number == 0 else [newest(tmp_path)]
        os.utime(file, ns=(number, number))
    other.write("r4", 1, one(1.0))
    assert memory.runs() == ["r2", "r1", "r3"]
    assert other.runs() == ["r4"]
    assert SiteMemory(tmp_path, "b", manifest=MANIFEST).runs() == []


def newest(folder: Path) -> Path:
    return max(folder.rglob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)


def test_a_broken_file_is_told_and_its_path_is_not(tmp_path: Path) -> None:
    memory = SiteMemory(tmp_path, "a", manifest=MANIFEST)
    memory.write(RUN, 1, one(1.0))
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(DataRefused, match=r"1\.safetensors .* cannot be read; restore it") as told:
        memory.before(RUN, 2)
    assert str(tmp_path) not in str(told.value)


def test_a_disk_that_refuses_is_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "memory").write_text("a file where the folder should be")
    with pytest.raises(Refused, match=r"cannot be written: .*; free space"):
        SiteMemory(tmp_path / "memory", "a", manifest=MANIFEST).write(RUN, 1, one(1.0))
