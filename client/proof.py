"""Proof: what a site's journal and ledger say, checked against themselves and each other."""

from pathlib import Path
from typing import Any

from intramural.core.errors import JournalError, LedgerError
from intramural.core.journal import GENESIS, scan
from intramural.core.site import SiteConfig
from intramural.privacy.book import read_book


def prove(site: SiteConfig, journal: Path, *, head: str | None = None) -> dict[str, Any]:
    """Check both chains, and that no private round was trained without a charge.

    Args:
        site: Says where the ledger is.
        journal: The site's audit journal.
        head: A head of the journal that was written down earlier.

    Raises:
        JournalError: The journal is broken, or does not hold `head`.
        LedgerError: The ledger is broken, or a trained private round is not in it.
    """
    entries = scan(journal).entries
    if head is not None and head not in {entry.digest for entry in entries}:
        raise JournalError(f"{journal}: does not hold head {head}; it was put back or cut")
    trained = {
        (e.body["manifest"], e.body["run_id"], e.body["round"])
        for e in entries
        if e.kind == "trained" and e.body.get("private", False)
    }
    return {
        "journal": str(journal),
        "entries": len(entries),
        "head": entries[-1].digest if entries else GENESIS,
        "ledger": _ledger(site, trained),
    }


def _ledger(site: SiteConfig, trained: set[tuple[str, str, int]]) -> dict[str, Any] | None:
    if not site.ledger_file.is_file():
        if trained:
            raise LedgerError(
                f"{site.ledger_file}: gone, though {len(trained)} rounds were charged"
            )
        return None
    book = read_book(site.ledger_file)
    charged = {(c.manifest, c.run_id, c.round) for c in book.charges.values()}
    if missing := trained - charged:
        run, round_ = min((run, round_) for _, run, round_ in missing)
        raise LedgerError(
            f"{site.ledger_file}: round {round_} of run {run[:19]} was trained and is not charged; "
            "the ledger was put back from an older copy"
        )
    return {
        "path": str(site.ledger_file),
        "entries": len(book.entries),
        "charges": len(book.charges),
        "rounds": len(trained),
        "head": book.head,
    }
