"""Net: a simulated SuperLink and the lines to it: late, lost, doubled, out of order, damaged.

What it does of its own accord is what was seen of Flower's (facts/flower.md): a node that falls
silent answers with an error after a while, and goes from the list later; a message lives its time;
replies for a ServerApp that is no more are thrown away.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, Protocol

from flwr.app import Error, Message, RecordDict
from flwr.clientapp import ClientApp

from intramural.core.errors import WireError
from intramural.core.letter import Letter
from intramural.core.wire import to_letter, to_records
from intramural.simulations.inprocess import InProcessGrid
from tests.simworld.clock import Clock

NODE_UNAVAILABLE, MESSAGE_UNAVAILABLE = 5, 3
"""Flower's error codes."""
SILENT_S = 42.0
"""From a node's last sign of life to the error for what it was asked."""
LISTED_S = 60.0
"""From a node's last sign of life to its end."""


class LinkLost(Exception):
    """The SuperLink died under a ServerApp."""


@dataclass(frozen=True, kw_only=True)
class Weather:
    """How the lines are."""

    lost: float = 0.0
    """Share of messages that vanish; all shares are of each way."""
    doubled: float = 0.0
    damaged: float = 0.0
    delay_s: tuple[float, float] = (0.01, 0.1)


class Party(Protocol):
    """Who is at the other end of a node."""

    def receive(self, parcel: "Parcel", message: Message) -> None:
        """Take a message in; it may be damaged."""


@dataclass(kw_only=True, eq=False)
class Parcel:
    """A message to a node, and what has come of it."""

    id: str
    node: int
    message: Message
    grid: "SimGrid"
    state: Literal["open", "answered", "failed", "forgotten"] = "open"
    """Forgotten: its ServerApp is no more."""
    delivered: bool = False
    lost: bool = False
    """It, or its reply, vanished."""
    spoilt: list[RecordDict] = field(default_factory=list)
    """What a hostile site sent in its reply's place."""
    arrived: list[Message] = field(default_factory=list)
    """Replies to be handed over; a second one is a double."""

    @property
    def asks(self) -> str:
        """What is asked: 'query', 'train' or 'evaluate'."""
        return self.message.metadata.message_type.partition(".")[0]


@dataclass(kw_only=True, eq=False)
class Node:
    """A connection of a site."""

    site: str
    party: Party
    silence: int = 0
    """Number of its latest silence; each ends or becomes final."""
    here: bool = True
    listed: bool = True
    dead: bool = False
    """It was silent for so long that nothing more is sent to it."""
    parcels: list[Parcel] = field(default_factory=list)
    held: list[tuple[Parcel, RecordDict]] = field(default_factory=list)
    """Replies that could not be sent yet."""


class Link:
    """The SuperLink: nodes, messages, replies."""

    def __init__(self, clock: Clock, rng: random.Random, *, ttl_s: float) -> None:
        self.clock = clock
        self.weather = Weather()
        self.nodes: dict[int, Node] = {}
        self.ttl_s = ttl_s
        self._rng = rng

    def join(self, site: str, party: Party) -> int:
        """Let a node in that was not here before; return its number."""
        number = len(self.nodes) + 1
        self.nodes[number] = Node(site=site, party=party)
        return number

    def leave(self, number: int, *, forgets: bool) -> None:
        """Hear no more of a node, which may have died and so forgets what it has."""
        node = self.nodes[number]
        node.here = False
        node.silence += 1
        if forgets:
            node.held.clear()
        self.clock.after(SILENT_S, partial(self._is_silent, node, node.silence))
        self.clock.after(LISTED_S, partial(self._is_gone, node, node.silence))

    def come_back(self, number: int) -> None:
        """Hear of a node again."""
        node = self.nodes[number]
        node.here, node.listed, node.dead = True, True, False
        node.silence += 1
        for parcel in node.parcels:
            if parcel.state == "open" and not parcel.delivered and not parcel.lost:
                self.clock.after(self._delay(), partial(self._deliver, parcel))
        held, node.held = node.held, []
        for parcel, content in held:
            self.reply(parcel, content)

    def _is_silent(self, node: Node, silence: int) -> None:
        if node.silence == silence:
            node.dead = True
            for parcel in node.parcels:
                self._fail(parcel, NODE_UNAVAILABLE)

    def _is_gone(self, node: Node, silence: int) -> None:
        if node.silence == silence:
            node.listed = False

    def _fail(self, parcel: Parcel, code: int) -> None:
        if parcel.state == "open":
            parcel.state = "failed"
            failure = Message(Error(code=code, reason="simulated"), reply_to=parcel.message)
            parcel.arrived.append(failure)

    def send(self, parcel: Parcel) -> None:
        """Send a message to its node."""
        self.clock.after(self.ttl_s, partial(self._fail, parcel, MESSAGE_UNAVAILABLE))
        node = self.nodes[parcel.node]
        node.parcels.append(parcel)
        if node.dead:
            self.clock.after(1.0, partial(self._fail, parcel, NODE_UNAVAILABLE))
        elif self._rng.random() < self.weather.lost:
            parcel.lost = True
        else:
            for _ in range(1 + (self._rng.random() < self.weather.doubled)):
                self.clock.after(self._delay(), partial(self._deliver, parcel))

    def _deliver(self, parcel: Parcel) -> None:
        node = self.nodes[parcel.node]
        if node.here and parcel.state in ("open", "answered"):
            message, parcel.delivered = parcel.message, True
            if self._rng.random() < self.weather.damaged:
                message = with_content(message, damaged(message.content, self._rng))
            node.party.receive(parcel, message)

    def reply(self, parcel: Parcel, content: RecordDict) -> None:
        """Send a reply back, now or when the node is heard of again."""
        node = self.nodes[parcel.node]
        if not node.here:
            node.held.append((parcel, content))
        elif self._rng.random() < self.weather.lost:
            parcel.lost = True
        else:
            if self._rng.random() < self.weather.damaged:
                content = damaged(content, self._rng)
            for _ in range(1 + (self._rng.random() < self.weather.doubled)):
                reply = Message(content, reply_to=parcel.message)
                self.clock.after(self._delay(), partial(self._arrive, parcel, reply))

    def _arrive(self, parcel: Parcel, reply: Message) -> None:
        if parcel.state in ("open", "answered"):
            parcel.state = "answered"
            parcel.arrived.append(reply)

    def forget(self, grid: "SimGrid") -> None:
        """Throw away what a ServerApp asked that is no more."""
        for node in self.nodes.values():
            for parcel in node.parcels:
                if parcel.grid is grid:
                    parcel.state = "forgotten"
            node.parcels = [p for p in node.parcels if p.grid is not grid]

    def _delay(self) -> float:
        return self._rng.uniform(*self.weather.delay_s)


