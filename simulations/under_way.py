"""UnderWay: what a scenario keeps of its sites, so that a resumed asynchronous run plays on.

A round that closes without all its sites leaves requests on their way. What comes of them was
decided when they were sent; a resumed run sends them again, and they meet the same fate at the same
second. It goes into the checkpoint as JSON.
"""

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

from flwr.app import MessageType

from intramural.simulations.fate import Fate

Key = tuple[str, int]
"""What is asked, and in which round."""


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A request to train, as it was sent."""

    round: int
    sent_s: float
    place: int
    """Among all messages."""
    fate: Fate
    is_again: bool = False
    """The process before this one sent it; this one repeats it."""


class UnderWay:
    """The last request to train of each site, and what else the next fates follow from."""

    def __init__(self, world: dict[str, Any]) -> None:
        """Take up what `to_json` returned; {} at the start."""
        self._now_s: float | None = world.get("now_s")
        self._met = {int(node) for node in world.get("met", [])}
        """Nodes that were known when the checkpoint was written: they are known at once again."""
        self._before = {int(node): _sent(facts) for node, facts in world.get("sent", {}).items()}
        self._sent: dict[int, Sent] = {}
        self.met = set(self._met)
        """Nodes that have answered a greeting and were not away since."""
        self.busy = {int(node): float(s) for node, s in world.get("busy", {}).items()}
        """By node: until when it works on what it was asked before."""
        self.times: Counter[tuple[int, str, int]] = Counter()
        """How often a node was asked something of a round."""
        for node, kind, round_, times in world.get("times", []):
            self.times[node, kind, round_] = times
        self.place = int(world.get("place", 0))
        """The next message's."""

    def again(self, node: int, key: Key, *, now_s: float) -> Sent | None:
        """Return how a request was sent before the restart, if it was."""
        kind, round_ = key
        if kind == MessageType.QUERY and now_s == self._now_s and node in self._met:
            self._met.discard(node)
            fate = Fate(at_s=now_s, busy_until_s=now_s)
            return Sent(round=0, sent_s=now_s, place=self.next_place(), fate=fate, is_again=True)
        known = self._before.get(node)
        if kind != MessageType.TRAIN or known is None or known.round != round_:
            return None
        del self._before[node]
        return self.note(node, key, known)

    def note(self, node: int, key: Key, sent: Sent) -> Sent:
        """Remember a request if it is to train; return it."""
        if key[0] == MessageType.TRAIN:
            self._sent[node] = sent
        return sent

    def next_place(self) -> int:
        """Return the place of one more message."""
        self.place += 1
        return self.place - 1

    def to_json(self, *, now_s: float) -> dict[str, Any]:
        """Return what a run needs that goes on from `now_s`."""
        sent = self._before | self._sent
        return {
            "now_s": now_s,
            "place": self.place,
            "met": sorted(self.met),
            "busy": {str(n): until_s for n, until_s in self.busy.items() if until_s > now_s},
            "sent": {str(node): asdict(replace(s, is_again=True)) for node, s in sent.items()},
            "times": [
                [node, kind, round_, times]
                for (node, kind, round_), times in self.times.items()
                if kind == MessageType.QUERY or (node in sent and sent[node].round == round_)
            ],
        }


def _sent(facts: dict[str, Any]) -> Sent:
    return Sent(**(facts | {"fate": Fate(**facts["fate"])}))
