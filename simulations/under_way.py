"""UnderWay: what a scenario keeps of its sites, so that a resumed asynchronous run plays on.

A round that closes without all its sites leaves requests on their way. What comes of them was
decided when they were sent; a resumed run sends them again, and they meet the same fate at the same
second. It goes into the checkpoint as JSON.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

from flwr.app import Message, MessageType

from intramural.core.wire import to_letter
from intramural.simulations.fate import Fate
from intramural.simulations.sim_clock import SimClock

Key = tuple[str, int]
"""What is asked, and in which round."""


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A greeting, or a request to train, as it was sent."""

    round: int
    sent_s: float
    place: int
    """Among all messages."""
    fate: Fate
    is_again: bool = False
    """The process before this one sent it; this one repeats it."""


class UnderWay:
    """Each site's last request to train and its greetings, and what the next fates follow from."""

    def __init__(self, world: dict[str, Any], clock: SimClock) -> None:
        """Take up what `to_json` returned; {} at the start. Alarms are set on `clock`."""
        self._clock = clock
        self._before = {int(node): _sent(facts) for node, facts in world.get("sent", {}).items()}
        self._sent: dict[int, Sent] = {}
        self._greetings_before = _listed(world)
        self._greetings: dict[int, list[Sent]] = {}
        """By node: those that are not answered, in the order in which they were sent."""
        self.busy = {int(node): float(s) for node, s in world.get("busy", {}).items()}
        """By node: until when it works on what it was asked before."""
        self.times: Counter[tuple[int, str, int]] = Counter()
        """How often a node was asked something of a round."""
        for node, kind, round_, times in world.get("times", []):
            self.times[node, kind, round_] = times
        self.place = int(world.get("place", 0))
        """The next message's."""
        for at_s in world.get("alarms", []):  # a run that goes on looks when this one would have
            clock.alarm(at_s)

    def again(self, node: int, key: Key) -> Sent | None:
        """Return how a message was sent before the restart, if it was."""
        kind, round_ = key
        if kind == MessageType.QUERY:
            greetings = self._greetings_before.get(node)
            return self.note(node, key, greetings.pop(0)) if greetings else None
        known = self._before.get(node)
        if kind != MessageType.TRAIN or known is None or known.round != round_:
            return None
        del self._before[node]
        return self.note(node, key, known)

    def note(self, node: int, key: Key, sent: Sent) -> Sent:
        """Remember a message if it is a greeting or to train; return it."""
        if key[0] == MessageType.TRAIN:
            self._sent[node] = sent
        elif key[0] == MessageType.QUERY:
            self._greetings.setdefault(node, []).append(sent)
        return sent

    def greeted(self, node: int, place: int) -> None:
        """Forget a greeting that is answered."""
        self._greetings[node] = [s for s in self._greetings[node] if s.place != place]

    def next_place(self) -> int:
        """Return the place of one more message."""
        self.place += 1
        return self.place - 1

    def to_json(self) -> dict[str, Any]:
        """Return what a run needs that goes on from this moment."""
        now_s, sent = self._clock.now_s, self._before | self._sent
        greetings = [
            [node, _facts(s)]
            for node in sorted(self._greetings_before.keys() | self._greetings.keys())
            for s in self._greetings_before.get(node, []) + self._greetings.get(node, [])
        ]
        return {
            "now_s": now_s,
            "place": self.place,
            "alarms": self._clock.pending,
            "greetings": greetings,
            "busy": {str(n): until_s for n, until_s in self.busy.items() if until_s > now_s},
            "sent": {str(node): _facts(s) for node, s in sent.items()},
            "times": [
                [node, kind, round_, times]
                for (node, kind, round_), times in self.times.items()
                if kind == MessageType.QUERY or (node in sent and sent[node].round == round_)
            ],
        }


def key_of(message: Message) -> Key:
    """Return what a request asks, with the split, and its round; a greeting's is 0."""
    body = json.loads(to_letter(message.content).header)["body"]
    kind = message.metadata.message_type
    return (f"{kind}-{body['split']}" if "split" in body else kind), int(body.get("round", 0))


def _facts(sent: Sent) -> dict[str, Any]:
    return asdict(replace(sent, is_again=True))


def _sent(facts: dict[str, Any]) -> Sent:
    return Sent(**(facts | {"fate": Fate(**facts["fate"])}))


def _listed(world: dict[str, Any]) -> dict[int, list[Sent]]:
    found: dict[int, list[Sent]] = {}
    for node, facts in world.get("greetings", []):
        found.setdefault(node, []).append(_sent(facts))
    return found
