"""Thin: hands a letter to the site's resident worker and brings back its answer, both unread.

Flower starts a process per message. This is all it does at a deployed site: no torch, no records.
"""

import logging
import time
from collections.abc import Callable

import grpc  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from intramural.client.frames import FRAME_BYTES_MAX, METHOD, SERVICE, frames_of, read_letter
from intramural.core.errors import ConfigError, WireError
from intramural.core.letter import Letter, write_letter
from intramural.core.messages import Refusal

log = logging.getLogger(__name__)

SCHEME = "unix:"
WAIT_S = 120.0
"""How long a worker may be away, each time: its supervisor starts it again, and it loads torch."""
SENDS_MAX = 3
"""How often a letter is sent: one over which the worker dies so often is at fault itself."""
PAUSE_S = 0.2
AWAY = "worker-away"
"""Reason of the refusal that stands for an answer."""
OPTIONS = (
    ("grpc.max_receive_message_length", FRAME_BYTES_MAX),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),  # no pause inherited from a channel before
)
_LOST = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
"""What a call ends with when the worker dies or is stopped."""


def ask(
    address: str,
    manifest: str,
    letter: Letter,
    *,
    wait_s: float = WAIT_S,
    clock: Callable[[], float] = time.monotonic,
) -> Letter:
    """Return the worker's answer to a letter, or an unsealed refusal while it stays away.

    An answer takes as long as it takes. A worker that dies meanwhile is waited for and sent the
    very same letter again: it re-sends the answer it stored, or computes it under a new charge.

    Args:
        address: The worker's socket, as the node's own configuration names it.
        manifest: The run's manifest in its envelope.
        letter: Passed on unread.
        wait_s: How long the worker may be away, each time.
        clock: Monotonic seconds.

    Raises:
        ConfigError: The address is not that of a unix socket.
        WireError: A part of the letter is too long, or what came back is no letter.
    """
    if not address.startswith(SCHEME):
        raise ConfigError("the node's worker is not a unix: address; no other is used")
    for _ in range(SENDS_MAX):
        with _channel(address) as channel:
            if not _waited(channel, until_s=clock() + wait_s, clock=clock):
                break
            answer = _sent(channel, manifest, letter)
        if answer is not None:
            return answer
        log.warning("the worker was lost over a letter; it is waited for")
        time.sleep(PAUSE_S)
    detail = "the site's worker does not answer; its own log says why"
    refusal = Refusal(site="unknown", reason=AWAY, detail=detail)
    return write_letter(refusal, answers=letter.digest)


def is_serving(address: str, *, timeout_s: float = 1.0) -> bool:
    """Return whether a worker takes letters at an address now."""
    with _channel(address) as channel:
        return _checked(channel, timeout_s=timeout_s, wait=False)


def _channel(address: str) -> grpc.Channel:
    return grpc.insecure_channel(address, options=OPTIONS)


def _waited(channel: grpc.Channel, *, until_s: float, clock: Callable[[], float]) -> bool:
    """Wait for the worker; False when it did not come in time."""
    while (left_s := until_s - clock()) > 0:
        if _checked(channel, timeout_s=left_s, wait=True):
            return True
        time.sleep(min(PAUSE_S, left_s))
    return False


def _checked(channel: grpc.Channel, *, timeout_s: float, wait: bool) -> bool:
    check = health_pb2_grpc.HealthStub(channel).Check
    request = health_pb2.HealthCheckRequest(service=SERVICE)
    try:
        status = check(request, timeout=timeout_s, wait_for_ready=wait).status
    except grpc.RpcError:
        return False
    return bool(status == health_pb2.HealthCheckResponse.SERVING)


def _sent(channel: grpc.Channel, manifest: str, letter: Letter) -> Letter | None:
    """Return the worker's answer, or None when the worker was lost over it."""
    frames = frames_of(letter, manifest=manifest)
    call = channel.stream_stream(METHOD)(frames)
    try:
        # an update has the layout of the vector that was asked with
        return read_letter(call, vector_bytes_max=len(letter.vector or b""))
    except grpc.RpcError as error:
        if error.code() in _LOST:
            return None
        name = error.code().name
        raise WireError(f"the site's worker failed ({name}); its own log says why") from None
    finally:
        call.cancel()
