"""Proxy: passes the requests of Flower's fleet API, and those alone, from peers to the upstream."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import h11
import httpx

from intramural.trust.connection import PeerConnection, Source
from intramural.trust.counters import Counters
from intramural.trust.denial import Denied
from intramural.trust.limits import GateLimits, Quota
from intramural.trust.upstream import Upstream

REGISTER, UNREGISTER, DEACTIVATE = "register-node", "unregister-node", "deactivate-node"
PULL_MESSAGES, PUSH_MESSAGES = "pull-messages", "push-messages"
PUSH_OBJECT, PULL_OBJECT = "push-object", "pull-object"
GET_FAB, CONFIRM_RECEIVED = "get-fab", "confirm-message-received"
VERBS = frozenset(
    {
        REGISTER,
        "activate-node",
        DEACTIVATE,
        UNREGISTER,
        "send-node-heartbeat",
        PULL_MESSAGES,
        PUSH_MESSAGES,
        "get-run",
        GET_FAB,
        PUSH_OBJECT,
        PULL_OBJECT,
        CONFIRM_RECEIVED,
    }
)
"""Flower's fleet API (flwr 1.41 and 1.42); nothing else passes a gate."""
PREFIX = "/v1/fleet/"
VERB_OF = {(PREFIX + verb).encode(): verb for verb in VERBS}
"""Verb of each request target, compared byte by byte: a target is never normalised or decoded."""

OK = 200
MEDIA_TYPE = b"application/protobuf"
FLOWER_PREFIX = b"flwr-"
PASSED_ON = frozenset({b"content-type", b"content-length", b"accept"})
"""Request headers that pass, besides Flower's own; of an answer's, the first two."""
REFUSED_HEADERS = frozenset({b"upgrade", b"expect", b"content-encoding", b"trailer"})


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request of the fleet API, well formed and not yet let through."""

    peer: str
    """Who makes it, as the gatekeeper named the connection's source."""
    verb: str
    """One of `VERBS`."""
    host: str
    """The Host header, as it came."""
    headers: Mapping[str, str]
    """What is passed on: Flower's own headers and those that describe the body; none twice."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A body that is held until it is whole, looked at, and replaced by what the look returns."""

    bytes_max: int
    """Most that is held."""
    look: Callable[[Call, bytes], bytes]
    """Returns what passes; raises Denied."""
    too_long: Callable[[Call], Denied]
    """Returns why a longer one does not pass."""


@dataclass(frozen=True, kw_only=True)
class Hold:
    """An answer that is empty is asked for again before the peer gets it: it need not come back.

    Flower's SuperNode sleeps three seconds after an answer without a message, so that a round waits
    that long for nothing.
    """

    hold_s: float
    """Longest time from the request to its answer; below what the peer waits."""
    pause_s: float
    """Between two questions."""


class Gatekeeper(Protocol):
    """Decides who a peer is and which of its requests pass; a gate has one."""

    requests: Mapping[str, Inspection]
    """Inspection of request bodies, by verb."""
    answers: Mapping[str, Inspection]
    """Inspection of the bodies of answers 200, by verb."""

    def identify(self, source: Source) -> str:
        """Return the peer's name, asked for at each request; raises Denied."""
        ...

    def admit(self, call: Call) -> None:
        """Return if the request passes; raises Denied. Its body is not read yet."""
        ...

    def answered(self, call: Call, status: int) -> None:
        """Take note of the answer's status, before the peer has it."""
        ...