class SimGrid(InProcessGrid):
    """One ServerApp's view of the SuperLink."""

    def __init__(
        self,
        link: Link,
        rng: random.Random,
        *,
        asked: Callable[[Parcel], None],
        heard: Callable[[Parcel, Message], None],
    ) -> None:
        """Tell `asked` of each message that is sent, and `heard` of each that is handed over."""
        super().__init__(ClientApp(), 0, run_config={})
        self._link = link
        self._rng = rng
        self._asked = asked
        self._heard = heard
        self._parcels: dict[str, Parcel] = {}
        self.lost = False
        """The SuperLink died."""

    def _check(self) -> None:
        if self.lost:
            raise LinkLost

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that the SuperLink lists."""
        self._check()
        return sorted(number for number, node in self._link.nodes.items() if node.listed)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages."""
        self._check()
        ids = []
        for message in messages:
            message_id = f"m{next(self._ids)}"
            message.metadata.__dict__["_message_id"] = message_id
            node = message.metadata.dst_node_id
            parcel = Parcel(id=message_id, node=node, message=message, grid=self)
            self._parcels[message_id] = parcel
            self._link.send(parcel)
            self._asked(parcel)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Hand over what has arrived, in any order."""
        self._check()
        found = [self._parcels[i] for i in message_ids if self._parcels[i].arrived]
        self._rng.shuffle(found)
        for parcel in found:
            arrived, parcel.arrived = parcel.arrived, []
            for message in arrived:
                self._heard(parcel, message)
                yield message


def with_content(message: Message, content: RecordDict) -> Message:
    """Return a message with other content, and all else as it is."""
    other = Message(content, message.metadata.dst_node_id, message.metadata.message_type)
    other.metadata.__dict__["_message_id"] = message.metadata.message_id
    return other


def damaged(content: RecordDict, rng: random.Random) -> RecordDict:
    """Return a letter's records of which one bit is wrong: in header, vector or seal."""
    try:
        letter = to_letter(content)
    except WireError:
        return content  # spoilt already
    parts = ["header"] + ["vector"] * bool(letter.vector) + ["seal"] * (letter.seal is not None)
    match rng.choice(parts):
        case "header":
            spoilt = replace(letter, header=_other_text(letter.header, rng))
        case "seal":
            spoilt = replace(letter, seal=_other_text(letter.seal or "", rng))
        case _:
            vector = bytearray(letter.vector or b"")
            vector[rng.randrange(len(vector))] ^= 1 << rng.randrange(8)
            spoilt = Letter(header=letter.header, vector=bytes(vector), seal=letter.seal)
    return to_records(spoilt)


def _other_text(text: str, rng: random.Random) -> str:
    place = rng.randrange(len(text))
    flipped = chr(ord(text[place]) ^ (1 << rng.randrange(7)))
    return text[:place] + flipped + text[place + 1 :]
