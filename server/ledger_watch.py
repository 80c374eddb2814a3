"""What the coordinator hears of the sites' privacy ledgers: lengths and heads, which only grow."""

from collections.abc import Sequence
from typing import Any

from intramural.core.messages import Update


class LedgerWatch:
    """Remembers each site's ledger as last heard, over rounds and restarts of a run."""

    def __init__(self, history: Sequence[dict[str, Any]]) -> None:
        """Take up what the last committed round knew."""
        last = history[-1] if history else {}
        self._heard: dict[str, dict[str, Any]] = dict(last.get("ledgers", {}))

    def problem(self, update: Update) -> str | None:
        """Return why an update under [privacy] cannot count, or None.

        A charge adds an entry, so a ledger that is no longer than before was rolled back, or the
        round was not charged.
        """
        known = self._heard.get(update.site, {}).get("entries", 0)
        charged = update.ledger_head is not None and (update.ledger_entries or 0) > known
        return None if charged else "ledger-rolled-back"

    def note(self, update: Update) -> None:
        """Remember a counted update's ledger."""
        if update.ledger_entries is not None:
            self._heard[update.site] = {
                "entries": update.ledger_entries,
                "head": update.ledger_head,
                "seeded": update.seeded,
            }

    def record(self) -> dict[str, dict[str, Any]]:
        """Return what is known, by site, as a round's record holds it."""
        return dict(sorted(self._heard.items()))