class Proxy:
    """Serves connections until they close.

    Guarantees:
        What passes is a POST of one of twelve exact paths with a protobuf body, from a peer
        that the gatekeeper names at that moment, within the limits. Upstream sees Flower's headers
        and the body's type and length, and no other bytes of the head; the peer gets the answer's
        status, type, length and body. Redirects and encoded answers do not pass. What is denied is
        answered by a fixed word.
    """

    def __init__(
        self,
        *,
        upstream: Upstream,
        gatekeeper: Gatekeeper,
        limits: GateLimits,
        counters: Counters,
        clock: Callable[[], float],
        holds: Mapping[str, Hold] = MappingProxyType({}),
    ) -> None:
        """Take the parts; `clock` gives seconds and never goes back.

        `holds` are by verb, of requests whose repetition is harmless.
        """
        self._holds, self._clock = holds, clock
        self._upstream, self._gatekeeper = upstream, gatekeeper
        self._limits, self._counters = limits, counters
        self._quota = Quota(limits, clock=clock)

    async def serve(self, connection: PeerConnection) -> None:
        """Answer a connection's requests, one after the other, until it is done."""
        try:
            peer = self._gatekeeper.identify(connection.source)
        except Denied:
            peer = ""
        try:
            with self._quota.connection(peer):
                while await self._serve_one(connection, peer):
                    pass
        except Denied as denied:
            self._counters.denied(peer, denied.reason)
            await connection.deny(denied)

    async def _serve_one(self, connection: PeerConnection, peer: str) -> bool:
        try:
            head = await connection.head()
            if head is None:
                return False
            peer = self._gatekeeper.identify(connection.source)  # it may have been revoked
            with self._quota.request(peer):
                return await self._pass(connection, head, read_call(head, peer))
        except Denied as denied:
            self._counters.denied(peer, denied.reason)
            return await connection.deny(denied)

    async def _pass(self, connection: PeerConnection, head: h11.Request, call: Call) -> bool:
        most = self._bytes_max(call.verb, bulk=PUSH_OBJECT)
        if _length(head.headers) > most:
            raise Denied("body-size")
        self._gatekeeper.admit(call)
        self._counters.passed(call.peer)
        body = self._counted(connection.body(bytes_max=most), call.peer)
        content: bytes | AsyncIterator[bytes] = body
        if inspection := self._gatekeeper.requests.get(call.verb):
            content = await _inspected(inspection, call, body)
        headers = [
            (name.encode(), value.encode("latin-1"))
            for name, value in call.headers.items()
            if name != "content-length" or content is body
        ]
        response = await self._ask(call.verb, headers, content)
        try:
            return await self._answer(connection, call, response)
        finally:
            await response.aclose()

    async def _ask(
        self, verb: str, headers: list[tuple[bytes, bytes]], content: bytes | AsyncIterator[bytes]
    ) -> httpx.Response:
        """Return upstream's answer; of a verb that is held, ask until the answer is not empty."""
        hold = self._holds.get(verb)
        if hold is None:
            return await self._upstream.send(PREFIX + verb, headers, content)
        if not isinstance(content, bytes):
            content = b"".join([piece async for piece in content])  # bounded by `body` itself
        until_s = self._clock() + hold.hold_s
        while True:
            response = await self._upstream.send(PREFIX + verb, headers, content)
            is_empty = response.status_code == 200 and response.headers.get("content-length") == "0"
            if not is_empty or self._clock() + hold.pause_s >= until_s:
                return response
            await response.aclose()
            await asyncio.sleep(hold.pause_s)

    async def _answer(
        self, connection: PeerConnection, call: Call, response: httpx.Response
    ) -> bool:
        status, raw = response.status_code, response.headers.raw
        most = self._bytes_max(call.verb, bulk=PULL_OBJECT)
        fields = [(name.lower(), value) for name, value in raw]
        inspection = self._gatekeeper.answers.get(call.verb) if status == OK else None
        if inspection and _length(fields) > inspection.bytes_max:
            raise inspection.too_long(call)
        # Flower follows redirects, and a partial or encoded body is not what was inspected.
        encoded = any(name == b"content-encoding" for name, _ in fields)
        if not (status == OK or 400 <= status <= 599) or encoded or _length(fields) > most:
            raise Denied("bad-answer")
        self._gatekeeper.answered(call, status)
        headers = [(n, v) for n, v in fields if n in {b"content-type", b"content-length"}]
        pieces = self._upstream.pieces(response)
        if inspection:
            body = await _inspected(inspection, call, pieces)
            headers = [(n, v) for n, v in headers if n != b"content-length"]
            headers.append((b"content-length", b"%d" % len(body)))
            connection.begin(status, headers)
            await self._down(connection, call.peer, body)
            return await connection.end()
        connection.begin(status, headers)
        total = 0
        async for piece in pieces:
            total += len(piece)
            if total > most:
                raise Denied("bad-answer")
            await self._down(connection, call.peer, piece)
        return await connection.end()

    async def _down(self, connection: PeerConnection, peer: str, piece: bytes) -> None:
        await connection.write(piece)
        self._counters.of(peer).bytes_down += len(piece)

    async def _counted(self, pieces: AsyncIterator[bytes], peer: str) -> AsyncIterator[bytes]:
        async for piece in pieces:
            self._counters.of(peer).bytes_up += len(piece)
            yield piece

    def _bytes_max(self, verb: str, *, bulk: str) -> int:
        return self._limits.body_bytes_max if verb == bulk else self._limits.small_bytes_max


def read_call(head: h11.Request, peer: str) -> Call:
    """Read a request's head strictly.

    Raises:
        Denied: It is not a POST of the fleet API, or says anything that two readers could take in
            two ways.
    """
    verb = VERB_OF.get(bytes(head.target))
    if verb is None:
        raise Denied("path")
    if head.method != b"POST":
        raise Denied("method")
    if head.http_version != b"1.1":
        raise Denied("malformed")
    fields = [(bytes(name), bytes(value)) for name, value in head.headers]
    names = {name for name, _ in fields}
    framings = names & {b"content-length", b"transfer-encoding"}
    if len(names) < len(fields) or names & REFUSED_HEADERS or len(framings) > 1:
        raise Denied("headers")
    values = dict(fields)
    if values.get(b"content-type") != MEDIA_TYPE:
        raise Denied("media-type")
    passed = {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in fields
        if name in PASSED_ON or name.startswith(FLOWER_PREFIX)
    }
    host = values.get(b"host", b"").decode("latin-1")
    return Call(peer=peer, verb=verb, host=host, headers=passed)


def _length(fields: Iterable[tuple[bytes, bytes]]) -> int:
    lengths = [int(value) for name, value in fields if name == b"content-length"]
    return max(lengths, default=0)


async def _inspected(inspection: Inspection, call: Call, pieces: AsyncIterator[bytes]) -> bytes:
    """Gather a body, and return what passes of it."""
    body = bytearray()
    async for piece in pieces:
        if len(body) + len(piece) > inspection.bytes_max:
            raise inspection.too_long(call)
        body += piece
    return inspection.look(call, bytes(body))
