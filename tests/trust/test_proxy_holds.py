"""Holds: an empty answer is asked for again before the peer gets it, and only where it may be."""

import time

import pytest
from starlette.requests import Request
from starlette.responses import Response

from intramural.trust.proxy import Hold
from tests.trust.lines import PROTOBUF, FakeUpstream, client, gated

POLL = "/v1/fleet/pull-messages"
HOLDS = {"pull-messages": Hold(hold_s=2.0, pause_s=0.05)}


def empty_until(path: str, asked: int) -> FakeUpstream:
    """Return an upstream whose answer is empty until it was asked so often."""
    app = FakeUpstream()

    async def answer(_: Request) -> Response:
        found = b"message" if len(app.seen) >= asked else b""
        return Response(found, media_type="application/protobuf")

    app.answers[path] = answer
    return app


def test_a_message_that_comes_meanwhile_is_in_the_answer() -> None:
    app = empty_until(POLL, 4)
    with gated(app, holds=HOLDS) as (one, port), client(port) as peer:
        began = time.monotonic()
        assert peer.post(POLL, content=b"node", headers=PROTOBUF).content == b"message"
        assert 0.15 <= time.monotonic() - began < 2.0  # three pauses
    assert [seen.size for seen in app.seen] == [len(b"node")] * 4
    assert len({seen.headers["content-length"] for seen in app.seen}) == 1
    assert one.tally.requests == 1  # for the peer it is one


def test_an_answer_that_stays_empty_comes_when_the_time_is_up() -> None:
    app = empty_until(POLL, 10**9)
    with gated(app, holds=HOLDS) as (_, port), client(port) as peer:
        began = time.monotonic()
        response = peer.post(POLL, content=b"node", headers=PROTOBUF)
        assert (response.status_code, response.content) == (200, b"")
        assert 1.5 <= time.monotonic() - began <= 2.5
    assert len(app.seen) > 5


@pytest.mark.parametrize(("path", "holds"), [("/v1/fleet/get-run", HOLDS), (POLL, {})])
def test_other_requests_are_asked_once(path: str, holds: dict[str, Hold]) -> None:
    app = empty_until(path, 10**9)
    with gated(app, holds=holds) as (_, port), client(port) as peer:
        assert peer.post(path, headers=PROTOBUF).content == b""
    assert len(app.seen) == 1


def test_an_error_is_not_held() -> None:
    calls: list[int] = []

    async def answer(_: Request) -> Response:
        calls.append(1)
        return Response(b"", status_code=503)

    with gated(FakeUpstream({POLL: answer}), holds=HOLDS) as (_, port), client(port) as peer:
        assert peer.post(POLL, headers=PROTOBUF).status_code == 503
    assert len(calls) == 1
