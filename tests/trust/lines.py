"""Ends of a line for tests: a fake upstream, a gate in a thread, and clients that misbehave."""

import asyncio
import hashlib
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx
import uvicorn
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from intramural.core.canonical import digest_bytes
from intramural.core.journal import utc_now
from intramural.trust.alerts import Alerts
from intramural.trust.connection import Source
from intramural.trust.counters import Counters, Tally
from intramural.trust.denial import Denied
from intramural.trust.gate import Chore, Gate
from intramural.trust.limits import GateLimits
from intramural.trust.proxy import Call, Hold, Inspection, Proxy
from intramural.trust.tls import client_context, server_context
from intramural.trust.upstream import Upstream
from tests.trust.pki import Papers

PATIENCE_S = 5.0
PROTOBUF = {"content-type": "application/protobuf", "accept": "application/protobuf"}
Answer = Callable[[Request], Awaitable[Response]]
PATH = "/v1/fleet/get-run"
PUSH, PULL = "/v1/fleet/push-object", "/v1/fleet/pull-object"
HEAD = "Host: gate\r\nContent-Type: application/protobuf\r\n"
GOOD = f"POST {PATH} HTTP/1.1\r\n{HEAD}Content-Length: 1\r\nConnection: close\r\n\r\nx"
AGAIN = GOOD.replace("Connection: close\r\n", "")


class Doorman:
    """A gatekeeper that knows peers by their certificates, and lets all else pass."""

    def __init__(self, sites: dict[str, str]) -> None:
        self.sites = sites
        self.calls: list[Call] = []
        self.requests: Mapping[str, Inspection] = {}
        self.answers: Mapping[str, Inspection] = {}

    def identify(self, source: Source) -> str:
        if source.certificate is None:
            return "plain"
        site = self.sites.get(digest_bytes(source.certificate))
        if site is None:
            raise Denied("unknown-certificate")
        return site

    def admit(self, call: Call) -> None:
        self.calls.append(call)

    def answered(self, call: Call, status: int) -> None:
        pass


@dataclass(kw_only=True)
class Line:
    """A gate between clients and an upstream, with its parts in reach."""

    gate: Gate
    doorman: Doorman
    counters: Counters
    upstream: Upstream
    alerts: list[dict[str, Any]]

    @property
    def tally(self) -> Tally:
        """What the peer without certificate did."""
        return self.counters.of("plain")

    @property
    def refusals(self) -> dict[str, int]:
        """Of all peers."""
        return dict(sum((one.refusals for one in self.counters.peers.values()), start=Counter()))


def line(
    upstream: str,
    *,
    papers: Papers | None = None,
    doorman: Doorman | None = None,
    chores: tuple[Chore, ...] = (),
    holds: Mapping[str, Hold] | None = None,
    **limits: Any,
) -> Line:
    told: list[dict[str, Any]] = []
    alerts = Alerts(told.append, now=utc_now)
    one = GateLimits(**limits)
    behind = Upstream(f"http://{upstream}", name="behind", limits=one, alerts=alerts, keep_s=3.0)
    counters, doorman = Counters(now=utc_now), doorman or Doorman({})
    proxy = Proxy(
        upstream=behind,
        gatekeeper=doorman,
        limits=one,
        counters=counters,
        clock=time.monotonic,
        holds=holds or {},
    )
    files = papers and (papers.certificate, papers.key, papers.authority)
    tls = server_context(*files) if files else None
    gate = Gate(proxy=proxy, upstream=behind, limits=one, alerts=alerts, tls=tls, chores=chores)
    return Line(gate=gate, doorman=doorman, counters=counters, upstream=behind, alerts=told)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One request that reached the upstream."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    size: int
    sha256: str


@dataclass
class FakeUpstream:
    """Counts requests, hashes their bodies without keeping them, and answers as told."""

    answers: dict[str, Answer] = field(default_factory=dict)
    """By path; else the body's SHA-256, in hexadecimal."""
    seen: list[Seen] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        hasher, size = hashlib.sha256(), 0
        async for piece in request.stream():
            hasher.update(piece)
            size += len(piece)
        seen = Seen(
            method=request.method,
            path=request.url.path,
            query=request.url.query,
            headers=dict(request.headers),
            size=size,
            sha256=hasher.hexdigest(),
        )
        self.seen.append(seen)
        answer = self.answers.get(seen.path)
        response = Response(seen.sha256, media_type="application/protobuf")
        await (await answer(request) if answer else response)(scope, receive, send)

    @property
    def paths(self) -> list[str]:
        return [one.path for one in self.seen]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@contextmanager
def serving(app: FakeUpstream, port: int) -> Iterator[str]:
    """Run an upstream in a thread; yield its host:port."""
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=port,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


@contextmanager
def running(gate: Gate, port: int = 0, *, host: str = "127.0.0.1") -> Iterator[int]:
    """Run a gate in a thread of its own; yield its port."""
    ready: list[int] = []
    stopping: list[Callable[[], object]] = []

    async def run() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        stopping.append(partial(loop.call_soon_threadsafe, stop.set))
        ready.append(await gate.start(host, port))
        await stop.wait()
        await gate.stop(grace_s=1.0)

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    wait_for(lambda: bool(ready))
    try:
        yield ready[0]
    finally:
        stopping[0]()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@contextmanager
def client(port: int, papers: Papers | None = None) -> Iterator[httpx.Client]:
    """Yield a well-behaved client of a gate."""
    scheme = "https" if papers else "http"
    verify = tls_of(papers) if papers else False
    with httpx.Client(
        base_url=f"{scheme}://127.0.0.1:{port}", verify=verify, trust_env=False, timeout=PATIENCE_S
    ) as one:
        yield one


def tls_of(papers: Papers) -> ssl.SSLContext:
    return client_context(papers.certificate, papers.key, papers.authority)


def connect(port: int, tls: ssl.SSLContext | None = None) -> socket.socket:
    plain = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
    return tls.wrap_socket(plain, server_hostname="127.0.0.1") if tls else plain


def exchange(port: int, content: bytes, tls: ssl.SSLContext | None = None) -> bytes:
    """Send bytes as they are; return all that comes until the other end closes."""
    got = b""
    with connect(port, tls) as one, suppress(OSError):
        one.sendall(content)
        while piece := one.recv(1 << 16):
            got += piece
    return got


def answer_to(port: int, content: bytes) -> bytes:
    """Send bytes as they are; return one answer, whether or not the other end closes then."""
    head, body, length = b"", b"", 0
    with connect(port) as one:
        one.sendall(content)
        while not head or len(body) < length:
            piece = one.recv(1 << 16)
            assert piece, (head, body)
            body += piece
            if not head and b"\r\n\r\n" in body:
                head, _, body = body.partition(b"\r\n\r\n")
                length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
                length = 0 if content.startswith(b"HEAD") else length
    return head + b"\r\n\r\n" + body


@contextmanager
def gated(app: FakeUpstream, **kwargs: object) -> Iterator[tuple[Line, int]]:
    """Run an upstream and a gate before it; yield the gate's parts and its port."""
    with serving(app, free_port()) as address:
        one = line(address, **kwargs)  # type: ignore[arg-type]
        with running(one.gate) as port:
            yield one, port


def answering(content: bytes = b"", status: int = 200, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}

    async def answer(_: Request) -> Response:
        return Response(content, status, named, media_type="application/protobuf")

    return answer


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def held_back(release: threading.Event) -> Answer:
    async def answer(_: Request) -> Response:
        await asyncio.to_thread(release.wait, 5)
        return Response(b"late", media_type="application/protobuf")

    return answer
