"""Checkpoints: two generations, whole or passed over."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intramural.core.errors import CheckpointError
from intramural.core.journal import Journal
from intramural.server import checkpoint as under_test
from intramural.server.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

DIGEST = "sha256:" + "a" * 64


def made(round_: int) -> Checkpoint:
    return Checkpoint(
        round=round_,
        manifest=DIGEST,
        layout=DIGEST,
        vector=np.full(100, round_, dtype=np.float32),
        state={"velocity": np.arange(3, dtype=np.float32), "seen": np.array([round_])},
        history=[{"round": n, "metrics": {"accuracy": 0.1 * n}} for n in range(1, round_ + 1)],
    )


def same(one: Checkpoint | None, other: Checkpoint) -> bool:
    assert one is not None
    assert {n: a.tobytes() for n, a in one.state.items()} == {
        n: a.tobytes() for n, a in other.state.items()
    }
    facts = ("round", "manifest", "layout", "history")
    return one.vector.tobytes() == other.vector.tobytes() and all(
        getattr(one, fact) == getattr(other, fact) for fact in facts
    )


def saved(folder: Path, rounds: int) -> Path:
    for number in range(1, rounds + 1):
        save_checkpoint(folder, made(number))
    return folder


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    found, problems = load_checkpoint(saved(tmp_path, 3))
    assert same(found, made(3))
    assert problems == []


def test_two_generations_stand_beside_the_one_that_is_written(tmp_path: Path) -> None:
    names = sorted(path.name for path in saved(tmp_path, 5).glob("round-*"))
    assert names == [f"round-00000{n}.{end}" for n in (3, 4, 5) for end in ("json", "safetensors")]


def test_an_empty_folder_holds_no_checkpoint(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "nowhere") == (None, [])


@pytest.mark.parametrize("end", ["json", "safetensors"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_harmed_generation_is_passed_over_and_told(tmp_path: Path, end: str, harm: str) -> None:
    path = saved(tmp_path, 2) / f"round-000002.{end}"
    whole = path.read_bytes()
    for place in sorted({0, 1, 7, 8, len(whole) // 3, len(whole) // 2, len(whole) - 2}):
        if harm == "flip":
            harmed = bytearray(whole)
            harmed[place] ^= 1
            path.write_bytes(bytes(harmed))
        elif harm == "cut":
            path.write_bytes(whole[:place])
        else:
            path.unlink(missing_ok=True)
        found, problems = load_checkpoint(tmp_path)
        assert same(found, made(1))
        if (end, harm) == ("json", "remove"):
            assert problems == []  # without its facts a generation was never there
        else:
            assert len(problems) == 1
            assert "round-000002.json" in problems[0]
    path.write_bytes(whole)
    assert same(load_checkpoint(tmp_path)[0], made(2))


def test_every_flipped_bit_of_the_facts_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path, 2) / "round-000002.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        harmed = bytearray(whole)
        harmed[place] ^= 1 << (place % 8)
        path.write_bytes(bytes(harmed))
        found, _ = load_checkpoint(tmp_path)
        # white space between JSON's tokens says nothing; anything else falls back
        assert same(found, made(1)) or same(found, made(2))


@pytest.mark.parametrize("content", [b"[]", b"3", b"null", b"{}", b'{"digest": 1}', b"\xff"])
def test_facts_of_another_kind_are_passed_over(tmp_path: Path, content: bytes) -> None:
    (saved(tmp_path, 2) / "round-000002.json").write_bytes(content)
    assert same(load_checkpoint(tmp_path)[0], made(1))


def test_when_no_generation_is_whole_loading_says_what_to_do(tmp_path: Path) -> None:
    for path in saved(tmp_path, 2).glob("*.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole .*start again in a new"):
        load_checkpoint(tmp_path)


def test_a_crash_between_arrays_and_facts_leaves_the_generation_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    saved(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(under_test, "write_atomic", crash)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, made(3))
    assert same(load_checkpoint(tmp_path)[0], made(2))
    save_checkpoint(tmp_path, made(3))
    assert same(load_checkpoint(tmp_path)[0], made(3))


def test_a_crash_that_leaves_new_arrays_under_old_facts_falls_back(tmp_path: Path) -> None:
    # A round is saved again after its checkpoint was found harmed: the arrays are replaced first.
    saved(tmp_path / "a", 2)
    other = made(2).vector + 1
    save_checkpoint(tmp_path / "b", Checkpoint(**(vars(made(2)) | {"vector": other})))
    name = "round-000002.safetensors"
    (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    assert same(load_checkpoint(tmp_path / "a")[0], made(1))


@pytest.mark.parametrize("place", ["save_file", "write_atomic", "write_history"])
def test_a_full_disk_leaves_the_generation_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def full(*arguments: Any, **_: object) -> None:
        partial = next((a for a in arguments if isinstance(a, Path)), None)
        if place == "save_file" and partial is not None:
            partial.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    saved(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(under_test, place, full)
        with pytest.raises(CheckpointError, match="No space left on device; free space there"):
            save_checkpoint(tmp_path, made(3))
    assert same(load_checkpoint(tmp_path)[0], made(2))
    assert list(tmp_path.glob("*.partial")) == []


def test_what_a_killed_run_left_half_written_is_cleared(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / "round-000002.4242.partial").write_bytes(b"half")
    save_checkpoint(tmp_path, made(2))
    assert list(tmp_path.glob("*.partial")) == []


def sizes(folder: Path, round_: int) -> tuple[int, int]:
    """Return the bytes of a generation's facts, and of the history."""
    facts = folder / f"round-{round_:06d}.json"
    return facts.stat().st_size, (folder / "history.jsonl").stat().st_size


