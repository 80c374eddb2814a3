"""Grid: what the grids of one machine share: nodes, their contexts and states, deliveries."""

import itertools
import os
import pickle
import shutil
import struct
import tempfile
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.metadata import Metadata
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from intramural.server.crowd import NODE_ID_FIRST
from intramural.simulations.broadcast import put_together, take_apart, write

_HEAD = struct.Struct("<Q")


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """One message that a node has answered, or not."""

    node: int
    kind: str
    """Flower's message type, such as 'train'."""
    worker: int
    """Number of the process that ran it, from 0; 0 where there is only this one."""
    began_s: float
    """When the node began, by `time.monotonic`, which all processes of a machine share."""
    ended_s: float
    failed: bool
    """Whether the reply is Flower's error; a refusal is a reply."""


Observe = Callable[[Delivery], None]


class States:
    """The nodes' `Context.state`, in a file each; an empty state has none."""

    def __init__(self, folder: Path | None = None) -> None:
        """Keep files in `folder`, for good; or in a temporary one, gone with this object."""
        self._folder = folder
        self._remove: Callable[[], object] = lambda: None

    @property
    def folder(self) -> Path:
        """Where the files are; a temporary folder is made when this is first asked."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="intramural-states-"))  # its owner's only
            tree = self._folder
            self._remove = weakref.finalize(self, shutil.rmtree, tree, ignore_errors=True)
        return self._folder

    def close(self) -> None:
        """Remove a temporary folder now."""
        self._remove()

    def load(self, node_id: int) -> RecordDict:
        """Return a node's state, as it was last saved."""
        if self._folder is None:
            return RecordDict()
        try:
            content = self._file(node_id).read_bytes()
        except FileNotFoundError:
            return RecordDict()
        (size,) = _HEAD.unpack_from(content)
        form = pickle.loads(content[_HEAD.size : _HEAD.size + size])
        return put_together(form, memoryview(content)[_HEAD.size + size :])

    def save(self, node_id: int, state: RecordDict) -> None:
        """Keep a node's state: another process finds the old one or the new, whole."""
        if not len(state):
            if self._folder is not None:
                self._file(node_id).unlink(missing_ok=True)
            return
        form, parts = take_apart(state)
        head = pickle.dumps(form)
        content = bytearray(_HEAD.size + len(head) + form.nbytes)
        _HEAD.pack_into(content, 0, len(head))
        content[_HEAD.size : _HEAD.size + len(head)] = head
        write(form, parts, memoryview(content)[_HEAD.size + len(head) :])
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._file(node_id)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_bytes(content)  # no fsync: after a power cut there is no run to go on with
        os.replace(beside, path)

    def _file(self, node_id: int) -> Path:
        return self.folder / f"node-{node_id}.state"


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The nodes of a run: what the app of each finds in its context."""

    count: int
    run_config: Mapping[str, Any]
    states: States

    def run(self, app: ClientApp, message: Message) -> Message:
        """Return the app's reply to a message; an error reply if it raises.

        The node's state is kept also when the app raised, as a deployed node keeps it.
        """
        node_id = message.metadata.dst_node_id
        try:
            context = self.context(node_id)
            try:
                reply = app(message=message, context=context)
            finally:
                self.states.save(node_id, context.state)
            if not isinstance(reply, Message):
                raise TypeError("a ClientApp returns a Message")
            return reply
        except Exception as error:  # noqa: BLE001 (a node that fails is an error reply, as deployed)
            return Message(raised(error), reply_to=message)

    def context(self, node_id: int) -> Context:
        """Return what a node's app finds, its state as it was last saved."""
        return Context(
            run_id=1,
            node_id=node_id,
            node_config={"partition-id": node_id - NODE_ID_FIRST, "num-partitions": self.count},
            state=self.states.load(node_id),
            run_config=dict(self.run_config),
        )


class LocalGrid(Grid):
    """A grid of nodes that are numbered from 1 and always there."""

    def __init__(
        self,
        nodes: Nodes,
        *,
        before: Callable[[Message], None] | None = None,
        observe: Observe | None = None,
    ) -> None:
        """Make a grid; see the grids themselves for the arguments."""
        be_server_app()
        self._nodes = nodes.count
        self._home = nodes
        self._before = before
        self._observe = observe
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

    @abstractmethod
    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages, and return their numbers."""

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Return all replies, as a list: Flower's own strategies test it for emptiness."""
        return list(self.pull_messages(self.push_messages(messages)))

    def _number(self, message: Message) -> str:
        """Give a message that was pushed its number, and return that."""
        message_id = f"m{next(self._ids)}"
        message.metadata.__dict__["_message_id"] = message_id
        return message_id

    def _prevented(self, message: Message) -> Error | None:
        """Let `before` look at a message; return the error that it wants instead of a delivery."""
        try:
            if self._before is not None:
                self._before(message)
        except Exception as error:  # noqa: BLE001 (the node's error reply)
            return raised(error)
        return None

    def _note(
        self, message: Message, reply: Message, *, worker: int, began_s: float, ended_s: float
    ) -> None:
        """Give a reply its number, and tell of the delivery."""
        reply.metadata.__dict__["_message_id"] = f"r{next(self._ids)}"
        if self._observe is not None:
            delivery = Delivery(
                node=message.metadata.dst_node_id,
                kind=message.metadata.message_type,
                worker=worker,
                began_s=began_s,
                ended_s=ended_s,
                failed=reply.has_error(),
            )
            self._observe(delivery)


def raised(error: Exception) -> Error:
    """Return a SuperNode's error of an app that raised; it says the type, never the text."""
    return Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=type(error).__name__)


def message_of(metadata: Metadata, found: RecordDict | Error) -> Message:
    """Return a message that was taken apart, whole again."""
    key = "error" if isinstance(found, Error) else "content"
    return cast(Message, cast(Any, Message)(metadata=metadata, **{key: found}))


def be_server_app() -> None:
    """Take the identity that Flower gives a ServerApp's process; messages carry it."""
    identity = cast(Any, TaskIdentity)  # no public name in flwr 1.41-1.42; tests pin its shape
    identity.task_id, identity.run_id, identity.node_id = 1, 1, 1
