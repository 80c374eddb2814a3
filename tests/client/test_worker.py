"""Worker: one a site, on a socket of its own; killed anywhere, it answers the same letter again."""

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import psutil
import pytest

from intramural.client.frames import FRAME_BYTES_MAX, METHOD, frames_of, read_letter
from intramural.client.thin import ask
from intramural.client.worker import (
    SOCKET_PATH_BYTES_MAX,
    WorkerSettings,
    address_of,
    main,
    serve,
    socket_file,
)
from intramural.core.errors import ConfigError
from intramural.core.files import exclusive
from intramural.core.letter import Letter
from intramural.core.messages import Evaluated, Refusal, Update, Welcome
from intramural.core.site import load_site
from intramural.privacy.book import read_book
from tests.client.member import PRIVATE, Echo, Member, member
from tests.client.test_frames import opening
from tests.client.workers import Nursery, Process, echoing, end, ready
from tests.tiny import rows

CANARY = "CANARY-7f3a9c"
WORDS = Letter(header="question", vector=bytes(8), seal="s")


def marked(folder: Path, base: Path, **sections: Any) -> Member:
    """Return a site of marked records whose people approved the manifest."""
    records = [row | {"title": f"{CANARY} {row['title']}"} for row in rows()[:60]]
    of = member(folder, base, records=records, **sections)
    of.approve()
    return of


@pytest.fixture(scope="module")
def nursery(bert: Path) -> Iterator[Nursery]:
    opened = Nursery(bert)
    yield opened
    opened.close()


def charges(of: Member) -> int:
    return len(read_book(load_site(of.site_file).ledger_file).charges)


def tells_nothing(of: Member, log: Path) -> bool:
    """Return whether no file but the records holds a record's text."""
    home = of.site_file.parent
    written = [path for path in home.rglob("*") if path.is_file() and path.name != "records.jsonl"]
    return not [p for p in [log, *written] if CANARY.lower() in p.read_text("latin-1").lower()]


@pytest.mark.parametrize(
    ("point", "charged", "kinds"),
    [
        ("charged", 2, ["trained", "sent"]),
        ("trained", 2, ["trained", "trained", "sent"]),
        ("stored", 1, ["trained", "resent"]),
        ("sent", 1, ["trained", "sent", "resent"]),
    ],
)
def test_a_worker_killed_over_a_letter_answers_it_when_it_is_back(
    tmp_path: Path,
    bert: Path,
    nursery: Nursery,
    point: str,
    charged: int,
    kinds: list[str],
) -> None:
    of, log = marked(tmp_path, bert, **PRIVATE), tmp_path / "worker.log"
    question = of.train()
    address = address_of(socket_file(of.site_file))
    with ThreadPoolExecutor(1) as threads:
        answering = threads.submit(ask, address, of.envelope, question)
        assert nursery.ended(nursery.begin(point, of.site_file, log=log)) == -signal.SIGKILL
        second = nursery.begin("never", of.site_file, log=log)
        answer = answering.result(60)
        assert ask(address, of.envelope, question) == answer
    os.kill(second, signal.SIGTERM)
    assert nursery.ended(second) == 0
    update = of.read(answer, question)
    assert isinstance(update, Update)
    assert update.ledger_entries == len(read_book(load_site(of.site_file).ledger_file).entries)
    assert charges(of) == charged
    assert of.kinds() == [*kinds, "resent"]
    assert tells_nothing(of, log)


def test_a_member_s_worker_as_its_supervisor_starts_it(tmp_path: Path, bert: Path) -> None:
    of, log = marked(tmp_path, bert), tmp_path / "worker.log"
    command = [sys.executable, "-m", "intramural.client.worker", "--site", str(of.site_file)]
    with open(log, "wb") as output:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output)
    try:
        address = address_of(socket_file(of.site_file))
        ready(address)
        assert isinstance(of.read(ask(address, of.envelope, of.hello())), Welcome)
        asked = [of.train(), of.evaluation()]
        with ThreadPoolExecutor(2) as threads:
            answers = list(threads.map(lambda letter: ask(address, of.envelope, letter), asked))
        read = [of.read(answer, letter) for answer, letter in zip(answers, asked, strict=True)]
        assert [type(reply) for reply in read] == [Update, Evaluated]
        wrong = of.read(ask(address, of.envelope, Letter(header=asked[0].header, seal="x")))
        assert isinstance(wrong, Refusal)
        assert wrong.reason == "trust"
        assert psutil.Process(process.pid).net_connections(kind="inet") == []
        second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (second.returncode, "another worker of this site runs" in second.stderr) == (2, True)
        process.terminate()
        assert process.wait(20) == 0
    finally:
        end(process)
    assert not socket_file(of.site_file).exists()
    assert tells_nothing(of, log)
    assert "listens" in log.read_text()


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, str]]:
    folder = tmp_path_factory.mktemp("echo")
    (folder / "s").mkdir(mode=0o700)
    with echoing(folder / "s" / "w.sock", log=folder / "log", read_s=0.5) as started:
        yield started


