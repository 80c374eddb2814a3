"""Relay: a TCP relay on loopback whose line can be cut, as a network dies: without a word."""

import contextlib
import selectors
import socket
import threading

CHUNK = 1 << 16
LOOK_S = 0.2


class Relay:
    """Passes connections to another port. Cut, it neither passes bytes nor closes connections."""

    def __init__(self, port: int, *, onward: int) -> None:
        """Listen at `port` of loopback and pass on to `onward`."""
        self._onward = onward
        self._cut = threading.Event()
        self._ended = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", port), backlog=64)
        self._listener.settimeout(LOOK_S)
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Let no byte through from now on."""
        self._cut.set()

    def mend(self) -> None:
        """Let bytes through again."""
        self._cut.clear()

    def close(self) -> None:
        """Stop; connections break off."""
        self._ended.set()
        self._listener.close()

    def _accept(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(TimeoutError, OSError):
                peer, _ = self._listener.accept()
                threading.Thread(target=self._pass, args=(peer,), daemon=True).start()

    def _pass(self, peer: socket.socket) -> None:
        with contextlib.suppress(OSError), peer, socket.socket() as far:
            while self._cut.is_set() and not self._ended.is_set():
                self._ended.wait(LOOK_S)
            far.connect(("127.0.0.1", self._onward))
            with selectors.DefaultSelector() as ready:
                ready.register(peer, selectors.EVENT_READ, far)
                ready.register(far, selectors.EVENT_READ, peer)
                while not self._ended.is_set():
                    for key, _ in ready.select(LOOK_S):
                        if self._cut.is_set():
                            self._ended.wait(LOOK_S)
                            break
                        piece = key.fileobj.recv(CHUNK)  # type: ignore[union-attr]
                        if not piece:
                            return
                        key.data.sendall(piece)
