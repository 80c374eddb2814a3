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
    slot: int
    """Number of the block to put the reply's arrays in."""
    fresh: bool
    """Whether to make that block anew: the pool still reads the old one."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A message's reply; the descriptor of its slot's block comes with it, if that is new."""

    metadata: Metadata
    found: Form | Error
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

    A job is lent its slot, so that the one vector of most replies is written there at once: a copy
    less, and a model's memory less in each worker.
    """

    def __init__(self) -> None:
        """Begin without any."""
        self._blocks: dict[int, tuple[Block, mmap.mmap]] = {}
        self._is_told: dict[int, bool] = {}
        """Of each slot: whether the pool has its block."""

    def lend(self, job: Job, nbytes: int) -> memoryview:
        """Return the beginning of the job's slot, which the pool does not read until the reply."""
        return memoryview(self._memory(job, nbytes))[:nbytes]

    def put(self, form: Form, parts: list[bytes], job: Job) -> int | None:
        """Write a reply's arrays to the job's slot; return the descriptor if the block is new."""
        if not form.nbytes:
            return None
        with memoryview(self._memory(job, form.nbytes)) as view:
            write(form, parts, view)
        is_told, self._is_told[job.slot] = self._is_told[job.slot], True
        return None if is_told else self._blocks[job.slot][0].descriptor

    def _memory(self, job: Job, nbytes: int) -> mmap.mmap:
        """Return the memory of the job's slot: a new block where the old one is small, or read."""
        found = self._blocks.get(job.slot)
        is_stale = job.fresh and self._is_told[job.slot]
        if found is not None and not is_stale and found[0].nbytes >= nbytes:
            return found[1]
        if found is not None:
            del self._blocks[job.slot]
            let_go(found[1])
            found[0].close()
        block = Block.of_size(nbytes)
        memory = block.map(writable=True)
        self._blocks[job.slot] = block, memory
        self._is_told[job.slot] = False
        return memory


class Worker:
    """Runs jobs: rebuilds each message, calls the app, and sends the reply."""

    def __init__(self, line: Line, app: ClientApp, home: Nodes) -> None:
        """Answer on `line` for the nodes of `home`."""
        self._line = line
        self._app = app
        self._home = home
        self._slots = Slots()
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
        with lent_by(partial(self._slots.lend, job)):
            reply = self._home.run(self._app, message)
        ended_s = time.monotonic()
        try:
            found, fresh = self._pack(reply, job)
        except Exception as error:  # noqa: BLE001 (it does not fit into memory, or is no message)
            reply = Message(raised(error), reply_to=message)
            found, fresh = reply.error, None
        answer = Answer(metadata=reply.metadata, found=found, began_s=began_s, ended_s=ended_s)
        self._line.send(answer, fresh)

    def _content(self, job: Job) -> RecordDict:
        if not job.form.nbytes:
            return put_together(job.form, memoryview(b""))
        assert self._broadcast is not None
        return put_together(job.form, memoryview(self._broadcast))

    def _pack(self, reply: Message, job: Job) -> tuple[Form | Error, int | None]:
        if reply.has_error():
            return reply.error, None
        form, parts = take_apart(reply.content)
        return form, self._slots.put(form, parts, job)


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
    beside(partial(_read, line, jobs))
    try:
        module, _, name = setup.app.partition(":")
        app = getattr(importlib.import_module(module), name)
    except Exception as error:  # noqa: BLE001 (the pool tells the operator)
        line.send(Ready(problem=type(error).__name__))
        return
    home = Nodes(count=setup.nodes, run_config=setup.run_config, states=States(setup.states))
    worker = Worker(line, app, home)
    with contextlib.suppress(OSError):  # the pool is gone: so are we
        line.send(Ready(problem=""))
        while (job := jobs.get()) is not None:
            worker.work(*job)


def _read(line: Line, jobs: "queue.SimpleQueue[tuple[Job, int | None] | None]") -> None:
    """Hand jobs over as they come, so that the pool never waits to send; end with the pool."""
    with contextlib.suppress(EOFError):
        while True:
            jobs.put(line.receive())
    jobs.put(None)
    time.sleep(GRACE_S)
    os._exit(1)  # it is at a message that nobody waits for
