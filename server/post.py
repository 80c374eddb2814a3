"""Post: requests out and replies in over a Flower Grid, with bytes counted."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flwr.app import ArrayRecord, Message, MessageType
from flwr.serverapp import Grid

from intramural.core.errors import WireError
from intramural.core.layout import Layout
from intramural.core.messages import EvaluateRequest, Hello, Reply, Request, TrainRequest
from intramural.core.wire import decode_reply, encode, payload_bytes

Tag = tuple[str, int, int]
"""Phase, round and attempt that a request belongs to."""

_TYPES = {
    Hello: MessageType.QUERY,
    TrainRequest: MessageType.TRAIN,
    EvaluateRequest: MessageType.EVALUATE,
}


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A reply, or what came instead of one."""

    site: str
    """The site that was asked; '' in a greeting."""
    node: int
    tag: Tag
    reply: Reply | None
    problem: str | None
    """Why there is no reply: 'wire', or Flower's word for a node or app that failed."""


@dataclass(frozen=True, kw_only=True)
class _Sent:
    site: str
    node: int
    tag: Tag


class Post:
    """Keeps the requests that wait for a reply; a late reply still finds the request it answers."""

    def __init__(self, grid: Grid, layout: Layout) -> None:
        """Send over `grid`; vectors that come must fit `layout`."""
        self._grid = grid
        self._layout = layout
        self._waiting: dict[str, _Sent] = {}
        self.bytes_up = 0
        self.bytes_down = 0

    def node_ids(self) -> set[int]:
        """Return the nodes connected now."""
        return set(self._grid.get_node_ids())

    def reset_count(self) -> None:
        """Start counting bytes anew."""
        self.bytes_up = self.bytes_down = 0

    def send(
        self,
        request: Request,
        nodes: Mapping[str, int],
        *,
        tag: Tag,
        vector: ArrayRecord | None = None,
    ) -> None:
        """Send one request to several nodes; the vector's bytes are shared between them."""
        content = encode(request, vector=vector)
        kind = _TYPES[type(request)]
        sites = list(nodes)
        messages = [Message(content, nodes[site], kind) for site in sites]
        self.bytes_down += payload_bytes(content) * len(sites)
        for site, message_id in zip(sites, self._grid.push_messages(messages), strict=True):
            self._waiting[message_id] = _Sent(site=site, node=nodes[site], tag=tag)

    def arrivals(self) -> Iterator[Arrival]:
        """Yield the replies that have come, each forgotten once the next is asked for."""
        if not self._waiting:
            return
        for message in self._grid.pull_messages(list(self._waiting)):
            sent = self._waiting.pop(message.metadata.reply_to_message_id, None)
            if sent is not None:
                arrival = self._open(message, sent)
                del message  # the next reply is made while this name would keep the last one
                yield arrival
                del arrival

    def _open(self, message: Message, sent: _Sent) -> Arrival:
        reply, problem = None, None
        if message.has_error():
            problem = f"flower-{message.error.code}"
        else:
            self.bytes_up += payload_bytes(message.content)
            try:
                reply = decode_reply(message.content, layout=self._layout)
            except WireError as error:
                problem = error.reason
        return Arrival(site=sent.site, node=sent.node, tag=sent.tag, reply=reply, problem=problem)
