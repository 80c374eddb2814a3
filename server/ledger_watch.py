"""What the coordinator hears of the sites' privacy ledgers: lengths and heads, which only grow."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from intramural.core.journal import Entry
from intramural.core.messages import Evaluated, Update, Welcome

ROLLED_BACK = "ledger-rolled-back"
"""Why a reply does not count, or a site is not admitted, as the journal has it."""
_NOTHING: dict[str, Any] = {"entries": 0, "head": None, "seeded": False, "rolled_back": False}
_Mark = tuple[str, int, str, int | None, str | None]


class LedgerWatch:
    """Remembers each site's ledger as last heard, over rounds and restarts of a run.

    Other runs may charge the same ledger, so growth is always fine. A fall holds for the rest of
    the run: a ledger rolled back grows again with every try, and says too little for good.
    """

    def __init__(
        self,
        history: Sequence[dict[str, Any]],
        entries: Sequence[Entry],
        *,
        fell: Callable[[str], None] = lambda site: None,
    ) -> None:
        """Take up what the last committed round knew, and what the journal refused since.

        Args:
            history: Of the committed rounds.
            entries: The run's journal.
            fell: Told the site when a greeting is the first to show that its ledger was rolled
                back; who judges a reply learns it from `problem`.
        """
        self._heard: dict[str, dict[str, Any]] = {}
        for record in history:  # of a crowd each tells of its own sites alone
            self._heard |= record.get("ledgers", {})
        self._noted: dict[str, _Mark] = {}
        """Of each site the reply noted last; a round tried again gets the very same once more."""
        self._fell = fell
        self.moment = 0
        """How many replies were noted so far; says what a greeting was sent after."""
        self._grown = {
            site: [(0, told["entries"], told["head"])] for site, told in self._heard.items()
        }
        """Of each site, moment, length and head each time that its ledger was noted."""
        for entry in entries:
            if entry.kind == "refused" and entry.body.get("reason") == ROLLED_BACK:
                self._roll_back(entry.body["site"])

    def problem(self, reply: Update | Evaluated) -> str | None:
        """Return why a reply under [privacy] cannot count, or None.

        What it tells was charged, and a charge adds an entry: a ledger that is no longer than
        before was rolled back, or there was no charge.
        """
        known = self._heard.get(reply.site, {})
        grown = (reply.ledger_entries or 0) > known.get("entries", 0)
        again = self._noted.get(reply.site) == _mark(reply)
        if known.get("rolled_back") or reply.ledger_head is None or not (grown or again):
            self._roll_back(reply.site)
            return ROLLED_BACK
        return None

    def greeted(self, welcome: Welcome, *, since: int) -> str | None:
        """Return why a site that answers its greeting under [privacy] cannot take part, or None.

        A greeting charges nothing: the ledger must be as it was, or longer. One that comes late is
        held against what was known when it was asked for, since the ledger may have grown after.
        Nothing is noted: a stored answer, sent again after this, may tell of a shorter ledger.

        Args:
            welcome: The answer, once it is known to be this site's.
            since: `moment` as the greeting was sent.
        """
        notes = self._grown.get(welcome.site, [])
        _, entries, head = next((n for n in reversed(notes) if n[0] <= since), (0, 0, None))
        told = (welcome.ledger_entries or 0, welcome.ledger_head)
        is_sound = told[1] is not None and (told[0] > entries or told == (entries, head))
        known = self._heard.get(welcome.site, {}).get("rolled_back", False)
        if is_sound and not known:
            return None
        if not known:
            self._roll_back(welcome.site)
            self._fell(welcome.site)
        return ROLLED_BACK

    def _roll_back(self, site: str) -> None:
        self._heard[site] = _NOTHING | self._heard.get(site, {}) | {"rolled_back": True}

    def note(self, reply: Update | Evaluated) -> None:
        """Remember a counted reply's ledger."""
        if reply.ledger_entries is None:
            return
        known = _NOTHING | self._heard.get(reply.site, {})
        self.moment += 1
        self._noted[reply.site] = _mark(reply)
        self._heard[reply.site] = {
            "entries": reply.ledger_entries,
            "head": reply.ledger_head,
            "seeded": reply.seeded if isinstance(reply, Update) else known["seeded"],
            "rolled_back": False,
        }
        note = (self.moment, reply.ledger_entries, reply.ledger_head)
        self._grown.setdefault(reply.site, []).append(note)

    def record(self, among: Collection[str] | None = None) -> dict[str, dict[str, Any]]:
        """Return what is known, by site, as a round's record holds it; of some sites, or all."""
        sites = sorted(self._heard if among is None else self._heard.keys() & set(among))
        return {site: self._heard[site] for site in sites}


def _mark(reply: Update | Evaluated) -> _Mark:
    """Return what tells a reply that is sent again: no charge was made in between."""
    what = reply.split if isinstance(reply, Evaluated) else ""
    return type(reply).__name__, reply.round, what, reply.ledger_entries, reply.ledger_head
