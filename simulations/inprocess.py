"""In-process Grid: the real ServerApp and ClientApp objects in one process, no Ray, no polling.

A message runs when its reply is asked for, one at a time, so the coordinator folds one update while
no other exists: memory does not grow with the number of sites.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.clientapp import ClientApp

from intramural.simulations.grid import LocalGrid, Nodes, Observe, States


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
        """
        home = Nodes(count=nodes, run_config=dict(run_config), states=States(states))
        super().__init__(home, before=before, observe=observe)
        self._app = client_app
        self._queue: dict[str, Message] = {}

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
            reply = self._home.run(self._app, message)
        else:
            reply = Message(error, reply_to=message)
        self._note(message, reply, worker=0, began_s=began_s, ended_s=time.monotonic())
        return reply


def lend(nbytes: int) -> memoryview:
    """Return memory for a vector, not cleared first: that takes as long as to write it."""
    return np.empty(nbytes, dtype=np.uint8).data
