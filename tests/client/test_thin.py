"""Thin: a letter goes to the worker and its answer comes back, whatever dies in between."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc  # type: ignore[import-untyped]
import pytest

from intramural.client.frames import METHOD, frames_of
from intramural.client.thin import AWAY, ask, is_serving
from intramural.client.worker import address_of
from intramural.core.errors import ConfigError, WireError
from intramural.core.letter import HEADER_BYTES_MAX, Letter, read_reply
from intramural.core.messages import Refusal
from tests.client.workers import ROOT, Process, begin, echoing, end, ready

HEAVY = {"torch", "transformers", "peft", "opacus", "dp_accounting", "ray", "pandas", "pyarrow"}
LETTER = Letter(header='{"kind":"é"}', vector=bytes(range(256)), seal="the seal")
BIG_BYTES = 90_000_000
IMPORT_S = 1.0
"""Far above the measured 0.1 s, for machines that do other things too."""


def socket_in(folder: Path) -> Path:
    (folder / "s").mkdir(mode=0o700)
    return folder / "s" / "w.sock"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "worker.log"


@pytest.fixture
def echo(tmp_path: Path, log: Path) -> Iterator[tuple[Process, str]]:
    with echoing(socket_in(tmp_path), log=log) as started:
        yield started


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, str]]:
    """Return a worker that no test ends, and its address."""
    folder = tmp_path_factory.mktemp("shared")
    with echoing(socket_in(folder), log=folder / "worker.log") as started:
        yield started


@pytest.fixture
def aside() -> Iterator[Callable[..., Future[Letter]]]:
    """Return what asks in a thread of its own."""
    with ThreadPoolExecutor(4) as threads:

        def asking(address: str, manifest: str = "", *, wait_s: float = 20.0) -> Future[Letter]:
            return threads.submit(ask, address, manifest, LETTER, wait_s=wait_s)

        yield asking


def is_away(answer: Letter) -> bool:
    """Return whether an answer is the refusal that stands for one."""
    assert answer.seal is None
    reply = read_reply(answer, answers=LETTER.digest)
    return isinstance(reply, Refusal) and reply.reason == AWAY


def peak_bytes(pid: int | str) -> int:
    """Return the most memory that a process ever held."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measured(code: str, folder: Path) -> dict[str, object]:
    """Run code in a fresh interpreter; return what it prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("module", ["intramural.client.app", "intramural.client.thin"])
def test_the_process_that_flower_starts_loads_nothing_heavy_and_quickly(
    module: str, tmp_path: Path
) -> None:
    code = (
        "import json, sys, time\nimport flwr.app, flwr.clientapp\n"
        "before, started = set(sys.modules), time.perf_counter()\n"
        f"import {module}\n"
        "seconds, new = time.perf_counter() - started, set(sys.modules) - before\n"
        "print(json.dumps({'seconds': seconds, 'all': sorted(sys.modules), 'new': sorted(new)}))"
    )
    found = measured(code, tmp_path)
    assert not HEAVY & set(found["all"])  # type: ignore[call-overload]
    assert "numpy" not in found["new"]  # type: ignore[operator]
    assert f"{module}" in found["new"]  # type: ignore[operator]
    assert found["seconds"] < IMPORT_S  # type: ignore[operator]


def test_a_letter_goes_to_the_worker_and_back_unread(shared: tuple[Process, str]) -> None:
    _, address = shared
    assert ask(address, "", LETTER) == LETTER
    alone = Letter(header="no JSON at all")
    assert ask(address, "", alone) == alone


def test_ninety_megabytes_go_both_ways_in_bounded_memory(
    shared: tuple[Process, str],
) -> None:
    process, address = shared
    code = (
        "import json, os, sys\nimport flwr.app\n"
        "from intramural.client.thin import ask\nfrom intramural.core.letter import Letter\n"
        "from tests.client.test_thin import peak_bytes\n"
        f"question = Letter(header='h', vector=os.urandom({BIG_BYTES}))\n"
        "before = peak_bytes('self')\n"
        f"answer = ask({address!r}, '', question)\n"
        "assert answer == question\n"
        "print(json.dumps({'grown': peak_bytes('self') - before}))"
    )
    before = peak_bytes(process.pid)
    grown = measured(code, ROOT)["grown"]
    assert isinstance(grown, int)
    # one vector each, and what gRPC buffers: a second copy would not pass
    assert grown < 1.9 * BIG_BYTES
    assert peak_bytes(process.pid) - before < 1.9 * BIG_BYTES


@pytest.mark.parametrize("address", ["127.0.0.1:9", "dns:localhost:9", "", "unix-abstract:x"])
def test_nothing_but_a_unix_socket_is_dialled(address: str) -> None:
    with pytest.raises(ConfigError, match="not a unix: address"):
        ask(address, "", LETTER)


@pytest.mark.parametrize("is_stale", [False, True])
def test_a_worker_that_stays_away_is_a_refusal_in_time(tmp_path: Path, is_stale: bool) -> None:
    place = socket_in(tmp_path)
    if is_stale:
        process = begin(place, log=tmp_path / "log")
        ready(address_of(place))
        end(process)
        assert place.is_socket()
    started = time.monotonic()
    assert is_away(ask(address_of(place), "", LETTER, wait_s=0.5))
    assert 0.5 <= time.monotonic() - started < 5.0


def test_a_worker_that_comes_later_is_waited_for(
    tmp_path: Path, log: Path, aside: Callable[..., Future[Letter]]
) -> None:
    place = socket_in(tmp_path)
    answer = aside(address_of(place))
    time.sleep(0.5)
    with echoing(place, log=log):
        assert answer.result(20) == LETTER


def test_a_letter_whose_worker_is_killed_is_sent_again(
    tmp_path: Path, log: Path, aside: Callable[..., Future[Letter]]
) -> None:
    place = socket_in(tmp_path)
    with echoing(place, log=log) as (process, address):
        answer = aside(address, "1.5")
        time.sleep(0.5)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    with echoing(place, log=log):
        assert answer.result(20) == LETTER


def test_a_letter_over_which_each_worker_dies_is_given_up(
    tmp_path: Path, log: Path, aside: Callable[..., Future[Letter]]
) -> None:
    place, died = socket_in(tmp_path), []
    answer = aside(address_of(place), "die")
    while not answer.done():
        process = begin(place, log=log)
        while process.poll() is None and not answer.done():
            time.sleep(0.02)
        died.append(process.poll())
        end(process)
    assert is_away(answer.result())
    assert died[:3] == [-signal.SIGKILL] * 3
    assert len(died) <= 4


def test_two_letters_at_once_are_answered_one_after_the_other(
    shared: tuple[Process, str], aside: Callable[..., Future[Letter]]
) -> None:
    _, address = shared
    started = time.monotonic()
    answers = [aside(address, "0.5") for _ in range(2)]
    time.sleep(0.2)
    assert is_serving(address)  # health does not wait for its turn
    assert [answer.result(20) for answer in answers] == [LETTER, LETTER]
    assert time.monotonic() - started >= 1.0


def test_a_worker_told_to_stop_finishes_its_answer(
    echo: tuple[Process, str], aside: Callable[..., Future[Letter]]
) -> None:
    process, address = echo
    answer = aside(address, "0.6", wait_s=0.1)
    time.sleep(0.3)
    process.terminate()
    assert answer.result(20) == LETTER
    assert process.wait(10) == 0


def test_a_worker_told_to_stop_abandons_what_takes_too_long(
    echo: tuple[Process, str], log: Path, aside: Callable[..., Future[Letter]]
) -> None:
    process, address = echo
    answer = aside(address, "60", wait_s=0.3)
    time.sleep(0.3)
    process.terminate()
    assert process.wait(10) == 0  # within its grace of 1 s
    assert is_away(answer.result(20))
    assert "abandoned" in log.read_text()
    assert not is_serving(address)


def test_a_worker_told_to_stop_finishes_also_what_nobody_waits_for(
    echo: tuple[Process, str], log: Path
) -> None:
    process, address = echo
    with grpc.insecure_channel(address) as channel:
        call = channel.stream_stream(METHOD)(frames_of(LETTER, manifest="0.8"))
        time.sleep(0.3)
        call.cancel()
    process.terminate()
    assert process.wait(10) == 0
    assert "abandoned" not in log.read_text()


def test_a_part_that_is_too_long_is_not_sent(shared: tuple[Process, str]) -> None:
    with pytest.raises(WireError, match="header of"):
        ask(shared[1], "", Letter(header="x" * (HEADER_BYTES_MAX + 1)))


def test_what_breaks_in_the_worker_is_told_by_its_kind_alone(
    echo: tuple[Process, str], log: Path
) -> None:
    secret = Letter(header="CANARY-7f3a9c")
    with pytest.raises(WireError, match=r"failed \(INTERNAL\)") as caught:
        ask(echo[1], "break", secret)
    assert "CANARY" not in str(caught.value)
    assert "RuntimeError" in log.read_text()
    assert "CANARY" not in log.read_text()
    assert ask(echo[1], "", LETTER) == LETTER  # and it goes on


def test_no_thread_or_descriptor_is_left_behind(shared: tuple[Process, str]) -> None:
    ask(shared[1], "", LETTER)
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(40):
        ask(shared[1], "", LETTER)
    after = threading.active_count(), len(os.listdir("/proc/self/fd"))
    # What a letter leaves would be here 40 times; gRPC itself opens a few more when it pleases.
    assert after[0] <= before[0] + 20
    assert after[1] <= before[1] + 20
