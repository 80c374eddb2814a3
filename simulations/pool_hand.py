"""Pool hand: the pool's end of one worker process: what it is at, and its two slots.

A hand's messages are sent in their order, and no more than there are free slots for their replies.
So a worker never waits for a slot, and the message whose reply is wanted next is always under way.
"""

import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from intramural.core.errors import ConfigError, RoundError
from intramural.simulations.broadcast import Form, put_together
from intramural.simulations.grid import message_of
from intramural.simulations.pool_blocks import Parcel, Slot
from intramural.simulations.pool_nursery import Forked, Nursery
from intramural.simulations.pool_worker import (
    SLOTS,
    Answer,
    Begun,
    Freed,
    Job,
    Line,
    Ready,
    Setup,
)

START_S = 300.0
"""How long a worker may take to import the app."""
STARTS_MAX = 2
"""Starts in a row that may come to nothing before the run ends."""
SENDINGS_MAX = 2
"""Times a message is sent to a worker that dies before it is at it."""
STOP_S = 3.0
CODE = "from intramural.simulations import pool_worker; pool_worker.main()"


@dataclass(kw_only=True, eq=False)
class Task:
    """A message on its way through the pool."""

    number: int
    message: Message
    hand: "Hand"
    form: Form
    parcel: Parcel | None = None
    """What its arrays are in; None: it has none, or needs them no more."""
    wanted: bool = True
    """Whether anybody may still ask for the reply."""
    sent_s: float = 0.0
    sendings: int = 0
    """Times it was sent to a worker that died."""
    answer: Answer | None = None
    memory: mmap.mmap | None = None
    """The reply's arrays."""
    slot: Slot | None = None
    """Where they are."""
    error: Error | None = None
    """Why there is no answer and will be none."""
    began_s: float = field(default_factory=time.monotonic)
    ended_s: float = field(default_factory=time.monotonic)

    @property
    def is_done(self) -> bool:
        """Whether its reply can be read."""
        return self.answer is not None or self.error is not None

    def reply(self) -> Message:
        """Return the reply; its arrays are in the slot."""
        if self.answer is None:
            assert self.error is not None
            return Message(self.error, reply_to=self.message)
        found = self.answer.found
        if isinstance(found, Form):
            memory = memoryview(b"" if self.memory is None else self.memory)
            return message_of(self.answer.metadata, put_together(found, memory))
        return message_of(self.answer.metadata, found)

    def finish(self, *, began_s: float, ended_s: float) -> None:
        """Note that it is done: it needs what was sent no more."""
        self.began_s, self.ended_s = began_s, ended_s
        if self.parcel is not None:
            self.parcel.leave()
            self.parcel = None

    def release(self) -> None:
        """Free the slot: the reply has been read, or nobody will read it."""
        slot, memory = self.slot, self.memory
        self.slot = self.memory = None
        if slot is not None and memory is not None:
            slot.let_go(memory)


