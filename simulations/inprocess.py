"""In-process Grid: the real ServerApp and ClientApp objects in one process, no Ray, no polling.

A message runs when its reply is asked for, one at a time, so the coordinator folds one update while
no other exists: memory does not grow with the number of sites.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

CLIENT_APP_RAISED = 4
"""Flower's error code of a ClientApp that raised, as a SuperNode reports it."""
NODE_ID_FIRST = 1


class InProcessGrid(Grid):
    """Delivers messages by calling the ClientApp; everything else is Flower's own."""

    def __init__(
        self,
        client_app: ClientApp,
        nodes: int,
        *,
        run_config: Mapping[str, Any],
        before: Callable[[Message], None] | None = None,
    ) -> None:
        """Make a grid of `nodes` nodes, numbered from 1.

        Args:
            client_app: The app every node runs.
            nodes: How many there are. A node that is never asked costs nothing.
            run_config: What the apps find in their context.
            before: Called with each message before it is delivered, for faults and tests; an
                exception it raises becomes the node's error reply.
        """
        _be_server_app()
        self._app = client_app
        self._nodes = nodes
        self._run_config = dict(run_config)
        self._before = before
        self._contexts: dict[int, Context] = {}
        self._queue: dict[str, Message] = {}
        self._ids = itertools.count(1)

    def set_run(self, run: Run) -> None:
        """Do nothing: there is one run."""

    @property
    def run(self) -> Run:
        """A run with the one identity there is."""
        return Run.create_empty(1)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message, as Flower's deprecated call does."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes' numbers."""
        return range(NODE_ID_FIRST, NODE_ID_FIRST + self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; they run when their replies are pulled."""
        ids = []
        for message in messages:
            message_id = f"m{next(self._ids)}"
            message.metadata.__dict__["_message_id"] = message_id
            self._queue[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Yield the replies one by one, each computed when it is asked for."""
        for message_id in message_ids:
            message = self._queue.pop(message_id, None)
            if message is not None:
                yield self._deliver(message)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Return all replies, as a list: Flower's own strategies test it for emptiness."""
        return list(self.pull_messages(self.push_messages(messages)))

    def _deliver(self, message: Message) -> Message:
        try:
            if self._before is not None:
                self._before(message)
            reply = self._app(message=message, context=self._context(message.metadata.dst_node_id))
        except Exception as error:  # noqa: BLE001 (a node that fails is an error reply, as deployed)
            failure = Error(code=CLIENT_APP_RAISED, reason=type(error).__name__)
            reply = Message(failure, reply_to=message)
        reply.metadata.__dict__["_message_id"] = f"r{next(self._ids)}"
        return reply

    def _context(self, node_id: int) -> Context:
        if node_id not in self._contexts:
            self._contexts[node_id] = Context(
                run_id=1,
                node_id=node_id,
                node_config={
                    "partition-id": node_id - NODE_ID_FIRST,
                    "num-partitions": self._nodes,
                },
                state=RecordDict(),
                run_config=self._run_config,
            )
        return self._contexts[node_id]


def _be_server_app() -> None:
    """Take the identity that Flower gives a ServerApp's process; messages carry it."""
    identity = cast(Any, TaskIdentity)  # no public name in flwr 1.41-1.42; tests pin its shape
    identity.task_id, identity.run_id, identity.node_id = 1, 1, 1
