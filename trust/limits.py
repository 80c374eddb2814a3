"""Limits: how much of a gate one peer may use, and the quota that holds it to that."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from intramural.core.errors import ConfigError
from intramural.trust.denial import Denied

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class GateLimits:
    """What a gate takes from its peers and from what lies behind it; all above 0."""

    head_bytes_max: int = 16 * 1024
    """Request line and headers."""
    small_bytes_max: int = MIB
    """Body of a request or an answer that carries no object (parsing costs more than its bytes)."""
    body_bytes_max: int = 64 * MIB
    """Body that carries an object; Flower cuts arrays into objects of 5 MiB."""
    handshake_s_max: float = 10.0
    """From the connection to the end of TLS's handshake."""
    head_s_max: float = 10.0
    """From a request's first byte, or the connection, to the end of its headers."""
    stall_s_max: float = 20.0
    """Longest wait for a peer to send, or take, the next bytes."""
    bytes_per_s_min: int = 1024
    """Slowest average at which a body may come, once `stall_s_max` is used up."""
    idle_s_max: float = 75.0
    """Longest wait for the next request on a connection."""
    connection_s_max: float = 3600.0
    """Age at which a connection is closed after an answer, so that certificates are looked at."""
    connections_max: int = 1024
    """Of all peers."""
    connections_per_peer_max: int = 32
    """Of one peer; those without a known certificate count as one."""
    requests_at_once_max: int = 16
    """Of one peer; Flower's SuperNode uses 4."""
    requests_per_s: float = 50.0
    """Of one peer, in the long run."""
    requests_burst: int = 200
    """Of one peer, after a pause."""
    connect_s_max: float = 5.0
    """To reach what lies behind the gate."""
    answer_s_max: float = 60.0
    """Longest wait for the next bytes of an answer from behind the gate."""
    retry_s: float = 1.0
    """After a failed connection, how long requests are refused without another try."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ConfigError(f"{field.name} must be above 0, got {value!r}")


class TokenBucket:
    """Allows so many events at once and so many a second in the long run."""

    def __init__(self, *, per_s: float, burst: int, clock: Callable[[], float]) -> None:
        """Begin full; `clock` gives seconds and never goes back."""
        self._per_s, self._burst, self._clock = per_s, burst, clock
        self._tokens, self._filled = float(burst), clock()

    def take(self) -> bool:
        """Take one token, if there is one."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._filled) * self._per_s)
        self._filled = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class Quota:
    """What each peer has in use. Its memory grows with the peers named, not with requests."""

    def __init__(self, limits: GateLimits, *, clock: Callable[[], float]) -> None:
        """Begin with nothing in use."""
        self._limits, self._clock = limits, clock
        self._connections: defaultdict[str, int] = defaultdict(int)
        self._requests: defaultdict[str, int] = defaultdict(int)
        self._buckets: dict[str, TokenBucket] = {}

    @contextmanager
    def connection(self, peer: str) -> Iterator[None]:
        """Hold one of the peer's connections.

        Raises:
            Denied: All are in use.
        """
        with _one_of(self._connections, peer, self._limits.connections_per_peer_max):
            yield

    @contextmanager
    def request(self, peer: str) -> Iterator[None]:
        """Hold one of the peer's requests at once, and use one of those it has a second.

        Raises:
            Denied: All are in use, or used up.
        """
        if peer not in self._buckets:
            self._buckets[peer] = TokenBucket(
                per_s=self._limits.requests_per_s,
                burst=self._limits.requests_burst,
                clock=self._clock,
            )
        if not self._buckets[peer].take():
            raise Denied("rate")
        with _one_of(self._requests, peer, self._limits.requests_at_once_max):
            yield


@contextmanager
def _one_of(in_use: defaultdict[str, int], peer: str, most: int) -> Iterator[None]:
    if in_use[peer] >= most:
        raise Denied("busy")
    in_use[peer] += 1
    try:
        yield
    finally:
        in_use[peer] -= 1
