"""Pool Grid: the real ServerApp and ClientApp objects, the ClientApp's on several processes.

Replies come in the order of their messages, whichever worker is faster, and a worker waits when two
of its replies are not read yet: sums do not depend on timing, and memory grows with the workers and
not with the sites.
"""

import os
import selectors
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Message

from intramural.simulations.broadcast import Form, Lender, take_apart
from intramural.simulations.grid import LocalGrid, Nodes, Observe, States
from intramural.simulations.pool_blocks import Parcel, Slot
from intramural.simulations.pool_hand import STOP_S, Hand, Task
from intramural.simulations.pool_nursery import Nursery, can_fork
from intramural.simulations.pool_worker import Setup
from intramural.simulations.processors import gpus_for, worker_count, worker_environment

APP = "intramural.client.app:app"
LOOK_S = 1.0
"""How often to see whether a worker is there that says nothing."""
GLANCE_S = 0.05
"""How often to see whether memory is still read that a worker could write to."""
EMPTY = Form(records=(), nbytes=0)


class PoolGrid(LocalGrid):
    """Delivers messages to worker processes, which stay and keep what they have built.

    Use it in a `with` block, or `close` it, in the thread that made it: on Linux a worker is killed
    when that thread ends, so that none is ever left behind. Not for several threads at once.
    """

    def __init__(
        self,
        nodes: int,
        *,
        run_config: Mapping[str, Any],
        app: str = APP,
        workers: int | None = None,
        threads: int = 1,
        device: str = "auto",
        limit_s: float | None = None,
        before: Callable[[Message], None] | None = None,
        observe: Observe | None = None,
        states: Path | None = None,
        log: Path | None = None,
        libraries: Sequence[str] = (),
    ) -> None:
        """Start the workers, and do not wait for them.

        Args:
            nodes: How many there are, numbered from 1. One that is never asked costs nothing.
            run_config: What the apps find in their context.
            app: The app every node runs, as 'module:attribute'.
            workers: Number of processes; None: as `worker_count`. Never more than nodes.
            threads: Processor threads of one worker, unless the app sets them.
            device: What the app trains on, as [compute] of site.toml has it: with 'auto' or 'cuda'
                each worker is given a GPU of its own, if there are any.
            limit_s: Seconds that a node may take for a message; its worker is then killed and the
                reply is an error. None: no limit. Flower's time to live is not looked at.
            before: Called with each message as it is pushed, in this process, for faults and tests;
                an exception it raises becomes the node's error reply.
            observe: Told of each delivery, in the order of the replies.
            states: Folder that keeps the nodes' states; None: a temporary one.
            log: File for what the workers print; None: this process's standard error.
            libraries: Modules that all workers need and can share the memory of, where they can be
                copies of one process; () starts each by itself.
        """
        home = Nodes(count=nodes, run_config=dict(run_config), states=States(states))
        super().__init__(home, before=before, observe=observe)
        self._limit_s = limit_s
        self._tasks: dict[str, Task] = {}
        self._worker_of: dict[int, Hand] = {}
        """Who ran each node's last message."""
        self._pushed = 0
        self._parcels = 0
        self._lender = Lender()
        self._selector = selectors.DefaultSelector()
        self._hands: list[Hand] = []
        setup = Setup(
            app=app,
            nodes=nodes,
            run_config=home.run_config,
            states=home.states.folder,
            parent=os.getpid(),
            path=tuple(sys.path),
        )
        gpus = gpus_for(device)
        count = min(workers or worker_count(threads=threads, device=device), nodes)
        self._nursery: Nursery | None = None
        try:
            if libraries and can_fork():
                shared = worker_environment(threads=threads)
                self._nursery = Nursery(libraries, environment=shared, log=log)
            for number in range(count):
                environment = worker_environment(threads=threads, number=number, gpus=gpus)
                hand = Hand(number, setup, environment=environment, log=log, nursery=self._nursery)
                self._hands.append(hand)
                self._selector.register(hand.line.socket, selectors.EVENT_READ, hand)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "PoolGrid":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; messages without a reply are lost."""
        hands, self._hands = self._hands, []
        self._selector.close()
        for hand in hands:
            hand.hang_up()
        deadline_s = time.monotonic() + STOP_S
        for hand in hands:
            hand.end(wait_s=max(0.0, deadline_s - time.monotonic()))
        if self._nursery is not None:
            self._nursery.end()
        for task in self._tasks.values():
            if task.parcel is not None:
                task.parcel.leave()
            task.release()
        self._tasks.clear()
        self._lender.close()
        self._home.states.close()

    def lend(self, nbytes: int) -> memoryview:
        """Return memory for a vector that will be sent; workers then read it where it is."""
        return self._lender.lend(nbytes)

    @property
    def pids(self) -> list[int]:
        """Process numbers of the workers there are now."""
        return [hand.process.pid for hand in self._hands]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Give messages to the workers: each to the one that ran its node last, if that is fair."""
        assert self._hands, "the pool is closed"
        batch = list(messages)
        ids = [self._number(message) for message in batch]
        forms: dict[int, tuple[Form, list[bytes]]] = {}
        parcels: dict[tuple[int, ...], Parcel] = {}
        for message_id, message, hand in zip(ids, batch, self._assign(batch), strict=True):
            self._pushed += 1
            task = Task(number=self._pushed, message=message, hand=hand, form=EMPTY)
            task.error = self._prevented(message)
            self._tasks[message_id] = task
            if task.error is not None:
                continue
            content = message.content
            if id(content) not in forms:
                forms[id(content)] = take_apart(content)
            task.form, parts = forms[id(content)]
            if task.form.nbytes:
                key = tuple(id(part) for part in parts)
                if key not in parcels:
                    self._parcels += 1
                    lent = self._lender.block_of(parts[0]) if len(parts) == 1 else None
                    parcels[key] = Parcel(self._parcels, task.form, parts, lent=lent)
                task.parcel = parcels[key]
                task.parcel.users += 1
            hand.waiting.append(task)
        self._settle()
        return ids

    def _settle(self) -> None:
        """Free the slots whose time is over, and have more messages sent."""
        for slot in self._slots():
            slot.settle()
        self._feed()

    def _assign(self, messages: Sequence[Message]) -> list[Hand]:
        """Return who runs each message: no worker more than its share, and few nodes move.

        A node with a message under way stays where it is: it is one site, and does one thing at
        a time.
        """
        share = -(-len(messages) // len(self._hands))
        times = Counter(message.metadata.dst_node_id for message in messages)
        load: Counter[int] = Counter()
        bound = {t.message.metadata.dst_node_id for t in self._tasks.values() if not t.is_done}
        moving = []
        for node, count in times.items():
            hand = self._worker_of.get(node)
            if hand is not None and (node in bound or load[hand.number] + count <= share):
                load[hand.number] += count
            else:
                moving.append(node)
        for node in moving:
            hand = min(self._hands, key=lambda hand: (load[hand.number], len(hand.waiting)))
            load[hand.number] += times[node]
            self._worker_of[node] = hand
        return [self._worker_of[message.metadata.dst_node_id] for message in messages]

    def _look_again(self) -> bool:
        """Have slots used again that are read no more; return whether some still are."""
        for slot in self._slots():
            slot.look_again()
        self._feed()
        return any(slot.is_read for slot in self._slots())

    def _slots(self) -> Iterator[Slot]:
        return (slot for hand in self._hands for slot in hand.slots)

    def _feed(self) -> None:
        for hand in self._hands:
            hand.feed()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Yield the replies in the order in which their messages were pushed; wait for each.

        A reply's arrays may lie in memory that a worker fills again once nobody reads them: whoever
        drops a reply before he asks for the next but one saves the worker a new block.

        Raises:
            ConfigError: The workers cannot import the app.
            RoundError: A worker ended several times before it was ready.
        """
        return self._pull(message_ids, deadline_s=float("inf"))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Return the replies that come within `timeout` seconds, as a list; forget the others."""
        deadline_s = float("inf") if timeout is None else time.monotonic() + timeout
        ids = list(self.push_messages(messages))
        replies = list(self._pull(ids, deadline_s=deadline_s))
        for message_id in ids:
            self._forget(message_id)
        return replies

    def _pull(self, message_ids: Iterable[str], *, deadline_s: float) -> Iterator[Message]:
        known = [i for i in dict.fromkeys(message_ids) if i in self._tasks]
        for message_id in sorted(known, key=lambda i: self._tasks[i].number):
            task = self._tasks.get(message_id)
            if task is None or not self._await(task, deadline_s):
                continue
            del self._tasks[message_id]
            self._look_again()
            try:
                yield self._reply(task)
            finally:
                self._settle()  # of the reply before: by now both may have been read
                task.release()
                if self._hands:
                    task.hand.feed()

    def _reply(self, task: Task) -> Message:
        reply = task.reply()
        self._note(
            task.message,
            reply,
            worker=task.hand.number,
            began_s=task.began_s,
            ended_s=task.ended_s,
        )
        return reply

    def _await(self, task: Task, deadline_s: float) -> bool:
        """Wait until a message has its reply, or until the deadline; return whether it has."""
        try:
            while not task.is_done:
                assert self._hands, "the pool is closed"
                self._unblock(task)
                look_s = GLANCE_S if self._look_again() else LOOK_S
                now_s = time.monotonic()
                if now_s >= deadline_s:
                    self._attend(0.0)
                    break
                self._attend(min(look_s, deadline_s - now_s))
        except BaseException:  # also Ctrl-C: nobody shall have to remember to close the pool
            self.close()
            raise
        return task.is_done

    def _unblock(self, task: Task) -> None:
        """Have a message sent whose worker's slots hold replies that nobody is about to read.

        So replies may be asked for in any order; those that are left pile up.
        """
        hand = task.hand
        if hand.sent or task not in hand.waiting:
            return
        hand.renew_slots()
        hand.feed()

    def _attend(self, wait_s: float) -> None:
        """Take in what the workers have to say; start anew those that are gone or too late."""
        dues = [hand.due_s(self._limit_s) for hand in self._hands]
        wait_s = max(0.0, min(wait_s, min(dues) - time.monotonic()))
        told = [key.data for key, _ in self._selector.select(wait_s)]
        for hand in told:
            try:
                hand.receive()
            except EOFError:
                self._restart(hand, late=False)
        silent = [hand for hand in self._hands if hand not in told]
        for hand in silent:
            # a child of its own may keep a dead worker's socket open, so that no end of file comes
            if hand.process.poll() is not None and not hand.line.has_more():
                self._restart(hand, late=False)
            elif time.monotonic() >= hand.due_s(self._limit_s):
                self._restart(hand, late=True)

    def _restart(self, hand: Hand, *, late: bool) -> None:
        self._selector.unregister(hand.line.socket)
        hand.restart(late=late)
        self._selector.register(hand.line.socket, selectors.EVENT_READ, hand)

    def _forget(self, message_id: str) -> None:
        """Drop a message whose reply came too late to be asked for."""
        task = self._tasks.pop(message_id, None)
        if task is None:
            return
        task.wanted = False
        if task in task.hand.waiting:
            task.hand.waiting.remove(task)
            task.finish(began_s=task.began_s, ended_s=task.ended_s)
        elif task.is_done:
            task.release()
        task.hand.feed()
