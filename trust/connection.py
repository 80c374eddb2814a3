"""PeerConnection: one peer's HTTP/1.1 connection, where every wait and every length is limited."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from email.utils import format_datetime

import h11

from intramural.trust.denial import ENDING, Denied
from intramural.trust.limits import GateLimits

READ_BYTES = 1 << 16
DISCARD_BYTES_MAX = 8 << 20
"""Of a denied request's body: read and dropped, so that the peer gets to read the answer."""
CLOSE_S_MAX = 2.0

Headers = Iterable[tuple[bytes, bytes]]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a connection comes from, as the transport knows it."""

    address: str
    """IP address; empty when the peer is gone already."""
    certificate: bytes | None
    """The verified client certificate, DER; None on a connection without TLS."""


class PeerConnection:
    """Reads requests and writes answers, one after the other.

    Guarantees:
        Holds at most about three `READ_BYTES` of a peer's bytes, plus the head's limit. A peer that
        sends or takes less than the limits ask for is cut. What is answered before a request was
        wholly read carries nothing of it.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        limits: GateLimits,
        now: Callable[[], datetime],
    ) -> None:
        """Take over a connection whose TLS handshake, if any, is done.

        Args:
            reader: Of the connection.
            writer: Of the connection.
            limits: Its waits and lengths.
            now: The time, UTC, for the Date of refusals: sites compare their clocks with it.
        """
        self._reader, self._writer, self._limits, self._now = reader, writer, limits, now
        self._clock = asyncio.get_running_loop().time
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.head_bytes_max)
        self._began = self._clock()
        self._fresh = True
        self._held_head = b""
        self._method = b""
        self.waiting = True
        """Between requests: closing it now loses nothing."""
        self.last = False
        """Set it, and the connection closes after the answer under way."""
        tls = writer.get_extra_info("ssl_object")
        self.source = Source(
            address=str((writer.get_extra_info("peername") or ("",))[0]),
            certificate=None if tls is None else tls.getpeercert(binary_form=True),
        )

    async def head(self) -> h11.Request | None:
        """Return the next request's head; None when the peer is done, or silent for long.

        Raises:
            Denied: What came is no HTTP request, is too long, or comes too slowly.
        """
        limits = self._limits
        self.waiting = True
        begun = bool(self._h11.trailing_data[0])
        wait_s = limits.head_s_max if begun or self._fresh else limits.idle_s_max
        deadline = self._clock() + wait_s
        self._fresh = False
        while True:
            event = self._next_event()
            if isinstance(event, h11.Request):
                self.waiting, self._method = False, bytes(event.method)
                # h11 looks at the length of incomplete heads alone.
                lengths = [len(name) + len(value) for name, value in event.headers]
                if len(event.target) + sum(lengths) > limits.head_bytes_max:
                    raise Denied("head-size")
                return event
            if isinstance(event, h11.ConnectionClosed):
                return None
            try:
                piece = await self._read(deadline - self._clock())
            except Denied:
                if begun:
                    raise
                return None
            if piece and not begun:
                begun = True
                deadline = min(deadline, self._clock() + limits.head_s_max)
            self._h11.receive_data(piece)

    async def body(self, *, bytes_max: int) -> AsyncIterator[bytes]:
        """Yield the body of the request whose head was read.

        Raises:
            Denied: It is longer than `bytes_max`, malformed, or too slow; or the peer is gone.
        """
        limits = self._limits
        seen, waited_s = 0, 0.0
        while True:
            event = self._next_event()
            if isinstance(event, h11.Data):
                seen += len(event.data)
                if seen > bytes_max:
                    raise Denied("body-size")
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return
            elif event is h11.NEED_DATA:
                # Only time spent waiting for the peer counts: what lies behind may be slow.
                left_s = limits.stall_s_max + seen / limits.bytes_per_s_min - waited_s
                began = self._clock()
                piece = await self._read(min(limits.stall_s_max, left_s))
                waited_s += self._clock() - began
                if not piece:
                    raise Denied("gone")
                self._h11.receive_data(piece)
            else:
                raise Denied("malformed")

    def begin(self, status: int, headers: Headers) -> None:
        """Begin an answer; its head goes out with the first of `write` or `end`."""
        response = h11.Response(status_code=status, headers=list(headers))
        self._held_head = self._h11.send(response) or b""

    async def write(self, piece: bytes) -> None:
        """Write a piece of the answer's body, once the peer has taken what was before it."""
        await self._send(h11.Data(data=piece))

    async def end(self) -> bool:
        """End the answer; True when the connection can take another request."""
        await self._send(h11.EndOfMessage())
        return await self._ready()

    async def deny(self, denied: Denied) -> bool:
        """Answer with a refusal, unless an answer has begun; True as `end`."""
        if self._h11.our_state not in (h11.IDLE, h11.SEND_RESPONSE) or denied.reason == "gone":
            return False
        ending = denied.reason in ENDING
        headers = [
            (b"date", format_datetime(self._now(), usegmt=True).encode()),
            (b"content-type", b"text/plain"),
            (b"content-length", b"%d" % len(denied.body)),
        ]
        if ending:
            headers.append((b"connection", b"close"))
        try:
            self.begin(denied.status, headers)
            if self._method != b"HEAD":
                await self.write(denied.body)
            await self._send(h11.EndOfMessage())
            return not ending and await self._ready()
        except (Denied, h11.LocalProtocolError):
            return False

    async def close(self) -> None:
        """Close the connection, politely for a moment."""
        self._writer.close()
        try:
            async with asyncio.timeout(CLOSE_S_MAX):
                await self._writer.wait_closed()
        except (TimeoutError, OSError):
            self.abort()

    def abort(self) -> None:
        """Close the connection at once."""
        self._writer.transport.abort()

    async def _ready(self) -> bool:
        """Read what is left of the request, within limits, and prepare for the next."""
        if self._h11.their_state is h11.SEND_BODY:
            try:
                async with asyncio.timeout(self._limits.stall_s_max):
                    async for _ in self.body(bytes_max=DISCARD_BYTES_MAX):
                        pass
            except (Denied, TimeoutError):
                return False
        old = self._clock() - self._began > self._limits.connection_s_max
        if old or self.last or {self._h11.our_state, self._h11.their_state} != {h11.DONE}:
            return False
        self._h11.start_next_cycle()
        return True

    def _next_event(self) -> object:
        try:
            return self._h11.next_event()
        except h11.RemoteProtocolError as error:
            hint = error.error_status_hint
            raise Denied("head-size" if hint == 431 else "malformed") from None

    async def _read(self, wait_s: float) -> bytes:
        try:
            async with asyncio.timeout(max(wait_s, 0)):
                return await self._reader.read(READ_BYTES)
        except TimeoutError:
            raise Denied("too-slow") from None
        except OSError:  # ssl.SSLError is one
            raise Denied("gone") from None

    async def _send(self, event: h11.Event) -> None:
        content = self._held_head + (self._h11.send(event) or b"")
        self._held_head = b""
        try:
            if content:
                self._writer.write(content)
            async with asyncio.timeout(self._limits.stall_s_max):
                await self._writer.drain()
        except TimeoutError:
            raise Denied("too-slow") from None
        except OSError:
            raise Denied("gone") from None
