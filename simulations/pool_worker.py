"""Pool worker: a process that runs messages for its pool, one after the other.

It is told what to run over a socket and answers there; arrays go through shared memory, whose
descriptors the socket hands over. `pool_hand.py` is the other end.
"""

import contextlib
import importlib
import mmap
import os
import pickle
import queue
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from flwr.app import Error, Message, RecordDict
from flwr.app.metadata import Metadata
from flwr.clientapp import ClientApp

from intramural.core.children import die_with_parent
from intramural.core.layout import lent_by
from intramural.core.pages import KEPT_BY_WORKER_BYTES, keep_freed_memory
from intramural.core.threads import beside
from intramural.simulations.broadcast import Block, Form, let_go, put_together, take_apart, write
from intramural.simulations.grid import Nodes, States, be_server_app, message_of, raised

SLOTS = 2
"""Replies of one worker that exist at once: one that is read while the next is made."""
GRACE_S = 1.0
"""How long a worker that is told to end may take for what it is at."""
_HEAD = struct.Struct("<Q?")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a worker is told first."""

    app: str
    """Where the ClientApp is: 'module:attribute'."""
    nodes: int
    run_config: Mapping[str, Any]
    states: Path
    """Folder of the nodes' states, which all workers share."""
    parent: int
    """Process number of the pool."""
    path: tuple[str, ...]
    """Where modules are looked for."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A message to run; a new broadcast block's descriptor comes with it."""

    metadata: Metadata
    form: Form


@dataclass(frozen=True, kw_only=True)
class Freed:
    """A slot that a reply's arrays may be put in again."""

    slot: int
    fresh: bool
    """Whether to make its block anew: the old one is still read."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A message's reply; the descriptor of its slot's block comes with it, if that is new."""

    metadata: Metadata
    found: Form | Error
    slot: int | None
    """Number of the slot that its arrays are in; None: it has none."""
    began_s: float
    """When the app began and ended, by `time.monotonic`."""
    ended_s: float


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The app is imported; `problem` is the type of what it raised, or ''."""

    problem: str
    now_s: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, kw_only=True)
class Begun:
    """The worker is at the next message now."""

    now_s: float = field(default_factory=time.monotonic)


class Line:
    """A socket that carries small values, and with each at most one descriptor."""

    def __init__(self, end: socket.socket) -> None:
        """Take over a connected local stream socket."""
        self.socket = end

    def send(self, value: object, descriptor: int | None = None) -> None:
        """Send a value; the descriptor is open at the other end, too, then.

        Raises:
            OSError: The other end is gone.
        """
        body = pickle.dumps(value)
        head = _HEAD.pack(len(body), descriptor is not None)
        sent = socket.send_fds(self.socket, [head], [] if descriptor is None else [descriptor])
        assert sent == len(head)
        self.socket.sendall(body)

    def receive(self) -> tuple[Any, int | None]:
        """Wait for a value; return it and its descriptor, or None.

        Raises:
            EOFError: The other end is gone.
        """
        try:
            head, descriptors, _, _ = socket.recv_fds(self.socket, _HEAD.size, 1)
            head += self._read(_HEAD.size - len(head))
            size, _ = _HEAD.unpack(head)
            body = self._read(size)
        except OSError:
            raise EOFError from None
        return pickle.loads(body), descriptors[0] if descriptors else None

    def has_more(self) -> bool:
        """Return whether there is something to receive, be it the end."""
        return bool(select.select([self.socket], [], [], 0.0)[0])

    def _read(self, size: int) -> bytes:
        content = bytearray(size)
        view = memoryview(content)
        while view:
            count = self.socket.recv_into(view)
            if not count:
                raise EOFError
            view = view[count:]
        return bytes(content)

    def close(self) -> None:
        """Close this end; the other one reads its end of file."""
        self.socket.close()


class Slots:
    """The blocks that replies' arrays are put in; each grows to the largest reply.

    The one vector of most replies is written there at once: a copy less, and a model's memory less
    in each worker. A slot is chosen when it is written to, of those that the pool has freed by
    then: there is no second block unless the first is still read when the next reply is made. The
    pool sends no more jobs than there are free slots, so there is always one.
    """

    def __init__(self) -> None:
        """Begin with all slots free, and no block."""
        self.freed: queue.SimpleQueue[Freed] = queue.SimpleQueue()
        """What the pool has told, from any thread."""
        self._free = set(range(SLOTS))
        self._chosen: int | None = None
        """Where the reply that is made now goes."""
        self._blocks: dict[int, tuple[Block, mmap.mmap]] = {}
        self._told: set[int] = set()
        """Slots whose blocks the pool has."""

    def lend(self, nbytes: int) -> memoryview:
        """Return the beginning of a slot, which the pool does not read until the reply."""
        return memoryview(self._memory(self._choose(), nbytes))[:nbytes]

    def put(self, form: Form, parts: list[bytes]) -> tuple[int | None, int | None]:
        """Write a reply's arrays to a slot; return it, and the descriptor if its block is new."""
        if not form.nbytes:
            return None, None
        slot = self._choose()
        with memoryview(self._memory(slot, form.nbytes)) as view:
            write(form, parts, view)
        self._free.remove(slot)
        self._chosen = None
        if slot in self._told:
            return slot, None
        self._told.add(slot)
        return slot, self._blocks[slot][0].descriptor

    def _choose(self) -> int:
        """Return the slot of this reply: if there is one, one that has a block."""
        if self._chosen is None:
            with contextlib.suppress(queue.Empty):
                while True:
                    self._take_back(self.freed.get_nowait())
            self._chosen = min(self._free, key=lambda slot: (slot not in self._blocks, slot))
        return self._chosen

    def _take_back(self, freed: Freed) -> None:
        self._free.add(freed.slot)
        if freed.fresh:
            self._drop(freed.slot)

    def _memory(self, slot: int, nbytes: int) -> mmap.mmap:
        """Return the memory of a slot: a new block where there is none, or a small one."""
        if slot in self._blocks and self._blocks[slot][0].nbytes < nbytes:
            self._drop(slot)
        if slot not in self._blocks:
            block = Block.of_size(nbytes)
            self._blocks[slot] = block, block.map(writable=True)
        return self._blocks[slot][1]

    def _drop(self, slot: int) -> None:
        """Forget a slot's block, which is gone with the last who reads it."""
        self._told.discard(slot)
        if slot in self._blocks:
            block, memory = self._blocks.pop(slot)
            let_go(memory)
            block.close()