def test_a_late_commit_writes_no_more_than_an_early_one(tmp_path: Path) -> None:
    saved(tmp_path, 11)
    facts, history = sizes(tmp_path, 11)
    for round_ in range(12, 91):
        save_checkpoint(tmp_path, made(round_))
    later_facts, later_history = sizes(tmp_path, 90)
    assert later_facts <= facts + 3  # the history's length has a digit or two more
    lines = (tmp_path / "history.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 90
    assert later_history - history == sum(map(len, lines[11:]))
    assert same(load_checkpoint(tmp_path)[0], made(90))


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_harmed_last_record_falls_back_and_a_harmed_first_one_is_told(
    tmp_path: Path, harm: str
) -> None:
    path = saved(tmp_path, 3) / "history.jsonl"
    whole = path.read_bytes()
    last, place = whole.rindex(b"{"), whole.rindex(b"}")
    harmed = {"flip": whole[:place] + b"!" + whole[place + 1 :], "cut": whole[:place]}
    if harm != "remove":
        path.write_bytes(harmed[harm])
        found, problems = load_checkpoint(tmp_path)
        assert same(found, made(2))
        assert len(problems) == 1
    path.write_bytes(b"#" + whole[1:] if harm == "flip" else whole[last:])
    if harm == "remove":
        path.unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        load_checkpoint(tmp_path)
    path.write_bytes(whole)
    assert same(load_checkpoint(tmp_path)[0], made(3))


def test_records_that_no_checkpoint_vouches_for_are_nobodys(tmp_path: Path) -> None:
    path = saved(tmp_path, 2) / "history.jsonl"
    path.write_bytes(
        path.read_bytes() + b'{"round": 3, "metr'
    )  # the disk was full, or the power cut
    assert same(load_checkpoint(tmp_path)[0], made(2))
    save_checkpoint(tmp_path, made(3))
    assert same(load_checkpoint(tmp_path)[0], made(3))


@pytest.mark.parametrize("place", ["write_history", "save_file", "write_atomic"])
def test_a_crash_of_a_run_that_fell_back_leaves_what_it_fell_back_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (saved(tmp_path, 4) / "round-000004.safetensors").write_bytes(b"")
    (tmp_path / "round-000003.safetensors").write_bytes(b"")
    monkeypatch.setattr(under_test, place, crash)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, replace(made(3), vector=made(3).vector + 1))
    assert same(load_checkpoint(tmp_path)[0], made(2))


def test_a_run_that_fell_back_writes_its_own_records_over_those_it_gave_up(tmp_path: Path) -> None:
    (saved(tmp_path, 4) / "round-000004.safetensors").write_bytes(b"")
    (tmp_path / "round-000003.safetensors").write_bytes(b"")
    assert same(load_checkpoint(tmp_path)[0], made(2))
    for round_ in (3, 4):
        told = [{"round": n, "again": True} for n in range(3, round_ + 1)]
        again = replace(made(round_), history=[*made(2).history, *told])
        save_checkpoint(tmp_path, again)
        assert same(load_checkpoint(tmp_path)[0], again)


@pytest.mark.parametrize("harm", ["first", "last", "gone"])
def test_where_the_history_is_harmed_the_journal_tells_it(tmp_path: Path, harm: str) -> None:
    folder = tmp_path / "checkpoints"
    journal = Journal(tmp_path / "journal.jsonl")
    for round_ in (1, 2, 3, 4):
        if round_ == 4:  # round 3 was found harmed, and is committed again
            journal.append("resumed", round=2)
        number = min(round_, 3)
        save_checkpoint(folder, made(number))
        told = {"round": number, "other": 1} if round_ == 3 else made(number).history[-1]
        journal.append("committed", digest=DIGEST, **told)
    journal.close()
    path = folder / "history.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"#" + whole[1:] if harm == "first" else whole[:-1] + b"#")
    if harm == "gone":
        path.unlink()
    found, problems = load_checkpoint(folder)
    assert same(found, made(3))
    assert problems == []
    save_checkpoint(folder, made(4))
    (tmp_path / "journal.jsonl").unlink()
    if harm != "first":  # which nobody sees until it is read
        assert same(load_checkpoint(folder)[0], made(4))


@pytest.mark.parametrize("content", [None, b"", b'{"metrics":', b"#" * 10**4])
def test_a_history_that_was_harmed_while_the_run_went_on_is_written_again(
    tmp_path: Path, content: bytes | None
) -> None:
    path = saved(tmp_path, 3) / "history.jsonl"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    save_checkpoint(tmp_path, made(4))
    assert same(load_checkpoint(tmp_path)[0], made(4))


def test_the_history_of_another_run_is_not_carried_on(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    other = replace(made(4), history=[{"round": n, "other": n} for n in range(1, 5)])
    save_checkpoint(tmp_path, other)
    assert same(load_checkpoint(tmp_path)[0], other)
