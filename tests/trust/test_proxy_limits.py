"""What one peer may use of a proxy: time, memory, connections, requests; and no more."""

import hashlib
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from tests.trust.lines import (
    AGAIN,
    GOOD,
    HEAD,
    PATH,
    PROTOBUF,
    PULL,
    PUSH,
    Doorman,
    FakeUpstream,
    answering,
    client,
    connect,
    exchange,
    gated,
    held_back,
    status_of,
    wait_for,
)
from tests.trust.pki import Authority


def closed_after_s(port: int, first: bytes, drop: bytes) -> tuple[float, bytes]:
    """Send slowly until the gate closes; return when it did, and what it said."""
    began, answer = time.monotonic(), b""
    with connect(port) as peer:
        peer.settimeout(0.02)
        with suppress(ConnectionError):
            peer.sendall(first)
            time.sleep(0.1)
            while time.monotonic() < began + 5:
                if drop:
                    peer.sendall(drop)
                with suppress(TimeoutError):
                    if not (piece := peer.recv(1000)):
                        break
                    answer += piece
    return time.monotonic() - began, answer


@pytest.mark.parametrize(
    ("first", "drop", "status"),
    [
        ("", "", None),  # a connection without a word
        (f"POST {PATH} HTTP/1.1\r\n", "a", 408),  # a head that never ends
        (f"POST {PUSH} HTTP/1.1\r\n{HEAD}Content-Length: 9999\r\n\r\n", "a", 408),
        (f"POST {PUSH} HTTP/1.1\r\n{HEAD}Content-Length: 9999\r\n\r\n", "", 408),
        (AGAIN, "", 200),  # no second request
        (AGAIN, "a", 200),  # a second head that never ends
    ],
)
def test_a_peer_that_stalls_is_cut(first: str, drop: str, status: int | None) -> None:
    app = FakeUpstream()
    waits = {"head_s_max": 0.3, "stall_s_max": 0.3, "idle_s_max": 2.0, "bytes_per_s_min": 1000}
    with gated(app, **waits) as (one, port):
        elapsed_s, answer = closed_after_s(port, first.encode(), drop.encode())
    limit_s = 2.0 if first == AGAIN and not drop else 0.3
    assert limit_s - 0.1 < elapsed_s < limit_s + 1.4  # a busy machine is late, and yet in time
    assert (status_of(answer) if answer else None) == status
    if status == 408:
        assert one.tally.refusals == {"too-slow": 1}


def test_a_peer_that_takes_no_answer_is_cut() -> None:
    app = FakeUpstream({PULL: answering(b"y" * (32 << 20))})
    with gated(app, stall_s_max=0.3) as (one, port), connect(port) as peer:
        peer.sendall(f"POST {PULL} HTTP/1.1\r\n{HEAD}\r\n".encode())
        wait_for(lambda: one.tally.refusals["too-slow"] == 1)
    assert one.tally.bytes_down < 32 << 20


def test_one_peers_requests_at_once_are_limited_and_anothers_are_not(tmp_path: Path) -> None:
    ca = Authority(tmp_path)
    a, b = ca.site("a"), ca.site("b")
    doorman, release = Doorman({a.digest: "a", b.digest: "b"}), threading.Event()
    app = FakeUpstream({PULL: held_back(release)})
    with (
        gated(app, papers=ca.server(), doorman=doorman, requests_at_once_max=2) as (one, port),
        client(port, a) as first,
        client(port, b) as second,
        ThreadPoolExecutor(4) as pool,
    ):
        waiting = [pool.submit(first.post, PULL, headers=PROTOBUF) for _ in range(2)]
        wait_for(lambda: len(app.seen) == 2)
        refused = first.post(PATH, headers=PROTOBUF)
        assert (refused.status_code, refused.text) == (503, "refused: busy\n")
        assert second.post(PATH, headers=PROTOBUF).status_code == 200
        release.set()
        assert [one.result().content for one in waiting] == [b"late"] * 2
        assert first.post(PATH, headers=PROTOBUF).status_code == 200
    assert one.counters.of("a").refusals == {"busy": 1}
    assert [call.peer for call in doorman.calls] == ["a", "a", "b", "a"]


def test_one_peers_requests_a_second_are_limited() -> None:
    limits = {"requests_burst": 5, "requests_per_s": 0.001}
    with gated(FakeUpstream(), **limits) as (one, port), client(port) as peer:
        statuses = [peer.post(PATH, headers=PROTOBUF).status_code for _ in range(7)]
        assert peer.get("/nothing").status_code == 503  # what is refused counts as well
    assert statuses == [200] * 5 + [503] * 2
    assert one.tally.refusals == {"rate": 3}


def test_one_peers_connections_are_limited() -> None:
    with gated(FakeUpstream(), connections_per_peer_max=2) as (one, port):
        with connect(port), connect(port):
            wait_for(lambda: len(one.gate._open) == 2)
            assert status_of(exchange(port, GOOD.encode())) == 503
        wait_for(lambda: not one.gate._open)
        assert status_of(exchange(port, GOOD.encode())) == 200
    assert one.tally.refusals == {"busy": 1}


def test_connections_of_all_peers_are_limited() -> None:
    with gated(FakeUpstream(), connections_max=2) as (one, port), connect(port), connect(port):
        wait_for(lambda: len(one.gate._open) == 2)
        assert exchange(port, GOOD.encode()) == b""


@contextmanager
def growth() -> Iterator[list[int]]:
    """Yield a list that fills, until the end, with how much memory the process has gained."""
    process, ended, grown = psutil.Process(), threading.Event(), [0]
    before = process.memory_info().rss

    def look() -> None:
        while not ended.wait(0.005):
            grown.append(process.memory_info().rss - before)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield grown
    finally:
        ended.set()
        thread.join()


def test_a_hundred_megabytes_pass_through_little_memory() -> None:
    size, piece = 100_000_000, os.urandom(100_000)
    coming = hashlib.sha256()

    async def pull(_: Request) -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(size // len(piece)):
                yield piece

        return StreamingResponse(pieces(), headers={"content-length": str(size)})

    app = FakeUpstream({PULL: pull})
    headers = PROTOBUF | {"content-length": str(size)}
    with gated(app, body_bytes_max=size) as (_, port), client(port) as peer, growth() as grown:
        content = (piece for _ in range(size // len(piece)))
        assert peer.post(PUSH, content=content, headers=headers).status_code == 200
        with peer.stream("POST", PULL, headers=PROTOBUF) as answer:
            for got in answer.iter_raw():
                coming.update(got)
    whole = hashlib.sha256()
    for _ in range(size // len(piece)):
        whole.update(piece)
    assert coming.hexdigest() == app.seen[0].sha256 == whole.hexdigest()
    assert len(grown) > 20
    assert max(grown) < 60 << 20


def test_a_peer_that_leaves_in_the_middle_leaves_nothing_behind() -> None:
    app = FakeUpstream()
    with gated(app) as (one, port):
        for _ in range(3):
            with connect(port) as peer:
                peer.sendall(f"POST {PUSH} HTTP/1.1\r\n{HEAD}Content-Length: 9\r\n\r\nab".encode())
        wait_for(lambda: one.tally.refusals["gone"] == 3)
        wait_for(lambda: not one.gate._open)
        assert status_of(exchange(port, GOOD.encode())) == 200
    assert app.paths == [PATH]  # the others never were whole