def sent(address: str, frames: Iterable[bytes]) -> Letter:
    """Send frames as they are; return what the worker answers."""
    with grpc.insecure_channel(address) as channel:
        call = channel.stream_stream(METHOD)(iter(frames))
        return read_letter(call, vector_bytes_max=0)


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([], "not JSON"),
        ([b"garbage"], "not JSON"),
        ([os.urandom(1000)], "not JSON"),
        ([b"{}"], "other keys"),
        ([opening(vector_bytes=(100 << 20) + 4)], "over the site's 104857600"),
        ([opening(vector_bytes=1 << 50)], "over the site's"),
        ([opening(), bytes(4)], "ends after 4 of 8"),
        ([opening(), bytes(12)], "more than the 8"),
        ([opening(seal="x" * 5000)], "seal of 5000 bytes"),
    ],
)
def test_what_is_no_letter_is_refused_and_the_next_one_answered(
    echo: tuple[Process, str], frames: list[bytes], words: str
) -> None:
    _, address = echo
    refused = sent(address, frames)
    assert words in refused.header
    read = len(frames) == 2 or "seal" in words
    known = Letter(header="{}").digest if len(frames) == 2 else None
    assert refused.seal == known, read  # named where the header was read
    assert ask(address, "", WORDS) == WORDS


def test_a_frame_over_four_mebibytes_does_not_pass(echo: tuple[Process, str]) -> None:
    _, address = echo
    with pytest.raises(grpc.RpcError) as caught:
        sent(address, [bytes(FRAME_BYTES_MAX + 1)])
    assert caught.value.code() in (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.CANCELLED,
    )
    assert ask(address, "", WORDS) == WORDS


def test_a_sender_that_stops_in_the_middle_holds_nobody_up_for_long(
    echo: tuple[Process, str],
) -> None:
    _, address = echo
    stopped = threading.Event()

    def halting() -> Iterator[bytes]:
        yield next(frames_of(WORDS))
        stopped.wait(20)

    with grpc.insecure_channel(address) as channel:
        call = channel.stream_stream(METHOD)(halting())
        time.sleep(0.2)
        assert ask(address, "", WORDS) == WORDS  # once the halting one was cut off, after 0.5 s
        with pytest.raises(grpc.RpcError):
            next(call)
        stopped.set()


def test_another_method_is_not_there(echo: tuple[Process, str]) -> None:
    with grpc.insecure_channel(echo[1]) as channel:
        call = channel.stream_stream("/intramural.Worker/Records")(iter([b""]))
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_the_socket_is_its_owners_alone(echo: tuple[Process, str]) -> None:
    process, address = echo
    place = Path(address.removeprefix("unix:"))
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700
    assert psutil.Process(process.pid).net_connections(kind="inet") == []


def settings(place: Path, **changes: Any) -> WorkerSettings:
    fields: dict[str, Any] = {
        "socket": place,
        "lock": place.parent.parent / "worker.lock",
        "vector_bytes_max": 100,
    }
    return WorkerSettings(**(fields | changes))


def served(of: WorkerSettings) -> None:
    """Serve and stop at once."""
    stop = threading.Event()
    stop.set()
    serve(of, lambda: nullcontext(Echo()), stop=stop)


def test_a_socket_s_folder_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    served(settings(tmp_path / "s" / "w.sock"))
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o700
    assert list((tmp_path / "s").iterdir()) == []


def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match=r"run `chmod 700 .*/s`"):
        served(settings(tmp_path / "s" / "w.sock"))


@pytest.mark.parametrize("more", [0, 1])
def test_a_path_that_is_too_long_is_refused_by_name(tmp_path: Path, more: int) -> None:
    name = "é" + "x" * (SOCKET_PATH_BYTES_MAX - len(os.fsencode(tmp_path)) - len("/s/") - 2 + more)
    place = settings(tmp_path / "s" / name)
    if more:
        with pytest.raises(ConfigError, match="this one has 108; move the site's"):
            served(place)
    else:
        served(place)


def test_odd_characters_in_a_path_are_no_matter(tmp_path: Path) -> None:
    place, stop = tmp_path / "s" / "a b%20#?.sock", threading.Event()
    with ThreadPoolExecutor(1) as threads:
        done = threads.submit(serve, settings(place), lambda: nullcontext(Echo()), stop=stop)
        answer = ask(address_of(place), "", WORDS, wait_s=10.0)
        stop.set()
        done.result(10)
    assert answer == WORDS


def test_what_is_no_socket_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir(mode=0o700)
    place = tmp_path / "s" / "w.sock"
    place.write_text("mine")
    with pytest.raises(ConfigError, match="is no socket; move it away"):
        served(settings(place))
    assert place.read_text() == "mine"


def test_a_dead_worker_s_socket_is_replaced_and_a_living_one_s_is_not(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir(mode=0o700)
    place = tmp_path / "s" / "w.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(place))
        other.listen()
        with pytest.raises(ConfigError, match="another process listens there"):
            served(settings(place))
    assert place.is_socket()
    served(settings(place))
    assert not place.exists()


def test_a_second_worker_of_a_site_is_refused(tmp_path: Path) -> None:
    place = settings(tmp_path / "s" / "w.sock")
    with exclusive(place.lock), pytest.raises(ConfigError, match="another worker of this site"):
        served(place)


def test_what_is_wrong_with_a_site_is_one_line_and_an_exit_code(
    tmp_path: Path, bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--site", str(tmp_path / "none.toml")]) == 2
    of = member(tmp_path, bert)
    (of.site_file.parent / "trust" / "kit.json").unlink()
    assert main(["--site", str(of.site_file)]) == 3
    told = capsys.readouterr().err.splitlines()
    assert [line.startswith("intramural: ") for line in told] == [True, True]
    assert "kit.json" in told[1]
