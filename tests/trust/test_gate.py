"""Gate: it stays up whatever comes from either side, and ends when told."""

import asyncio
import errno
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from intramural.core.errors import ConfigError
from intramural.trust.gate import Chore
from intramural.trust.proxy import Call
from tests.trust.lines import (
    AGAIN,
    GOOD,
    PATH,
    PROTOBUF,
    Doorman,
    FakeUpstream,
    client,
    connect,
    exchange,
    free_port,
    gated,
    held_back,
    line,
    running,
    serving,
    status_of,
    tls_of,
    wait_for,
)
from tests.trust.pki import Authority


def test_the_upstream_may_go_and_come() -> None:
    port_behind = free_port()
    one = line(f"127.0.0.1:{port_behind}", retry_s=0.001, requests_burst=1000)
    with running(one.gate) as port, client(port) as peer:

        def statuses() -> set[int]:
            return {peer.post(PATH, headers=PROTOBUF).status_code for _ in range(5)}

        assert statuses() == {503}
        assert one.upstream.as_json()["why"] == "connection refused"
        for _ in range(2):
            with serving(FakeUpstream(), port_behind):
                wait_for(lambda: statuses() == {200})
                assert one.upstream.reachable
            wait_for(lambda: statuses() == {503})
    words = [alert["alert"] for alert in one.alerts]
    assert words == ["behind-unreachable", *["behind-reachable", "behind-unreachable"] * 2]


def test_an_upstream_that_does_not_answer_is_not_waited_for() -> None:
    release = threading.Event()
    app = FakeUpstream({PATH: held_back(release)})
    with gated(app, answer_s_max=0.2) as (one, port), client(port) as peer:
        answer = peer.post(PATH, headers=PROTOBUF)
        release.set()
    assert (answer.status_code, answer.text) == (504, "refused: slow-answer\n")
    assert one.upstream.reachable is None


def test_garbage_before_the_handshake_harms_nobody(tmp_path: Path) -> None:
    ca = Authority(tmp_path)
    site, stranger = ca.site("a"), ca.site("stranger")
    doorman = Doorman({site.digest: "a"})
    with gated(FakeUpstream(), papers=ca.server(), doorman=doorman, handshake_s_max=0.3) as (
        one,
        port,
    ):
        for garbage in (b"", b"\x00" * 1000, GOOD.encode(), os.urandom(5000)):
            assert b"200" not in exchange(port, garbage)[:20]
        answer = exchange(port, GOOD.encode(), tls_of(stranger))
        assert answer.endswith(b"refused: unknown-certificate\n")
        assert status_of(exchange(port, os.urandom(50) + b"\r\n\r\n", tls_of(site))) == 400
        assert status_of(exchange(port, GOOD.encode(), tls_of(site))) == 200
    assert one.counters.of("").refusals == {"unknown-certificate": 1}
    assert one.counters.of("a").refusals == {"malformed": 1}


def test_told_to_stop_a_gate_ends_what_is_under_way() -> None:
    release = threading.Event()
    app = FakeUpstream({PATH: held_back(release)})
    with ThreadPoolExecutor(1) as pool, serving(app, free_port()) as address:
        one = line(address)
        with running(one.gate) as port, connect(port):  # the latter is idle
            peer = pool.submit(lambda: exchange(port, GOOD.encode()))
            wait_for(lambda: len(app.seen) == 1)
            threading.Timer(0.2, release.set).start()
        assert peer.result().endswith(b"late")


def test_files_are_kept_and_a_disk_that_refuses_is_told_of(tmp_path: Path) -> None:
    texts = iter([b"1", b"1", b"2"])
    blocked, kept = tmp_path / "blocked", tmp_path / "folder" / "kept"
    blocked.mkdir()
    chores = (
        Chore(path=kept, content=lambda: next(texts, b"last"), every_s=0.01),
        Chore(path=blocked, content=lambda: b"x", every_s=0.01),
    )
    one = line("127.0.0.1:1", chores=chores)
    with running(one.gate):
        wait_for(lambda: kept.exists() and kept.read_bytes() == b"last")
        before = kept.stat().st_mtime_ns
        wait_for(lambda: bool(one.alerts))
    assert kept.stat().st_mtime_ns == before  # what is there is not written again
    assert [alert["alert"] for alert in one.alerts] == ["cannot-write"]
    assert one.alerts[0]["file"] == str(blocked)


def test_a_fault_of_ours_ends_one_connection_and_no_more() -> None:
    class Broken(Doorman):
        def admit(self, call: Call) -> None:
            if call.verb == "get-fab":
                raise ZeroDivisionError(call.host)

    with gated(FakeUpstream(), doorman=Broken({})) as (one, port):
        answer = exchange(port, GOOD.replace("get-run", "get-fab").encode())
        assert (status_of(answer), answer[-18:]) == (500, b"refused: internal\n")
        assert status_of(exchange(port, GOOD.encode())) == 200
    assert [(a["alert"], a["error"]) for a in one.alerts] == [
        ("internal-error", "ZeroDivisionError")
    ]


def test_a_connection_ends_at_a_certain_age() -> None:
    with gated(FakeUpstream(), connection_s_max=0.2) as (_, port), connect(port) as peer:
        peer.sendall(AGAIN.encode())
        assert peer.recv(1000).startswith(b"HTTP/1.1 200")
        time.sleep(0.25)
        peer.sendall(AGAIN.encode())
        assert peer.recv(1000).startswith(b"HTTP/1.1 200")
        assert peer.recv(1000) == b""


def test_an_address_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        async def listen() -> None:
            await line("127.0.0.1:1").gate.start("127.0.0.1", port)

        with pytest.raises(ConfigError, match=f"cannot listen at 127.0.0.1:{port}: .*choose"):
            asyncio.run(listen())


def test_two_colons_listen_for_both_families() -> None:
    port = free_port()
    with running(line("127.0.0.1:1").gate, port, host="::"):
        for address in ("127.0.0.1", "::1"):
            try:
                with socket.create_connection((address, port), timeout=5) as peer:
                    peer.sendall(GOOD.encode())
                    assert status_of(peer.recv(1000)) == 503  # nothing is behind it
            except OSError as error:
                if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    pytest.skip("no IPv6 on this machine")
                raise
