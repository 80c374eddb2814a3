"""ReplyStore: the same bytes or nothing, for the last rounds, in files of the owner alone."""

import stat
from pathlib import Path

import pytest

from intramural.client.replies import ReplyStore, Slot, Unreadable
from intramural.core.errors import JournalError
from intramural.core.letter import Letter

M = "sha256:" + "ab" * 32
VECTOR = bytes(range(256)) * 4


def question(round_: int = 1, *, run: str = "r", vector: bytes | None = b"\0\0\0\0") -> Letter:
    return Letter(header=f'{{"round":{round_},"run":"{run}"}}', vector=vector, seal="any")


def answer(word: str = "é", *, vector: bytes | None = VECTOR, seal: str | None = "s") -> Letter:
    return Letter(header=f'{{"word":"{word}"}}', vector=vector, seal=seal)


def keep(store: ReplyStore, round_: int, *, run: str = "r", of: Letter | None = None) -> Letter:
    asked, reply = of or question(round_, run=run), answer(f"{run}{round_}")
    store.keep(Slot.of(asked, manifest=M, run=run, round_=round_), reply)
    return reply


def found(store: ReplyStore, asked: Letter, *, manifest: str = M) -> Letter | None:
    hit = store.find(asked, manifest=manifest)
    return None if hit is None else hit[1]


@pytest.mark.parametrize("vector", [VECTOR, b"", None])
@pytest.mark.parametrize("seal", ["s", None])
def test_an_answer_comes_back_to_the_bit_also_after_a_restart(
    tmp_path: Path, vector: bytes | None, seal: str | None
) -> None:
    reply = answer(vector=vector, seal=seal)
    slot = Slot.of(question(), manifest=M, run="r", round_=1)
    ReplyStore(tmp_path / "replies").keep(slot, reply)
    assert ReplyStore(tmp_path / "replies").find(question(), manifest=M) == (slot, reply)


def test_only_the_very_letter_under_the_very_manifest_finds_it(tmp_path: Path) -> None:
    store = ReplyStore(tmp_path / "replies")
    reply = keep(store, 1)
    assert found(store, Letter(header=question().header, vector=b"\0\0\0\0", seal=None)) == reply
    assert found(store, question(2)) is None
    assert found(store, question(vector=b"\0\0\0\1")) is None
    assert found(store, question(vector=b"")) is None
    assert found(store, question(vector=None)) is None
    assert found(store, question(), manifest="sha256:" + "cd" * 32) is None


def test_the_last_two_rounds_of_a_run_are_kept(tmp_path: Path) -> None:
    store = ReplyStore(tmp_path / "replies")
    evaluation = question(3, vector=b"\1\1\1\1")
    for round_ in (1, 2, 3):
        keep(store, round_)
    keep(store, 3, of=evaluation)
    keep(store, 1, run="another")
    held = [found(store, question(round_)) is not None for round_ in (1, 2, 3)]
    assert held == [False, True, True]
    assert found(store, evaluation) is not None
    assert found(store, question(1, run="another")) is not None
    assert len(list((tmp_path / "replies").iterdir())) == 4  # nothing else is left


def test_the_last_four_runs_are_kept(tmp_path: Path) -> None:
    store = ReplyStore(tmp_path / "replies")
    for run in "abcd":
        keep(store, 1, run=run)
    keep(store, 2, run="a")  # the first one lives on
    keep(store, 1, run="e")
    held = [run for run in "abcde" if found(store, question(1, run=run)) is not None]
    assert held == ["a", "c", "d", "e"]


@pytest.mark.parametrize("at", [0, 63, 64, 65, 70, -1025, -1024, -1])
def test_a_changed_byte_is_found_and_the_answer_is_gone(tmp_path: Path, at: int) -> None:
    store = ReplyStore(tmp_path / "replies")
    keep(store, 1)
    (path,) = (tmp_path / "replies").iterdir()
    content = bytearray(path.read_bytes())
    content[at] ^= 0x20
    path.write_bytes(content)
    with pytest.raises(Unreadable, match=path.name):
        store.find(question(), manifest=M)
    assert found(store, question()) is None


@pytest.mark.parametrize("size", [0, 1, 64, 65, 80, 1000])
def test_a_cut_file_is_found(tmp_path: Path, size: int) -> None:
    store = ReplyStore(tmp_path / "replies")
    keep(store, 1)
    (path,) = (tmp_path / "replies").iterdir()
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(Unreadable):
        store.find(question(), manifest=M)


def test_files_and_folder_are_their_owners_alone(tmp_path: Path) -> None:
    store = ReplyStore(tmp_path / "replies")
    keep(store, 1)
    (path,) = (tmp_path / "replies").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "replies").stat().st_mode) == 0o700


def test_what_a_crash_left_half_written_is_swept(tmp_path: Path) -> None:
    store = ReplyStore(tmp_path / "replies")
    keep(store, 1)
    (tmp_path / "replies" / ".x.letter.partial").write_bytes(b"half")
    assert found(ReplyStore(tmp_path / "replies"), question()) is not None
    assert len(list((tmp_path / "replies").iterdir())) == 1


def test_a_full_disk_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ReplyStore(tmp_path / "replies")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(JournalError, match="No space left on device; free space"):
            keep(store, 1)
    assert not list((tmp_path / "replies").iterdir())
