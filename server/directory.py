"""Directory: which connected node is which site, and which of them can take part."""

from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout
from intramural.core.messages import Hello, Refusal, Welcome
from intramural.server.post import Arrival, Post

GREETING = "hello"


class Directory:
    """Greets every node once and keeps what it answered."""

    def __init__(
        self, post: Post, federation: FederationConfig, *, layout: Layout, base: str
    ) -> None:
        """Check sites against the federation's layout and base model digest."""
        self._post = post
        self._hello = Hello(manifest=federation.digest)
        self._layout = layout
        self._base = base
        self._greeted: set[int] = set()
        self._open: set[int] = set()
        self._known: dict[str, int] = {}
        self.nodes: dict[str, int] = {}
        """Node of each site that is connected and can take part."""
        self.refusals: dict[int, str] = {}
        """Why a node cannot take part."""

    def greet(self) -> bool:
        """Greet new nodes and take in their answers; True when no greeting is open."""
        connected = self._post.node_ids()
        new = sorted(connected - self._greeted)
        if new:
            self._post.send(self._hello, {str(n): n for n in new}, tag=(GREETING, 0, 0))
            self._greeted |= set(new)
            self._open |= set(new)
        if self._open:
            for arrival in self._post.arrivals():
                self.took(arrival)
        self._open &= connected  # a node that left will not answer
        self.nodes = {site: node for site, node in self._known.items() if node in connected}
        return not self._open

    def took(self, arrival: Arrival) -> bool:
        """Take in an answer to a greeting; False when the arrival is something else."""
        if arrival.tag[0] != GREETING:
            return False
        self._open.discard(arrival.node)
        problem = self._problem(arrival)
        if problem is not None:
            self.refusals[arrival.node] = problem
        elif isinstance(arrival.reply, Welcome):
            self._known[arrival.reply.site] = arrival.node
        return True

    def _problem(self, arrival: Arrival) -> str | None:
        match arrival.reply:
            case Welcome() as welcome:
                if welcome.site in self._known and self._known[welcome.site] in self._open:
                    return f"two nodes say they are site {welcome.site!r}"
                if welcome.base != self._base:
                    return f"site {welcome.site!r} has another base model ({welcome.base[:19]})"
                if welcome.layout != self._layout.digest:
                    return f"site {welcome.site!r} derives another layout; install equal versions"
                return None
            case Refusal() as refusal:
                return f"{refusal.site}: {refusal.detail}"
        return arrival.problem or "an answer of the wrong kind"
