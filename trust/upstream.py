"""Upstream: what lies behind a gate, reached over HTTP/1.1; told once when it goes and comes."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from typing import Any

import httpx

from intramural.trust.alerts import Alerts
from intramural.trust.denial import Denied
from intramural.trust.limits import GateLimits

POOL_MAX = 256


class Upstream:
    """Sends requests on, keeps connections, and knows whether the other end is there.

    Guarantees:
        No environment variable names a proxy, no redirect is followed, no cookie kept, nothing
        decoded, and nothing is sent twice. While the other end cannot be reached, requests are
        refused at once, but for one try every `retry_s`.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        limits: GateLimits,
        alerts: Alerts,
        tls: ssl.SSLContext | None = None,
        keep_s: float,
    ) -> None:
        """Prepare; the first request connects.

        Args:
            url: Scheme, host and port; what is asked for is added.
            name: What to call the other end in alerts.
            limits: Its waits.
            alerts: Told when the other end goes away and when it is back.
            tls: Required with https.
            keep_s: How long an idle connection is kept: shorter than the other end keeps it.
        """
        assert url.startswith("https://") == (tls is not None)
        self._url, self._name, self._limits, self._alerts = url, name, limits, alerts
        # A transport and not a client, which would keep cookies and obey the environment.
        self._transport = httpx.AsyncHTTPTransport(
            verify=tls or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),  # the latter trusts nobody
            trust_env=False,
            http2=False,
            retries=0,
            limits=httpx.Limits(
                max_connections=POOL_MAX,
                max_keepalive_connections=POOL_MAX,
                keepalive_expiry=keep_s,
            ),
        )
        self._silent_until = 0.0
        self.reachable: bool | None = None
        """None until the first try."""
        self.why = ""
        """Why it cannot be reached, for the operator."""
        self.since: datetime | None = None
        """When it went or came."""

    async def send(
        self, path: str, headers: list[tuple[bytes, bytes]], content: bytes | AsyncIterator[bytes]
    ) -> httpx.Response:
        """POST a request and return the answer once its head is there; the caller closes it.

        Raises:
            Denied: The other end cannot be reached or does not answer; or `content` raised it.
        """
        if _clock() < self._silent_until:
            raise Denied("unreachable")
        waits = {
            "connect": self._limits.connect_s_max,
            "pool": self._limits.connect_s_max,
            "read": self._limits.answer_s_max,
            "write": self._limits.answer_s_max,
        }
        request = httpx.Request(
            "POST",
            self._url + path,
            headers=headers,
            content=content,
            extensions={"timeout": waits},
        )
        try:
            response = await self._transport.handle_async_request(request)
        except httpx.TransportError as error:
            raise self._denied(error) from None
        self._note(True)
        return response

    async def pieces(self, response: httpx.Response) -> AsyncIterator[bytes]:
        """Yield an answer's body, undecoded.

        Raises:
            Denied: The other end broke off.
        """
        try:
            async for piece in response.aiter_raw():
                yield piece
        except httpx.TransportError as error:
            raise self._denied(error) from None

    async def close(self) -> None:
        """Close all connections."""
        await self._transport.aclose()

    def as_json(self) -> dict[str, Any]:
        """Return the state for a status file."""
        since = None if self.since is None else self.since.isoformat(timespec="milliseconds")
        return {"name": self._name, "reachable": self.reachable, "since": since, "why": self.why}

    def _denied(self, error: httpx.TransportError) -> Denied:
        if isinstance(error, httpx.PoolTimeout):
            return Denied("busy")
        if isinstance(error, httpx.ReadTimeout):
            return Denied("slow-answer")
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            self._silent_until = _clock() + self._limits.retry_s
        self._note(False, _why(error, is_tls=self._url.startswith("https:")))
        return Denied("unreachable")

    def _note(self, reachable: bool, why: str = "") -> None:
        self.why = why
        if reachable == self.reachable:
            return
        first, self.reachable = self.reachable is None, reachable
        self.since = self._alerts.now()
        if not (first and reachable):
            facts = {"why": why} if why else {}
            word = "reachable" if reachable else "unreachable"
            self._alerts.tell(f"{self._name}-{word}", always=True, **facts)


def _clock() -> float:
    return asyncio.get_running_loop().time()


def _why(error: BaseException, *, is_tls: bool) -> str:
    """Return what a network's failure says to an operator; nothing of a peer's choosing."""
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is refused: {cause.verify_message}"
    for cause in causes:
        if isinstance(cause, ssl.SSLError):
            return f"TLS failed: {(cause.reason or 'unknown').lower().replace('_', ' ')}"
    if not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        # asyncio's servers close without TLS's alert when they refuse a client's certificate.
        hint = "; if this goes on, it may refuse the certificate shown" if is_tls else ""
        return f"connection broken off{hint}"
    for cause in causes:
        if isinstance(cause, ConnectionRefusedError):
            return "connection refused"
        if isinstance(cause, OSError) and cause.strerror:
            return str(cause.strerror).lower()
    return "cannot connect"


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop(0)
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        todo += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            todo += one.exceptions
