"""Room for an answer: a site whose disk could not store it says so before it trains or charges."""

import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from intramural.client.desk import Desk, open_desk
from intramural.client.replies import SLACK_BYTES, ReplyStore
from intramural.core.errors import JournalError
from intramural.core.letter import Letter
from intramural.core.messages import Refusal, Reply, Update, Welcome
from intramural.core.site import load_site
from intramural.privacy.book import read_book
from tests.client.member import PRIVATE, Member, member


class FreeBytes:
    """How much is free on every disk; None: what really is."""

    def __init__(self) -> None:
        self.told: int | None = None
        self.asked: set[Path] = set()


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> FreeBytes:
    disk, real = FreeBytes(), shutil.disk_usage

    def usage(path: Path) -> object:
        disk.asked.add(Path(path))
        found = real(path)
        return found if disk.told is None else found._replace(free=disk.told)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    return disk


@pytest.fixture
def site(tmp_path: Path, bert: Path) -> Iterator[tuple[Member, Desk]]:
    of = member(tmp_path, bert, **PRIVATE)
    of.approve()
    with closing(open_desk(of.site_file)) as desk:
        yield of, desk


def asked(site: tuple[Member, Desk], question: Letter) -> Reply:
    of, desk = site
    return of.read(desk.answer(of.envelope, question), question)


def charges(of: Member) -> int:
    file = load_site(of.site_file).ledger_file
    return len(read_book(file).charges) if file.exists() else 0


def test_a_greeting_is_refused_by_a_byte_less_than_a_vector_and_the_slack(
    site: tuple[Member, Desk], free: FreeBytes
) -> None:
    of, _ = site
    needed = 4 * of.layout.size + (1 << 24)  # float32s, and 16 MiB
    free.told = needed - 1
    found = asked(site, of.hello())
    assert isinstance(found, Refusal)
    # it is told of the folder's own name and of a public size, rounded up to whole MiB
    assert (found.reason, found.detail) == (
        "journal",
        "replies: no room to store an answer, which takes up to "
        f"{needed // (1 << 20) + 1} MiB; free space",
    )
    free.told = needed
    assert isinstance(asked(site, of.hello()), Welcome)
    assert free.asked == {of.state / "replies"}


def test_a_disk_that_filled_after_the_greeting_costs_no_charge(
    site: tuple[Member, Desk], free: FreeBytes
) -> None:
    of, _ = site
    assert isinstance(asked(site, of.hello()), Welcome)
    free.told = 4 * of.layout.size
    found = asked(site, of.train())
    assert isinstance(found, Refusal)
    assert (found.reason, charges(of)) == ("journal", 0)
    free.told = None
    assert isinstance(asked(site, of.train()), Update)
    assert charges(of) == 1


def test_a_stored_answer_is_sent_again_from_a_full_disk(
    site: tuple[Member, Desk], free: FreeBytes
) -> None:
    of, desk = site
    question = of.train()
    answer = desk.answer(of.envelope, question)
    free.told = 0
    assert desk.answer(of.envelope, question) == answer


def test_a_manifest_that_a_policy_refuses_is_refused_for_that_and_not_for_the_disk(
    tmp_path: Path, bert: Path, free: FreeBytes
) -> None:
    sections = PRIVATE | {"site_sections": {"policy": {"exchange": ["head"]}}}
    of = member(tmp_path, bert, **sections)
    of.approve()
    free.told = 0
    with closing(open_desk(of.site_file)) as desk:
        found = asked((of, desk), of.hello())
    assert isinstance(found, Refusal)
    assert found.reason == "refused"


@pytest.mark.parametrize("vector_bytes", [0, 1, 1 << 30])
def test_the_room_grows_with_the_vector(tmp_path: Path, free: FreeBytes, vector_bytes: int) -> None:
    store = ReplyStore(tmp_path / "replies")
    free.told = vector_bytes + SLACK_BYTES
    store.check_room(vector_bytes)
    free.told -= 1
    with pytest.raises(JournalError, match="free space"):
        store.check_room(vector_bytes)


def test_a_folder_that_is_gone_is_no_room(tmp_path: Path) -> None:
    store = ReplyStore(tmp_path / "replies")
    (tmp_path / "replies").rmdir()
    with pytest.raises(JournalError, match="No such file or directory; restore it"):
        store.check_room(0)


def test_what_an_unprivileged_user_cannot_have_is_not_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(tmp_path)
    fields = {name: getattr(real, name) for name in dir(real) if name.startswith("f_")}
    stat = type("Reserved", (), fields | {"f_bavail": 0, "f_bfree": 1 << 40})
    monkeypatch.setattr(os, "statvfs", lambda _: stat)
    with pytest.raises(JournalError, match="no room"):
        ReplyStore(tmp_path / "replies").check_room(0)
