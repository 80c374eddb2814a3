"""Tap: a relay on loopback that keeps every byte that passes, in files; needs no root."""

import contextlib
import itertools
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PIECE_BYTES = 1 << 16
WAIT_S = 15.0
CLOSE_S = 5.0

Address = int | Path
"""A port of 127.0.0.1, or a unix socket's path."""


class Tap:
    """Passes connections on and writes what each end said to `NUMBER.up` and `NUMBER.down`."""

    def __init__(self, listen: Address, target: Address, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self._target = target
        self._numbers = itertools.count(1)
        self._server = _socket_of(listen)
        if isinstance(listen, int):
            self._server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._server.bind(_name_of(listen))
        self._server.listen(64)

    def serve(self) -> None:
        """Take connections until the tap is closed."""
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._relay, args=(near,), daemon=True).start()

    def close(self) -> None:
        """Take no more connections; those that are open end with their ends."""
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # wakes whoever is in accept()
        self._server.close()

    def said(self, direction: str = "*") -> bytes:
        """Return all that passed, connection by connection; 'up' is from who dialled."""
        paths = sorted(self.folder.glob(f"*.{direction}"))
        return b"\n".join(path.read_bytes() for path in paths)

    def _relay(self, near: socket.socket) -> None:
        far = _socket_of(self._target)
        name = f"{next(self._numbers):05d}"
        with near, far:
            try:
                far.settimeout(WAIT_S)
                far.connect(_name_of(self._target))
                far.settimeout(None)
            except OSError:
                return  # nobody is there yet: the near end sees its connection closed
            back = threading.Thread(
                target=_pump, args=(far, near, self.folder / f"{name}.down"), daemon=True
            )
            back.start()
            _pump(near, far, self.folder / f"{name}.up")
            back.join()


def _pump(source: socket.socket, target: socket.socket, path: Path) -> None:
    how = socket.SHUT_RDWR
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while piece := source.recv(PIECE_BYTES):
            file.write(piece)
            target.sendall(piece)
        how = socket.SHUT_WR  # the source has said all; the target may go on
    for end in (target, source) if how == socket.SHUT_RDWR else (target,):
        with contextlib.suppress(OSError):
            end.shutdown(how)


@contextmanager
def tapped(listen: Address, target: Address, folder: Path) -> Iterator[Tap]:
    """Have a tap within the block."""
    tap = Tap(listen, target, folder)
    thread = threading.Thread(target=tap.serve, daemon=True)
    thread.start()
    try:
        yield tap
    finally:
        tap.close()
        thread.join(CLOSE_S)
        assert not thread.is_alive()


def _socket_of(address: Address) -> socket.socket:
    return socket.socket(socket.AF_INET if isinstance(address, int) else socket.AF_UNIX)


def _name_of(address: Address) -> tuple[str, int] | str:
    return ("127.0.0.1", address) if isinstance(address, int) else str(address)
