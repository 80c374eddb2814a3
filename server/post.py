"""Post: requests out and replies in over a Flower Grid, with bytes counted."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from flwr.app import ArrayRecord, Message, MessageType
from flwr.serverapp import Grid

from intramural.core.errors import IntramuralError
from intramural.core.layout import Layout
from intramural.core.letter import Letter, read_reply, write_letter
from intramural.core.messages import EvaluateRequest, Hello, Refusal, Reply, Request, TrainRequest
from intramural.core.wire import payload_bytes, to_letter, to_records

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
    """Why there is no reply: 'wire', 'trust', `AWAY`, or Flower's word for what failed."""


AWAY = "worker-away"
"""Problem of a site whose resident worker did not answer: its node says so, without a seal."""


class Seals(Protocol):
    """Signs what goes out and checks what comes in; a simulation has none."""

    def seal(self, letter: Letter) -> Letter:
        """Return the letter, signed by the coordinator."""

    def check(self, letter: Letter, *, site: str) -> None:
        """Do nothing if the letter is signed by this site's key, as enrolled.

        Raises:
            TrustError: It is not, or the site is unknown or revoked.
        """


@dataclass(frozen=True, kw_only=True)
class _Sent:
    site: str
    node: int
    tag: Tag
    digest: str
    """Of the request's letter, which the reply must name."""


class Post:
    """Keeps the requests that wait for a reply; a late reply still finds the request it answers."""

    def __init__(
        self, grid: Grid, layout: Callable[[int], Layout], *, seals: Seals | None = None
    ) -> None:
        """Send over `grid`; a vector must fit its round's layout, and with `seals` be signed."""
        self._grid = grid
        self._layout = layout
        self._seals = seals
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
        letter = write_letter(request)
        if self._seals is not None:
            letter = self._seals.seal(letter)
        content = to_records(letter, vector=vector)
        kind = _TYPES[type(request)]
        sites = list(nodes)
        messages = [Message(content, nodes[site], kind) for site in sites]
        self.bytes_down += payload_bytes(content) * len(sites)
        for site, message_id in zip(sites, self._grid.push_messages(messages), strict=True):
            self._waiting[message_id] = _Sent(
                site=site, node=nodes[site], tag=tag, digest=letter.digest
            )

    def arrivals(self, *, but: str | None = None) -> Iterator[Arrival]:
        """Yield the replies that have come, each forgotten once the next is asked for.

        Those to requests of phase `but` stay where they are.
        """
        wanted = [message_id for message_id, s in self._waiting.items() if s.tag[0] != but]
        if not wanted:
            return
        for message in self._grid.pull_messages(wanted):
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
                reply = self._read(to_letter(message.content), sent)
            except IntramuralError as error:
                problem = error.reason
            if reply is None and self._seals is not None and _is_away(message, sent):
                problem = AWAY
        return Arrival(site=sent.site, node=sent.node, tag=sent.tag, reply=reply, problem=problem)

    def _read(self, letter: Letter, sent: _Sent) -> Reply:
        """Return what a letter says, once it is known whose it is."""
        reply = read_reply(letter, layout=self._layout(sent.tag[1]), answers=sent.digest)
        if self._seals is not None:
            self._seals.check(letter, site=reply.site)
        return reply


def _is_away(message: Message, sent: _Sent) -> bool:
    """Return whether a node says, without a seal, that its site's worker is away.

    Anybody who speaks for the node can say so; it counts as an error of the node's would.
    """
    try:
        letter = to_letter(message.content)
        reply = read_reply(letter, answers=sent.digest)
    except IntramuralError:
        return False
    return letter.seal is None and isinstance(reply, Refusal) and reply.reason == AWAY
