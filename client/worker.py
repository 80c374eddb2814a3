"""Worker: the resident process of a site; it holds model and records and answers on a unix socket.

`python -m intramural.client.worker --site site.toml`, kept running by the site's supervisor. There
is no TCP: whoever may open the socket's folder, the site's own user, may ask.
"""

import argparse
import ctypes
import logging
import os
import resource
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

import grpc  # type: ignore[import-untyped]
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from intramural.client.frames import (
    FRAME_BYTES_MAX,
    METHOD,
    SERVICE,
    frames_of,
    read_opening,
    read_vector,
)
from intramural.core.errors import ConfigError, IntramuralError, WireError
from intramural.core.files import Held, exclusive, make_folder
from intramural.core.letter import Letter
from intramural.core.site import load_site
from intramural.trust.keys import PASSPHRASE

log = logging.getLogger("intramural.client.worker")  # not __main__, as which it runs

SOCKET_PATH_BYTES_MAX = 103 if sys.platform == "darwin" else 107
"""What fits into the system's `sockaddr_un`, without its closing zero."""
OWNER_ONLY, SOCKET_MODE = 0o700, 0o600
PR_SET_DUMPABLE = 4
READ_S = 300.0
"""How long a letter may take to come in; what stops in the middle holds up the others."""
GRACE_S = 10.0
"""How long a worker that is told to stop waits for its answer; then it abandons it, charged."""
WAITING_MAX = 4
"""Letters that wait for their turn, unread; Flower sends one at a time."""


class Answers(Protocol):
    """What answers letters; `desk.Desk` is it."""

    def answer(self, manifest: str, letter: Letter) -> Letter:
        """Return the answer; never raises."""

    def refuse(self, error: Exception, *, answers: str | None) -> Letter:
        """Return the refusal of a letter that could not be read."""


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """Where a worker listens, and within which bounds."""

    socket: Path
    lock: Path
    """File whose lock says that this site has a worker."""
    vector_bytes_max: int
    read_s: float = READ_S
    grace_s: float = GRACE_S


def state_folder(site_file: Path) -> Path:
    """Return the folder in which a site keeps what it does."""
    return site_file.resolve().parent / "state"


def socket_file(site_file: Path) -> Path:
    """Return where a site's worker listens unless told otherwise."""
    return state_folder(site_file) / "worker" / "worker.sock"


def address_of(path: Path) -> str:
    """Return a socket's gRPC address, for `worker` in the node's configuration."""
    return "unix:" + quote(str(path.resolve()))


def serve(
    settings: WorkerSettings,
    open_desk: Callable[[], AbstractContextManager[Answers]],
    *,
    stop: threading.Event,
) -> None:
    """Answer letters until `stop` is set; an answer that takes too long then ends the process.

    Args:
        settings: Where, and within which bounds.
        open_desk: Called once this process is known to be the site's only worker.
        stop: Set by whoever ends the worker, such as a signal's handler.

    Raises:
        ConfigError: The socket cannot be there, or the site has a worker already.
    """
    check_socket_path(settings.socket)
    with _only_worker(settings.lock), open_desk() as desk:
        clerk = _Clerk(desk, settings)
        server = grpc.server(
            ThreadPoolExecutor(max_workers=WAITING_MAX + 4),  # 1 answered, 3 for health
            options=[("grpc.max_receive_message_length", FRAME_BYTES_MAX)],
        )
        server.add_generic_rpc_handlers((clerk,))
        condition = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(condition, server)
        _bind(server, settings.socket)
        server.start()
        condition.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        condition.set("", health_pb2.HealthCheckResponse.SERVING)
        log.info("worker %d listens", os.getpid())
        stop.wait()
        condition.enter_graceful_shutdown()
        until_s = time.monotonic() + settings.grace_s
        server.stop(settings.grace_s).wait()
        settings.socket.unlink(missing_ok=True)
        log.info("worker %d stops", os.getpid())
        # also an answer whose asker is gone is worth its end: it is stored for the next one
        if not clerk.is_done(within_s=until_s - time.monotonic()):
            log.warning("an answer is abandoned; what it charged stays charged")
            logging.shutdown()
            os._exit(0)


