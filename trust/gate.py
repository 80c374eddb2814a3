"""Gate: a proxy that listens, writes its status now and then, and ends politely when told."""

import asyncio
import json
import logging
import os
import signal
import ssl
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intramural.core.errors import ConfigError, IntramuralError
from intramural.core.files import write_atomic
from intramural.trust.alerts import Alerts, Clock, Sink
from intramural.trust.connection import PeerConnection
from intramural.trust.denial import Denied
from intramural.trust.limits import GateLimits
from intramural.trust.proxy import Proxy
from intramural.trust.upstream import Upstream

log = logging.getLogger(__name__)

GRACE_S = 10.0
"""How long requests under way may go on once the gate is told to end."""
BACKLOG = 256
SETTLE_S = 0.02
SHUTDOWN_S = 1.0
"""How long TLS may take to say goodbye."""


@dataclass(frozen=True, kw_only=True)
class Chore:
    """A file that a gate keeps."""

    path: Path
    """Where; it is replaced atomically."""
    content: Callable[[], bytes]
    """What belongs there; it is written when it is not what was written last."""
    every_s: float
    """How often it is asked."""


class Gate:
    """Owns the listening socket, the connections and the files of one gate."""

    def __init__(
        self,
        *,
        proxy: Proxy,
        upstream: Upstream,
        limits: GateLimits,
        alerts: Alerts,
        tls: ssl.SSLContext | None,
        chores: Sequence[Chore] = (),
    ) -> None:
        """Take the parts; nothing listens yet."""
        self._proxy, self._upstream, self._limits = proxy, upstream, limits
        self._alerts, self._tls, self._chores = alerts, tls, chores
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Task[None], PeerConnection | None] = {}
        self._keeping: list[asyncio.Task[None]] = []
        self._ended = asyncio.Event()

    async def start(self, host: str, port: int) -> int:
        """Listen, and return the port: the one given, or one the system chose for 0.

        Args:
            host: An address of this machine; '0.0.0.0': all of IPv4; '::': all of both families.
            port: See above.

        Raises:
            ConfigError: The address is taken, or is not this machine's.
        """
        is_tls = self._tls is not None
        try:
            self._server = await asyncio.start_server(
                self._accept,
                ["0.0.0.0", "::"] if host == "::" else host,  # asyncio keeps '::' to IPv6
                port,
                backlog=BACKLOG,
                ssl=self._tls,
                ssl_handshake_timeout=self._limits.handshake_s_max if is_tls else None,
                ssl_shutdown_timeout=SHUTDOWN_S if is_tls else None,
            )
        except OSError as error:
            why = error.strerror or "no such address"
            raise ConfigError(
                f"cannot listen at {host}:{port}: {why}; free it, or choose another"
            ) from error
        self._keeping = [asyncio.create_task(self._keep(chore)) for chore in self._chores]
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self, *, grace_s: float = GRACE_S) -> None:
        """Listen no more, let requests under way end for a while, write the files, and close."""
        assert self._server is not None
        self._server.close()
        await asyncio.sleep(SETTLE_S)  # what was accepted a moment ago is in `_open` then
        for task, connection in self._open.items():
            if connection is None or connection.waiting:
                task.cancel()
            else:
                connection.last = True
        if self._open:
            await asyncio.wait(list(self._open), timeout=grace_s)
        for task in self._open:
            task.cancel()
        self._ended.set()
        await asyncio.gather(*self._open, *self._keeping, return_exceptions=True)
        await self._upstream.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._open) >= self._limits.connections_max:
            writer.transport.abort()
            return
        connection = PeerConnection(reader, writer, limits=self._limits, now=self._alerts.now)
        self._open[task] = connection
        try:
            await self._proxy.serve(connection)
        except asyncio.CancelledError:
            connection.abort()
        except Exception as error:  # noqa: BLE001 (one connection's fault must not end the gate)
            log.error("a connection ended by %s", type(error).__name__)
            self._alerts.tell("internal-error", error=type(error).__name__)
            await connection.deny(Denied("internal"))
        finally:
            self._open.pop(task, None)
            await connection.close()

    async def _keep(self, chore: Chore) -> None:
        written = b""
        while True:
            is_last, content = self._ended.is_set(), chore.content()
            if content != written:
                try:
                    await asyncio.to_thread(write_atomic, chore.path, content)
                    written = content
                except OSError as error:
                    self._alerts.tell("cannot-write", file=str(chore.path), why=error.strerror)
            if is_last:
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), chore.every_s)


def status_text(**facts: object) -> bytes:
    """Return a status file's content."""
    return (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode()


def tell_on_stdout(alert: dict[str, Any]) -> None:
    """Write an alert to the standard output, as one line of JSON, at once."""
    with suppress(OSError):  # whoever read along is gone, and the gate is still needed
        os.write(1, json.dumps(alert, ensure_ascii=False).encode() + b"\n")


def run_gate(build: Callable[[Alerts], tuple[Gate, str, int]], *, sink: Sink, now: Clock) -> int:
    """Run a gate as a process until SIGTERM or SIGINT; return the exit code.

    Args:
        build: Returns the gate, and the host and port to listen at.
        sink: Takes alerts; the first tells where the gate listens.
        now: The time.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    alerts = Alerts(sink, now=now)
    try:
        asyncio.run(_run(*build(alerts), alerts))
    except IntramuralError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


async def _run(gate: Gate, host: str, port: int, alerts: Alerts) -> None:
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    alerts.tell("listening", host=host, port=await gate.start(host, port))
    await told.wait()
    await gate.stop()
