"""What the coordinator hears of the sites' privacy ledgers: lengths and heads, which only grow."""

from collections.abc import Sequence
from typing import Any

from intramural.core.journal import Entry
from intramural.core.messages import Update

ROLLED_BACK = "ledger-rolled-back"
"""Why an update does not count, as the journal has it."""
_NOTHING: dict[str, Any] = {"entries": 0, "head": None, "seeded": False, "rolled_back": False}


class LedgerWatch:
    """Remembers each site's ledger as last heard, over rounds and restarts of a run."""

    def __init__(self, history: Sequence[dict[str, Any]], entries: Sequence[Entry]) -> None:
        """Take up what the last committed round knew, and what the journal refused since."""
        last = history[-1] if history else {}
        self._heard: dict[str, dict[str, Any]] = dict(last.get("ledgers", {}))
        self._noted: dict[str, tuple[int, int | None, str | None]] = {}
        """Of each site the update noted last; a round tried again gets the very same once more."""
        for entry in entries:
            if entry.kind == "refused" and entry.body.get("reason") == ROLLED_BACK:
                self._roll_back(entry.body["site"])

    def problem(self, update: Update) -> str | None:
        """Return why an update under [privacy] cannot count, or None.

        A charge adds an entry, so a ledger that is no longer than before was rolled back, or the
        round was not charged. That holds for the rest of the run: a ledger rolled back grows again
        with every try, and says too little for good.
        """
        known = self._heard.get(update.site, {})
        grown = (update.ledger_entries or 0) > known.get("entries", 0)
        again = self._noted.get(update.site) == _mark(update)
        if known.get("rolled_back") or update.ledger_head is None or not (grown or again):
            self._roll_back(update.site)
            return ROLLED_BACK
        return None

    def _roll_back(self, site: str) -> None:
        self._heard[site] = _NOTHING | self._heard.get(site, {}) | {"rolled_back": True}

    def note(self, update: Update) -> None:
        """Remember a counted update's ledger."""
        if update.ledger_entries is not None:
            self._noted[update.site] = _mark(update)
            self._heard[update.site] = {
                "entries": update.ledger_entries,
                "head": update.ledger_head,
                "seeded": update.seeded,
                "rolled_back": False,
            }

    def record(self) -> dict[str, dict[str, Any]]:
        """Return what is known, by site, as a round's record holds it."""
        return dict(sorted(self._heard.items()))


def _mark(update: Update) -> tuple[int, int | None, str | None]:
    """Return what tells an update that is sent again: no charge was made in between."""
    return update.round, update.ledger_entries, update.ledger_head