class _Clerk(grpc.GenericRpcHandler):  # type: ignore[misc]  # gRPC knows its handlers by this base
    """Takes letters from the socket to the desk, one at a time."""

    def __init__(self, desk: Answers, settings: WorkerSettings) -> None:
        self._desk = desk
        self._settings = settings
        self._turn = threading.Lock()
        self._waiting = threading.BoundedSemaphore(1 + WAITING_MAX)
        # one thread for all answers: each thread that trains has threads of its own in OpenMP
        self._thread = ThreadPoolExecutor(max_workers=1)

    def is_done(self, *, within_s: float) -> bool:
        """Wait for the answer that is being made; False when it takes longer. None is made after.

        Its thread would hold up the process's exit for as long as it trains.
        """
        return self._turn.acquire(timeout=max(0.0, within_s))

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """Return the handler of the one method there is; its messages stay bytes."""
        if details.method != METHOD:
            return None
        return grpc.stream_stream_rpc_method_handler(self._handle)

    def _handle(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        if not self._waiting.acquire(blocking=False):
            context.abort(grpc.StatusCode.UNAVAILABLE, "too many letters wait")
        try:
            with self._turn:  # not read before: letters wait in the sender's memory
                answer = self._answer(frames, context) if context.is_active() else None
            if answer is not None:
                return frames_of(answer)
        except Exception as error:  # noqa: BLE001 (gRPC would log its text, which could quote a record)
            log.error("a letter was dropped: %s", type(error).__name__)
        finally:
            self._waiting.release()
        context.abort(grpc.StatusCode.INTERNAL, "no answer; see the worker's log")
        raise AssertionError("abort raises")

    def _answer(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Letter:
        answers = None
        try:
            with _cut_off(context, after_s=self._settings.read_s):
                opening = read_opening(frames, vector_bytes_max=self._settings.vector_bytes_max)
                letter = Letter(header=opening.header, seal=opening.seal)
                answers = letter.digest
                vector = read_vector(frames, opening)
        except WireError as error:
            return self._desk.refuse(error, answers=answers)
        letter = Letter(header=opening.header, vector=vector, seal=opening.seal)
        del vector
        return self._thread.submit(self._desk.answer, opening.manifest or "", letter).result()


@contextmanager
def _cut_off(context: grpc.ServicerContext, *, after_s: float) -> Iterator[None]:
    """End a call whose sender stops in the middle."""
    timer = threading.Timer(after_s, context.cancel)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _only_worker(lock: Path) -> Iterator[None]:
    try:
        with exclusive(lock):
            yield
    except Held:
        raise ConfigError(
            f"{lock}: another worker of this site runs; stop it, or wait for it to end"
        ) from None


def check_socket_path(path: Path) -> None:
    """Refuse a socket where the system or other users would spoil it; make its folder.

    Raises:
        ConfigError: Its path is too long, or others may enter its folder.
    """
    size = len(os.fsencode(path.resolve()))
    if size > SOCKET_PATH_BYTES_MAX:
        raise ConfigError(
            f"{path}: a socket's path has at most {SOCKET_PATH_BYTES_MAX} bytes, this one has "
            f"{size}; move the site's folder to a shorter path, or name one with --socket"
        )
    folder = path.resolve().parent
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(mode=OWNER_ONLY, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & ~OWNER_ONLY:
        raise ConfigError(
            f"{folder}: others may enter the socket's folder; run `chmod 700 {folder}`, or name a "
            "socket in a folder of your own with --socket"
        )


def _bind(server: grpc.Server, path: Path) -> None:
    """Listen on a socket that its owner alone may open; one that a dead worker left is replaced."""
    _clear(path)
    mask = os.umask(0o777 & ~SOCKET_MODE)  # gRPC makes the file, with whatever mode is left
    try:
        server.add_insecure_port(address_of(path))
    except RuntimeError:
        raise ConfigError(f"{path}: cannot listen there; name another with --socket") from None
    finally:
        os.umask(mask)
    path.chmod(SOCKET_MODE)


def _clear(path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigError(f"{path}: is there and is no socket; move it away")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path.resolve()))
        except OSError:  # nobody listens: its process is dead
            path.unlink()
            return
    raise ConfigError(f"{path}: another process listens there; name another with --socket")


def main(words: list[str] | None = None) -> int:
    """Run a site's worker until SIGTERM; an expected error is one line and an exit code."""
    parser = argparse.ArgumentParser(prog="intramural.client.worker", description=__doc__)
    parser.add_argument("--site", type=Path, required=True, help="the site's site.toml")
    parser.add_argument("--socket", type=Path, help="where to listen; default: under state/")
    told = parser.parse_args(words)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("intramural").setLevel(logging.INFO)  # of other libraries, no chatter
    _forbid_dumps()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        run(told.site, told.socket or socket_file(told.site), stop=stop)
    except IntramuralError as error:
        print(f"intramural: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _forbid_dumps() -> None:
    """Have no core dump of this process, in a file or into a pipe: it would hold records."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0)  # the limit alone lets pipes through


def run(site_file: Path, path: Path, *, stop: threading.Event) -> None:
    """Serve one member site on the socket at `path`."""
    settings = WorkerSettings(
        socket=path,
        lock=state_folder(site_file) / "worker.lock",
        vector_bytes_max=load_site(site_file).policy.payload_bytes_max,
    )
    serve(settings, lambda: _desk(site_file), stop=stop)


def _desk(site_file: Path) -> AbstractContextManager[Answers]:
    from intramural.client.desk import open_desk  # here: it imports torch, which takes seconds

    return closing(open_desk(site_file, passphrase=os.environ.get(PASSPHRASE) or None))


if __name__ == "__main__":
    sys.exit(main())
