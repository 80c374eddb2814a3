"""Proxy: what passes, byte for byte; what does not, and with which answer."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from intramural.trust.denial import STATUSES
from intramural.trust.proxy import VERBS
from tests.trust.lines import (
    GOOD,
    HEAD,
    PATH,
    PROTOBUF,
    PULL,
    PUSH,
    Answer,
    FakeUpstream,
    Line,
    answer_to,
    answering,
    client,
    exchange,
    gated,
    status_of,
    wait_for,
)

CANARY = "CANARY-5b1f"


def test_every_verb_passes_and_bytes_come_as_they_went() -> None:
    sent, coming = os.urandom(3_000_001), os.urandom(5 << 20)
    app = FakeUpstream({PULL: answering(coming)})
    with gated(app) as (one, port), client(port) as peer:
        for verb in sorted(VERBS - {"push-object", "pull-object"}):
            answer = peer.post(f"/v1/fleet/{verb}", content=verb.encode(), headers=PROTOBUF)
            assert answer.text == hashlib.sha256(verb.encode()).hexdigest()
        answer = peer.post(PUSH, content=sent, headers=PROTOBUF)
        assert answer.text == hashlib.sha256(sent).hexdigest()
        assert answer.headers["content-type"] == "application/protobuf"
        assert peer.post(PULL, content=b"id", headers=PROTOBUF).content == coming
    assert len(VERBS) == 12  # facts/flower.md, section 9
    assert [one.method for one in app.seen] == ["POST"] * 12
    small = sum(len(verb) for verb in VERBS - {"push-object", "pull-object"})
    assert one.tally.bytes_up == small + len(sent) + len(b"id")
    assert one.tally.bytes_down == 11 * 64 + len(coming)  # a digest has 64 digits
    assert one.tally.requests == 12


def test_a_body_of_unknown_length_passes_too() -> None:
    async def pieces(_: Request) -> Response:
        async def some() -> AsyncIterator[bytes]:
            for _ in range(10):
                yield b"y" * 1000

        return StreamingResponse(some(), media_type="application/protobuf")

    app = FakeUpstream({PULL: pieces})
    with gated(app) as (_, port), client(port) as peer:
        answer = peer.post(PUSH, content=iter([b"ab", b"c" * 99_998]), headers=PROTOBUF)
        assert answer.text == hashlib.sha256(b"ab" + b"c" * 99_998).hexdigest()
        assert peer.post(PULL, headers=PROTOBUF).content == b"y" * 10_000


def test_of_a_requests_head_only_flowers_headers_pass() -> None:
    app = FakeUpstream()
    mine = {"flwr-public-key": "k", "flwr-signature": "s", "flwr-timestamp": "t"}
    dropped = {
        "Cookie": "a=b",
        "Authorization": "x",
        "X-Forwarded-For": "1.2.3.4",
        "TE": "trailers",
    }
    named = {"Connection": "keep-alive, flwr-signature", "Keep-Alive": "5", "Proxy-Connection": "x"}
    with gated(app) as (_, port), client(port) as peer:
        peer.post(PATH, content=b"x", headers=PROTOBUF | mine | dropped | named)
    headers = app.seen[0].headers
    assert headers.pop("host").startswith("127.0.0.1:")
    assert headers == PROTOBUF | mine | {"content-length": "1"}


REFUSED = {
    "another API": (f"POST /v1/control/{CANARY} HTTP/1.1\r\n{HEAD}\r\n", "path"),
    "the runtime API": (f"POST /v1/runtime/acquire-task HTTP/1.1\r\n{HEAD}\r\n", "path"),
    "docs": (f"GET /docs HTTP/1.1\r\n{HEAD}\r\n", "path"),
    "an unknown verb": (f"POST /v1/fleet/{CANARY} HTTP/1.1\r\n{HEAD}\r\n", "path"),
    "an encoded letter": (f"POST /v1/fleet/%67et-run HTTP/1.1\r\n{HEAD}\r\n", "path"),
    "an encoded slash": (f"POST /v1/fleet%2fget-run HTTP/1.1\r\n{HEAD}\r\n", "path"),
    "encoded dots": (f"POST /v1/fleet/%2e%2e/control/x HTTP/1.1\r\n{HEAD}\r\n", "path"),
    "dots": (f"POST /v1/fleet/../control/list-runs HTTP/1.1\r\n{HEAD}\r\n", "path"),
    "a dot": (f"POST /v1/fleet/./get-run HTTP/1.1\r\n{HEAD}\r\n", "path"),
    "two slashes first": (f"POST //v1/fleet/get-run HTTP/1.1\r\n{HEAD}\r\n", "path"),
    "two slashes": (f"POST /v1/fleet//get-run HTTP/1.1\r\n{HEAD}\r\n", "path"),
    "a slash at the end": (f"POST {PATH}/ HTTP/1.1\r\n{HEAD}\r\n", "path"),
    "capitals": (f"POST /V1/fleet/get-run HTTP/1.1\r\n{HEAD}\r\n", "path"),
    "a query": (f"POST {PATH}?{CANARY} HTTP/1.1\r\n{HEAD}\r\n", "path"),
    "an empty query": (f"POST {PATH}? HTTP/1.1\r\n{HEAD}\r\n", "path"),
    "a fragment": (f"POST {PATH}#x HTTP/1.1\r\n{HEAD}\r\n", "path"),
    "a parameter": (f"POST {PATH};x HTTP/1.1\r\n{HEAD}\r\n", "path"),
    "a backslash": (f"POST \\v1\\fleet\\get-run HTTP/1.1\r\n{HEAD}\r\n", "path"),
    "absolute form": (f"POST http://gate{PATH} HTTP/1.1\r\n{HEAD}\r\n", "path"),
    "CONNECT": (f"CONNECT gate:80 HTTP/1.1\r\n{HEAD}\r\n", "path"),
    "OPTIONS": (f"OPTIONS * HTTP/1.1\r\n{HEAD}\r\n", "path"),
    "GET": (f"GET {PATH} HTTP/1.1\r\n{HEAD}\r\n", "method"),
    "HEAD": (f"HEAD {PATH} HTTP/1.1\r\n{HEAD}\r\n", "method"),
    "PUT": (f"PUT {PATH} HTTP/1.1\r\n{HEAD}Content-Length: 1\r\n\r\nx", "method"),
    "small letters": (f"post {PATH} HTTP/1.1\r\n{HEAD}\r\n", "method"),
    "an upgrade": (
        f"POST {PATH} HTTP/1.1\r\n{HEAD}Connection: upgrade\r\nUpgrade: websocket\r\n\r\n",
        "headers",
    ),
    "an expectation": (f"POST {PATH} HTTP/1.1\r\n{HEAD}Expect: 100-continue\r\n\r\n", "headers"),
    "an encoding": (f"POST {PATH} HTTP/1.1\r\n{HEAD}Content-Encoding: gzip\r\n\r\n", "headers"),
    "length and chunks": (
        f"POST {PATH} HTTP/1.1\r\n{HEAD}Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"
        "0\r\n\r\nPOST /v1/control/list-runs HTTP/1.1\r\n\r\n",
        "headers",
    ),
    "a key twice": (
        f"POST {PATH} HTTP/1.1\r\n{HEAD}flwr-public-key: a\r\nFlwr-Public-Key: {CANARY}\r\n\r\n",
        "headers",
    ),
    "two types": (f"POST {PATH} HTTP/1.1\r\n{HEAD}Content-Type: text/plain\r\n\r\n", "headers"),
    "a form": (
        f"POST {PATH} HTTP/1.1\r\nHost: gate\r\nContent-Type: text/plain\r\n\r\n",
        "media-type",
    ),
    "no type": (f"POST {PATH} HTTP/1.1\r\nHost: gate\r\n\r\n", "media-type"),
    "HTTP/1.0": (f"POST {PATH} HTTP/1.0\r\n{HEAD}\r\n", "malformed"),
    "no host": (f"POST {PATH} HTTP/1.1\r\nContent-Type: x\r\n\r\n", "malformed"),
    "two hosts": (f"POST {PATH} HTTP/1.1\r\n{HEAD}Host: other\r\n\r\n", "malformed"),
    "two lengths": (
        f"POST {PATH} HTTP/1.1\r\n{HEAD}Content-Length: 1\r\nContent-Length: 2\r\n\r\nx",
        "malformed",
    ),
    "a negative length": (f"POST {PATH} HTTP/1.1\r\n{HEAD}Content-Length: -1\r\n\r\n", "malformed"),
    "strange chunks": (
        f"POST {PATH} HTTP/1.1\r\n{HEAD}Transfer-Encoding: gzip, chunked\r\n\r\n",
        "malformed",
    ),
    "bad chunks": (
        f"POST {PATH} HTTP/1.1\r\n{HEAD}Transfer-Encoding: chunked\r\n\r\n{CANARY}\r\n",
        "malformed",
    ),
    "a folded header": (f"POST {PATH} HTTP/1.1\r\n {CANARY}\r\n{HEAD}\r\n", "malformed"),
    "a space in a name": (f"POST {PATH} HTTP/1.1\r\n{HEAD}a b: c\r\n\r\n", "malformed"),
    "a NUL": (f"POST {PATH} HTTP/1.1\r\n{HEAD}a: {CANARY}\x00\r\n\r\n", "malformed"),
    "a space in the path": (f"POST {PATH} x HTTP/1.1\r\n{HEAD}\r\n", "malformed"),
    "no HTTP": (f"{CANARY}\r\n\r\n", "malformed"),
    "TLS": ("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "malformed"),
    "a long body promised": (
        f"POST {PUSH} HTTP/1.1\r\n{HEAD}Content-Length: {99 << 30}\r\n\r\n",
        "body-size",
    ),
    "a long head": (f"POST {PATH} HTTP/1.1\r\n{HEAD}a: {'x' * 20_000}\r\n\r\n", "head-size"),
    "an endless head": (f"POST {PATH} HTTP/1.1\r\n{HEAD}a: {'x' * 99_000}", "head-size"),
}


@pytest.fixture(scope="module")
def strict() -> Iterator[tuple[FakeUpstream, Line, int]]:
    app = FakeUpstream()
    with gated(app, head_s_max=0.3, stall_s_max=0.3, requests_burst=1000) as (one, port):
        yield app, one, port


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_the_fleet_api_is_refused_by_a_fixed_word(
    strict: tuple[FakeUpstream, Line, int], kind: str
) -> None:
    app, one, port = strict
    content, reason = REFUSED[kind]
    reached, before = len(app.seen), one.refusals.get(reason, 0)
    answer = answer_to(port, content.encode("latin-1"))
    assert status_of(answer) == STATUSES[reason]
    assert answer.endswith(f"refused: {reason}\n".encode()) or kind == "HEAD"
    assert CANARY.encode() not in answer
    wait_for(lambda: one.refusals.get(reason, 0) > before)
    if kind != "bad chunks":  # there the head was well formed, and went ahead
        assert len(app.seen) == reached
    assert status_of(exchange(port, GOOD.encode())) == 200  # and it is still there


def test_a_connection_is_used_again_after_a_refusal() -> None:
    app = FakeUpstream()
    with gated(app) as (_, port), client(port) as peer:
        for _ in range(3):
            assert peer.post(PATH, content=b"x" * 100_000, headers={}).status_code == 415
            assert peer.post(PATH, content=b"x", headers=PROTOBUF).status_code == 200
        streams = {id(peer.post(PATH, headers=PROTOBUF).extensions["network_stream"])}
        streams |= {id(peer.post("/", headers=PROTOBUF).extensions["network_stream"])}
    assert app.paths == [PATH] * 4
    assert len(streams) == 1


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_is_cut_one_byte_after_its_limit(chunked: bool) -> None:
    most = 200_000
    app = FakeUpstream()

    def body(size: int) -> bytes | Iterator[bytes]:
        content = b"x" * size
        return iter([content[:most], content[most:]]) if chunked else content

    with gated(app, body_bytes_max=most, small_bytes_max=1000) as (one, port):
        for path, limit in ((PUSH, most), (PATH, 1000), (PULL, 1000)):
            for over, status in ((0, 200), (1, 413)):
                with client(port) as peer:
                    answer = peer.post(path, content=body(limit + over), headers=PROTOBUF)
                assert answer.status_code == status, (path, over)
    assert one.tally.refusals == {"body-size": 3}
    assert sorted(seen.size for seen in app.seen) == [1000, 1000, most]


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (answering(status=307, location="http://127.0.0.1:1/v1/control/x"), 502),
        (answering(status=302, location="/v1/fleet/get-fab"), 502),
        (answering(b"x", content_encoding="gzip"), 502),
        (answering(status=204), 502),
        (answering(b"x", status=206), 502),
        (answering(b"x" * 1001), 502),
        (answering(b"x" * 1000), 200),
        (answering(b"no", status=404), 404),
        (answering(b"no", status=401), 401),
        (answering(b"no", status=500), 500),
    ],
)
def test_an_answer_passes_only_if_it_is_plain(answer: Answer, status: int) -> None:
    app = FakeUpstream({PATH: answer})
    with gated(app, small_bytes_max=1000) as (_, port), client(port) as peer:
        got = peer.post(PATH, headers=PROTOBUF)
    assert got.status_code == status
    assert set(got.headers) <= {"content-type", "content-length", "date"}


def test_cookies_of_an_answer_are_dropped_and_not_kept_for_other_peers() -> None:
    app = FakeUpstream({PATH: answering(b"x", set_cookie="session=1", server="s", connection="x")})
    with gated(app) as (_, port), client(port) as peer:
        headers = [peer.post(PATH, headers=PROTOBUF).headers for _ in range(2)]
    assert all(set(one) == {"content-type", "content-length"} for one in headers)
    assert not [one for one in app.seen if "cookie" in one.headers]


def test_an_answer_of_unknown_length_is_cut_at_the_limit() -> None:
    async def endless(_: Request) -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            while True:
                yield b"y" * 1000
                await asyncio.sleep(0)

        return StreamingResponse(pieces(), media_type="application/protobuf")

    with (
        gated(FakeUpstream({PULL: endless}), body_bytes_max=50_000) as (one, port),
        client(port) as peer,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        peer.post(PULL, headers=PROTOBUF)
    assert one.tally.bytes_down <= 50_000
    assert one.tally.refusals == {"bad-answer": 1}
