"""Directory: which connected node is which site, and which of them can take part."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout
from intramural.core.messages import Hello, Refusal, Reply, Welcome
from intramural.server.ledger_watch import LedgerWatch
from intramural.server.post import Arrival, Post

GREETING = "hello"
MENDABLE = frozenset({"refused", "awaits-approval", "budget-exhausted", "ledger", "journal"})
"""Reasons of a site that follows its own rules, or whose disk is full: its people can mend them."""


@dataclass(frozen=True, kw_only=True)
class Manners:
    """How a deployed coordinator treats nodes that a simulation does not have."""

    again_s: float = 15.0
    """Pause until a node that refused is greeted anew: its people may have approved meanwhile."""
    silent_s: float = 120.0
    """Pause until a node that did not answer is greeted anew: the greeting may be lost."""
    misses_max: int = 3
    """Unanswered requests in a row after which a site must answer a greeting to take part again."""
    newest_wins: bool = True
    """A site's newer node takes the place of an older one: a restarted agent is a new node, and the
    old one lingers. Sound where replies are sealed, so that no other site can claim to be it."""

    def excuses(self, reply: Reply | None) -> bool:
        """Return whether a reply is a refusal that is waited for, and costs a round no attempt.

        A simulated site has no people who could mend it: it would refuse for ever.
        """
        return isinstance(reply, Refusal) and reply.reason in MENDABLE


class Directory:
    """Greets every node and keeps what it answered."""

    def __init__(
        self,
        post: Post,
        federation: FederationConfig,
        *,
        run: str,
        layout: Layout,
        base: str,
        manners: Manners | None = None,
        clock: Callable[[], float] = time.monotonic,
        ledgers: LedgerWatch | None = None,
        left: Callable[[], str | None] = lambda: None,
        before: Mapping[str, Any] | None = None,
    ) -> None:
        """Check sites against the federation's layout and base model digest.

        Without manners each node is greeted once, and a site's first node stays its node. With
        `ledgers`, under [privacy], a site whose ledger was rolled back cannot take part. `left`
        names the phase whose replies stay in the post for now. `before` is what `to_json` returned
        when the checkpoint was written that a simulated run goes on from.
        """
        self._left = left
        self._ledgers = ledgers
        self._post = post
        self._manners = manners
        self._clock = clock
        self._again_at: dict[int, float] = {}
        self._misses: dict[str, int] = {}
        self._hello = Hello(manifest=federation.digest, run=run)
        self._layout = layout
        self._base = base
        self._greeted: set[int] = set()
        self._open: set[int] = set()
        self._late: set[int] = set()
        """Nodes whose greeting nobody waits for any more; a late answer still counts."""
        self._connected: set[int] = set()
        self._known: dict[str, int] = {}
        self.nodes: dict[str, int] = {}
        """Node of each site that is connected and can take part."""
        self.refusals: dict[int, Refusal] = {}
        """Why a node cannot take part."""
        self._unanswered: Counter[int] = Counter()
        """Greetings that each node owes an answer to."""
        self._lost: list[int] = []
        """Of these, those that another process sent, which are to be sent again."""
        if before:
            self._take_up(before)

    def to_json(self) -> dict[str, Any]:
        """Return who is known and what is open, for a simulated run to go on as if never stopped.

        Greeting all anew would not do: who is away would be unknown, and who is busy hold it up.
        """
        return {
            "known": self._known,
            "greeted": sorted(self._greeted),
            "open": sorted(self._open),
            "late": sorted(self._late),
            "unanswered": sorted(self._unanswered.elements()),
            "refusals": [[n, r.site, r.reason, r.detail] for n, r in self.refusals.items()],
        }

    def _take_up(self, before: Mapping[str, Any]) -> None:
        self._known = dict(before["known"])
        self._greeted, self._open = set(before["greeted"]), set(before["open"])
        self._late, self._lost = set(before["late"]), list(before["unanswered"])
        for node, site, reason, detail in before["refusals"]:
            self.refusals[node] = Refusal(site=site, reason=reason, detail=detail)

    def greet(self, receive: Callable[[Arrival], None]) -> bool:
        """Greet new nodes and hand on what has come; True when no greeting is open.

        Args:
            receive: Takes every arrival, and offers it to `took`: late replies come here as well.
        """
        connected = self._connected = self._post.node_ids()
        self._greeted &= connected  # a node that left and comes back may have been mended
        self._greeted -= {n for n, due in self._again_at.items() if self._clock() >= due}
        if self._manners is not None:
            self._late &= connected  # one that comes back is waited for as a new one
        lost, self._lost = self._lost, []
        for node in lost:  # one at a time: a node may owe several
            self._send([node])
        new = sorted(connected - self._greeted)
        if new:
            self._send(new)
            self._greeted |= set(new)
            self._open |= set(new) - self._late
            for node in new:
                self._again_at.pop(node, None)
            self._greet_later(self._late & set(new))
        if self._open or self._late:
            for arrival in self._post.arrivals(but=self._left()):
                receive(arrival)
                del arrival
        self._open &= connected  # a node that left will not answer
        self.nodes = {site: node for site, node in self._known.items() if node in connected}
        return not self._open

    def _send(self, nodes: Sequence[int]) -> None:
        moment = self._ledgers.moment if self._ledgers is not None else 0
        self._post.send(self._hello, {str(n): n for n in nodes}, tag=(GREETING, moment, 0))
        self._unanswered.update(nodes)

    @property
    def eligible(self) -> Sequence[str]:
        """Names of the sites that can take part, in order."""
        return sorted(self.nodes)

    def give_up(self) -> None:
        """Wait no longer for the greetings that are open; a late answer still counts.

        With manners those nodes are greeted anew now and then, and nobody waits for it.
        """
        self.refusals |= dict.fromkeys(self._open, _refusal("a node does not answer its greeting"))
        self._late |= self._open
        self._greet_later(self._open)
        self._open.clear()

    def _greet_later(self, silent: Set[int]) -> None:
        if self._manners is not None:
            due_s = self._clock() + self._manners.silent_s
            self._again_at |= dict.fromkeys(silent, due_s)

    def answered(self, site: str) -> None:
        """Note that a site answered a request."""
        self._misses.pop(site, None)

    def refused(self, site: str, node: int, refusal: Refusal) -> None:
        """Note that a site said no for a reason that its people can mend; it is greeted anew.

        Its hours may have ended, an approval was withdrawn, a disk is full: rounds wait for it,
        and do not use up their attempts on it.
        """
        if self._manners is None or not self._manners.excuses(refusal):
            return
        node = self._known.pop(site, node)  # it may speak through another by now: greet that one
        self.nodes.pop(site, None)
        self.refusals[node] = refusal
        self._again_at[node] = self._clock() + self._manners.again_s

    def missed(self, site: str) -> None:
        """Note that a site let a request's deadline pass; too often, and it is greeted anew."""
        self._misses[site] = self._misses.get(site, 0) + 1
        if self._manners is not None and self._misses[site] >= self._manners.misses_max:
            node = self._known.pop(site, None)
            self.nodes.pop(site, None)
            if node is not None:
                self._greeted.discard(node)

    def took(self, arrival: Arrival) -> bool:
        """Take in an answer to a greeting; False when the arrival is something else."""
        if arrival.tag[0] != GREETING:
            return False
        self._unanswered[arrival.node] -= 1
        self._open.discard(arrival.node)
        self._late.discard(arrival.node)
        self._again_at.pop(arrival.node, None)
        problem = self._problem(arrival)
        if problem is not None:
            self.refusals[arrival.node] = problem
            if self._manners is not None:
                self._again_at[arrival.node] = self._clock() + self._manners.again_s
        elif isinstance(arrival.reply, Welcome):
            self._known[arrival.reply.site] = arrival.node
            self.refusals.pop(arrival.node, None)
            self._misses.pop(arrival.reply.site, None)
        return True

    @property
    def why(self) -> str:
        """Why sites cannot take part, in words."""
        present = [r for node, r in self.refusals.items() if node in self._connected]
        told = {f"{r.site}: {r.detail}" if r.site else r.detail for r in present}
        return "; ".join(sorted(told)) or "they did not connect"

    def reasons_of(self, sites_min: int) -> set[str]:
        """Return why so many sites cannot take part, as the words that are counted."""
        told = {r.reason for node, r in self.refusals.items() if node in self._connected}
        return told if len(self._connected) >= sites_min else told | {"absent"}

    def _problem(self, arrival: Arrival) -> Refusal | None:
        match arrival.reply:
            case Welcome() as welcome:
                holder = self._known.get(welcome.site, arrival.node)
                newest_wins = self._manners is not None and self._manners.newest_wins
                if holder != arrival.node and holder in self._connected and not newest_wins:
                    return _refusal(f"two nodes say they are site {welcome.site!r}")
                if welcome.base != self._base:
                    other = welcome.base[:19]
                    return _refusal(f"site {welcome.site!r} has another base model ({other})")
                if welcome.layout != self._layout.digest:
                    return _refusal(
                        f"site {welcome.site!r} derives another layout; install equal versions"
                    )
                return self._fallen(welcome, since=arrival.tag[1])
            case Refusal() as refusal:
                return refusal
        return _refusal(arrival.problem or "an answer of the wrong kind")

    def _fallen(self, welcome: Welcome, *, since: int) -> Refusal | None:
        reason = self._ledgers.greeted(welcome, since=since) if self._ledgers is not None else None
        if reason is None:
            return None
        self._known.pop(welcome.site, None)  # whichever node speaks for it
        detail = "its privacy ledger is not as long as it was, or another; its people must look"
        return Refusal(site=welcome.site, reason=reason, detail=detail)


def _refusal(detail: str) -> Refusal:
    """Return the coordinator's own refusal of a node."""
    return Refusal(site="", reason="greeting", detail=detail)
