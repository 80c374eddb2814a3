"""In-process Grid: the real ServerApp and ClientApp objects in one process, no Ray, no polling.

A message runs when its reply is asked for, one at a time: memory does not grow with the number of
sites. Where one takes long, what the next node can do without its message is done beside it.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message, MessageType
from flwr.clientapp import ClientApp

from intramural.core.threads import beside
from intramural.simulations.grid import LocalGrid, Nodes, Observe, States

AHEAD_MIN_S = 0.05
"""A training that takes less leaves nothing to win beside it."""


class InProcessGrid(LocalGrid):
    """Delivers messages by calling the ClientApp; everything else is Flower's own."""

    def __init__(
        self,
        client_app: ClientApp,
        nodes: int,
        *,
        run_config: Mapping[str, Any],
        before: Callable[[Message], None] | None = None,
        observe: Observe | None = None,
        states: Path | None = None,
        prepare: Callable[[Context], None] | None = None,
    ) -> None:
        """Make a grid of `nodes` nodes, numbered from 1.

        Args:
            client_app: The app every node runs.
            nodes: How many there are. A node that is never asked costs nothing.
            run_config: What the apps find in their context.
            before: Called with each message before it is delivered, for faults and tests; an
                exception it raises becomes the node's error reply.
            observe: Told of each delivery.
            states: Folder that keeps the nodes' states; None: a temporary one, made when needed.
            prepare: Called in another thread with the context of the node that trains next, while
                a message is delivered, once a training took long; what it raises is dropped.
        """
        home = Nodes(count=nodes, run_config=dict(run_config), states=States(states))
        super().__init__(home, before=before, observe=observe)
        self._app = client_app
        self._queue: dict[str, Message] = {}
        self._prepare = prepare
        self._prepared: threading.Thread | None = None
        self._took_s = 0.0
        """Of the last training that was delivered."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; they run when their replies are pulled."""
        ids = []
        for message in messages:
            ids.append(self._number(message))
            self._queue[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Yield the replies one by one, each computed when it is asked for."""
        for message_id in message_ids:
            message = self._queue.pop(message_id, None)
            if message is not None:
                yield self._deliver(message)

    def _deliver(self, message: Message) -> Message:
        began_s = time.monotonic()
        error = self._prevented(message)
        if error is None:
            self._prepare_next()
            reply = self._home.run(self._app, message)
        else:
            reply = Message(error, reply_to=message)
        ended_s = time.monotonic()
        if message.metadata.message_type == MessageType.TRAIN:
            self._took_s = ended_s - began_s
        self._note(message, reply, worker=0, began_s=began_s, ended_s=ended_s)
        return reply

    def _prepare_next(self) -> None:
        """Wait until this message's node is prepared, and begin with the next one's."""
        if self._prepared is not None:
            self._prepared.join()
            self._prepared = None
        following = next(iter(self._queue.values()), None)
        if self._prepare is None or following is None or self._took_s <= AHEAD_MIN_S:
            return
        if following.metadata.message_type == MessageType.TRAIN:
            context = self._home.context(following.metadata.dst_node_id)
            self._prepared = beside(partial(self._quietly, context))

    def _quietly(self, context: Context) -> None:
        assert self._prepare is not None
        with suppress(Exception):  # the node itself tells what is wrong
            self._prepare(context)


def lend(nbytes: int) -> memoryview:
    """Return memory for a vector, not cleared first: that takes as long as to write it."""
    return np.empty(nbytes, dtype=np.uint8).data