class Worker:
    """Runs jobs: rebuilds each message, calls the app, and sends the reply."""

    def __init__(self, line: Line, app: ClientApp, home: Nodes, *, slots: Slots) -> None:
        """Answer on `line` for the nodes of `home`; what replies bring goes to `slots`."""
        self._line = line
        self._app = app
        self._home = home
        self._slots = slots
        self._broadcast: mmap.mmap | None = None

    def work(self, job: Job, descriptor: int | None) -> None:
        """Run one job.

        Raises:
            OSError: The pool is gone.
        """
        if descriptor is not None:
            self._broadcast = None  # the old one's memory goes with the last array that reads it
            block = Block(descriptor, os.fstat(descriptor).st_size)
            self._broadcast = block.map()
            block.close()
        self._line.send(Begun())
        message = message_of(job.metadata, self._content(job))
        began_s = time.monotonic()
        with lent_by(self._slots.lend):
            reply = self._home.run(self._app, message)
        ended_s = time.monotonic()
        found: Form | Error
        try:
            found, slot, fresh = self._pack(reply)
        except Exception as error:  # noqa: BLE001 (it does not fit into memory, or is no message)
            reply = Message(raised(error), reply_to=message)
            found, slot, fresh = reply.error, None, None
        answer = Answer(
            metadata=reply.metadata, found=found, slot=slot, began_s=began_s, ended_s=ended_s
        )
        self._line.send(answer, fresh)

    def _content(self, job: Job) -> RecordDict:
        if not job.form.nbytes:
            return put_together(job.form, memoryview(b""))
        assert self._broadcast is not None
        return put_together(job.form, memoryview(self._broadcast))

    def _pack(self, reply: Message) -> tuple[Form | Error, int | None, int | None]:
        """Return what a reply brings, its slot, and the descriptor of a new block."""
        if reply.has_error():
            return reply.error, None, None
        form, parts = take_apart(reply.content)
        return form, *self._slots.put(form, parts)


def main() -> None:
    """Run until the pool closes the socket, whose descriptor is the first argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the pool's to handle
    line = Line(socket.socket(fileno=int(sys.argv[1])))
    setup = cast(Setup, line.receive()[0])
    if sys.platform == "linux":
        die_with_parent()
        if os.getppid() != setup.parent:
            return  # it died before it could be watched
    serve(line, setup)


def serve(line: Line, setup: Setup) -> None:
    """Import the app, and run jobs until the pool closes the socket."""
    sys.path[:] = setup.path
    keep_freed_memory(KEPT_BY_WORKER_BYTES)
    be_server_app()
    jobs: queue.SimpleQueue[tuple[Job, int | None] | None] = queue.SimpleQueue()
    slots = Slots()
    beside(partial(_read, line, jobs, slots))
    try:
        module, _, name = setup.app.partition(":")
        app = getattr(importlib.import_module(module), name)
    except Exception as error:  # noqa: BLE001 (the pool tells the operator)
        line.send(Ready(problem=type(error).__name__))
        return
    home = Nodes(count=setup.nodes, run_config=setup.run_config, states=States(setup.states))
    worker = Worker(line, app, home, slots=slots)
    with contextlib.suppress(OSError):  # the pool is gone: so are we
        line.send(Ready(problem=""))
        while (job := jobs.get()) is not None:
            worker.work(*job)


def _read(
    line: Line, jobs: "queue.SimpleQueue[tuple[Job, int | None] | None]", slots: Slots
) -> None:
    """Hand over what comes when it comes, so that the pool never waits to send; end with it."""
    with contextlib.suppress(EOFError):
        while True:
            value, descriptor = line.receive()
            if isinstance(value, Freed):
                slots.freed.put(value)
            else:
                jobs.put((value, descriptor))
    jobs.put(None)
    time.sleep(GRACE_S)
    os._exit(1)  # it is at a message that nobody waits for