class Hand:
    """One worker process, started again when it dies."""

    def __init__(
        self,
        number: int,
        setup: Setup,
        *,
        environment: Mapping[str, str],
        log: Path | None,
        nursery: Nursery | None = None,
    ) -> None:
        """Start worker `number`; does not wait for it. Its output goes to `log`, or is ours.

        With a nursery it is a copy of that.
        """
        self._nursery = nursery
        self.number = number
        self._setup = setup
        self._environment = environment
        self._log = log
        self._starts = 0
        self.waiting: deque[Task] = deque()
        """Not sent yet, in order."""
        self.sent: deque[Task] = deque()
        """Sent and not answered, in order: the worker is at the first."""
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = self._process(theirs)
        self.line = Line(ours)
        self.slots = [Slot(number) for number in range(SLOTS)]
        self.is_ready = False
        self._parcel = -1
        self._free_s = time.monotonic()
        self._begun_s: float | None = None
        self._starts += 1
        with suppress(OSError):  # it is gone already: `receive` will notice
            self.line.send(self._setup)

    def _process(self, end: socket.socket) -> "subprocess.Popen[bytes] | Forked":
        """Return a new process that answers at `end`."""
        if self._nursery is not None:
            return self._nursery.fork(end, environment=self._environment, log=self._log)
        output = 2
        if self._log is not None:
            output = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            return subprocess.Popen(
                [sys.executable, "-P", "-c", CODE, str(end.fileno())],
                env={**os.environ, **self._environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[end.fileno()],
                start_new_session=True,  # Ctrl-C at the terminal is not for it
            )
        finally:
            if output != 2:
                os.close(output)

    def feed(self) -> None:
        """Tell which slots are free, and send messages while there are such for their replies.

        If the worker is gone, `receive` will notice.
        """
        free = [slot for slot in self.slots if slot.is_free]
        with suppress(OSError):
            for slot in free:
                if not slot.is_told:
                    self.line.send(Freed(slot=slot.number, fresh=slot.fresh))
                    slot.is_told, slot.fresh = True, False
            while self.waiting and len(self.sent) < len(free):
                self._send(self.waiting[0])

    def _send(self, task: Task) -> None:
        descriptor = None
        if task.parcel is not None and task.parcel.number != self._parcel:
            descriptor = task.parcel.block().descriptor
        self.line.send(Job(metadata=task.message.metadata, form=task.form), descriptor)
        if task.parcel is not None:
            self._parcel = task.parcel.number
        task.sent_s = time.monotonic()
        self.sent.append(self.waiting.popleft())

    def receive(self) -> None:
        """Take what the worker has to say.

        Raises:
            EOFError: It is gone.
            ConfigError: It cannot import the app.
        """
        value, descriptor = self.line.receive()
        if isinstance(value, Ready):
            if value.problem:
                raise ConfigError(
                    f"{self._setup.app} cannot be imported by a worker: {value.problem}; name an "
                    "app as 'module:attribute'"
                )
            self.is_ready, self._starts, self._free_s = True, 0, value.now_s
            return
        if isinstance(value, Begun):
            self._begun_s = value.now_s
            return
        answer: Answer = value
        task = self.sent.popleft()
        if answer.slot is not None:
            task.slot = self.slots[answer.slot]
            task.memory = task.slot.fill(descriptor)
        task.answer, self._free_s, self._begun_s = answer, answer.ended_s, None
        task.finish(began_s=answer.began_s, ended_s=answer.ended_s)
        if not task.wanted:
            task.release()
            self.feed()

    def due_s(self, limit_s: float | None) -> float:
        """Return when the worker will have taken too long, by `time.monotonic`."""
        if not self.is_ready:
            return self._free_s + START_S
        if limit_s is None or not self.sent:
            return float("inf")
        return self._since_s(self.sent[0]) + limit_s

    def _since_s(self, first: Task) -> float:
        """Return since when the worker is at the first of what was sent, or could be."""
        return self._begun_s or max(first.sent_s, self._free_s)

    def restart(self, *, late: bool) -> None:
        """End what is left of the worker and start it anew; the message it was at fails.

        Args:
            late: It took longer than it may, and did not die by itself.

        Raises:
            RoundError: It ended again before it was ready.
        """
        self.end()
        if self.is_ready and self.sent:
            self.sent[0].sendings += 1
            if late or self._begun_s is not None or self.sent[0].sendings >= SENDINGS_MAX:
                self._fail(self.sent.popleft(), late=late)
        elif self._starts >= STARTS_MAX:
            raise RoundError(
                f"worker {self.number} ended {self._starts} times before it was ready; see its "
                "output, and use fewer workers if memory is short"
            )
        while self.sent:  # it had them only waiting
            self.waiting.appendleft(self.sent.pop())
        self._start()
        self.feed()

    def _fail(self, task: Task, *, late: bool) -> None:
        code = ErrorCode.REPLY_MESSAGE_UNAVAILABLE if late else ErrorCode.CLIENT_APP_CRASHED
        task.error = Error(code=code, reason="took too long" if late else "worker died")
        task.finish(began_s=self._since_s(task), ended_s=time.monotonic())

    def renew_slots(self) -> None:
        """Leave the memory of replies to those who read them; the worker makes new blocks."""
        assert not self.sent, "a worker may write to a slot of what it was sent"
        for slot in self.slots:
            if slot.block is not None:
                slot.block.close()
        self.slots = [Slot(number, is_told=False, fresh=True) for number in range(SLOTS)]

    def hang_up(self) -> None:
        """Tell the worker to end."""
        self.line.close()

    def end(self, *, wait_s: float = 0.0) -> None:
        """See that the worker, and whatever it started, is gone after `wait_s` seconds."""
        self.hang_up()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(wait_s)
        if (pid := self.process.pid) > 0:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        self.process.wait()
        for slot in self.slots:
            if slot.block is not None:
                slot.block.close()
