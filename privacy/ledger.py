"""Ledger: a site's durable record of the privacy one data set has spent."""

import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

from pydantic import BaseModel

from intramural.core.errors import BudgetExhausted, LedgerError
from intramural.core.files import Held, exclusive
from intramural.core.journal import Entry, Journal, utc_now
from intramural.privacy.accountant import SCREEN_INTERVAL
from intramural.privacy.book import (
    FORMAT,
    Book,
    Opened,
    Outcome,
    Settled,
    as_ledger_error,
    body_of,
    book_of,
    rolled_back,
)
from intramural.privacy.charges import Charge, Composition, Spending, Spent, unit_of
from intramural.privacy.composer import Composer
from intramural.privacy.kept import compose_kept
from intramural.privacy.told import told

__all__ = ["Charge", "Ledger", "Outcome", "Spent"]

CLOCK_BACK_MAX = timedelta(minutes=5)
"""A clock set back by no more than this is taken for a correction."""
LOCK_WAIT_S = 10.0
IDENTITY_BYTES = 32
"""Of a ledger's random name, which its lock file keeps too."""


class Ledger:
    """A data set's ledger: it is charged before the data is used, and never refunded.

    Several processes may share one ledger: each charge and settlement takes an exclusive lock on
    the file PATH.lock, verifies the whole chain anew, counts what others have written since, and
    is on disk before it returns. Nothing is held in between, so nothing needs closing. What was
    spent by then is composed when the ledger is opened, so that `epsilon` answers at once; see
    `kept.py` for the file that spares most of that the next time.

    Guarantees:
        When `charge` has returned, the charge survives a crash and a power cut; when it raised,
        the work must not begin. So at every moment `epsilon` of the ledger on disk is at least
        that of all noise drawn: of all runs, trials, aborted rounds and retries on the data set.
        A changed, lost or reordered entry is noticed before the next charge, and so is a ledger
        that is gone while its lock file is not. One restored from an older copy is noticed while
        it is in use, else only by `check_head`. Void where the data is used without a charge, or
        under another data set's name.
    """

    def __init__(
        self,
        path: Path,
        *,
        site: str,
        data: str,
        now: Callable[[], datetime] = utc_now,
        composition: Composition | None = None,
        lock_wait_s: float = LOCK_WAIT_S,
    ) -> None:
        """Open the ledger at `path`, or begin it.

        Args:
            path: Its file.
            site: Name of the site.
            data: Name of the data set.
            now: The clock.
            composition: Another accountant, for tests; None: PLD.
            lock_wait_s: How long another process may hold the lock.

        Raises:
            LedgerError: It is broken, another site's or data set's, locked, or cannot be written.
        """
        self.path = path
        self.site = site
        self.data = data
        """Name of the data set."""
        self._now = now
        self._lock_wait_s = lock_wait_s
        wide = Composer(interval=SCREEN_INTERVAL)
        teller = Composer(guard=wide)
        self._spending = (
            Spending(told=teller, bound=wide) if composition is None else Spending(composition)
        )
        self._last: Book | None = None
        with self._exclusive():
            pass  # reads it, or begins it
        if composition is None:
            compose_kept(teller, path, self.book)

    @property
    def charges(self) -> tuple[Charge, ...]:
        """Every charge, in order, as last read."""
        return self._spending.charges

    @property
    def book(self) -> Book:
        """The ledger's content, as last read."""
        assert self._last is not None
        return self._last

    @property
    def head(self) -> str:
        """Digest of the last entry, as last read; write it down elsewhere to notice a rollback."""
        return self.book.head

    def __len__(self) -> int:
        """Return the number of entries, as last read."""
        return len(self.book.entries)

    def epsilon(self, delta: float) -> float:
        """Return what all charges cost together at `delta`; `Spending` says for whom."""
        return self._spending.epsilon(delta)

    def spent(self, delta: float) -> Spent:
        """Return what all charges cost together, with unit, relation and claim."""
        return self._spending.spent(delta)

    def charge(self, charge: Charge, *, epsilon_lifetime: float | None, delta: float) -> int:
        """Write a charge to disk and return its place; only then may its work begin.

        Args:
            charge: What is about to be done with the data.
            epsilon_lifetime: Most that all charges may cost together; None: no limit.
            delta: At which that is read.

        Raises:
            BudgetExhausted: They would cost more; nothing was written.
            LedgerError: It could not be written, or not by this clock; the work must not begin.
        """
        with self._exclusive() as journal:
            self._check_budget([charge], epsilon_lifetime, delta)
            return self._append(journal, "charged", charge).seq

    def foresee(
        self, charges: Sequence[Charge], *, epsilon_lifetime: float | None, delta: float
    ) -> None:
        """Refuse charges that the lifetime budget could not bear; write nothing.

        Raises:
            BudgetExhausted: It could not.
            LedgerError: The ledger cannot be read.
        """
        with self._exclusive():
            self._check_budget(charges, epsilon_lifetime, delta)

    def refresh(self) -> None:
        """Read what other processes have written since.

        Raises:
            LedgerError: The ledger cannot be read.
        """
        with self._exclusive():
            pass

    def settle(self, charge: int, *, outcome: Outcome) -> None:
        """Note how a charge's work ended. For people: no charge is ever refunded.

        Raises:
            LedgerError: There is no such charge, or the note could not be written.
        """
        with self._exclusive() as journal:
            if charge not in self.book.charges:
                raise LedgerError(f"{self.path.name}: entry {charge} is no charge to settle")
            self._append(journal, "settled", Settled(charge=charge, outcome=outcome))

    def check_head(self, expected: str) -> None:
        """Check that the chain holds a head that was written down earlier.

        Raises:
            LedgerError: It does not: the ledger was rolled back, or is another one.
        """
        self.book.check_head(expected, path=self.path)

    def _check_budget(
        self, charges: Sequence[Charge], epsilon_lifetime: float | None, delta: float
    ) -> None:
        if epsilon_lifetime is None or not charges:
            return
        if not self._spending.within(epsilon_lifetime, delta, after=charges):
            epsilon = self._spending.epsilon(delta, after=charges)
            unit = unit_of([*self.charges, *charges])
            raise BudgetExhausted(
                f"the data set's privacy budget is exhausted: one {unit} would have spent epsilon "
                f"{told(epsilon)} at delta {delta:g}, of {epsilon_lifetime:g} for its lifetime and "
                f"{told(self.epsilon(delta))} so far; add noise, train fewer steps, or use other "
                "records"
            )

    @contextmanager
    def _exclusive(self) -> Iterator[Journal]:
        """Hold the lock and the journal, with all that others wrote counted."""
        with as_ledger_error(self.path), self._locked() as lock:
            known = _name_in(os.pread(lock, IDENTITY_BYTES, 0))
            journal = Journal(self.path, now=lambda: self._time(journal))
            try:
                if not journal.entries and self._last is None:
                    self._begin(journal, known)
                self._catch_up(journal)
                identity = self.book.opened.ledger
                if known and known != identity:
                    raise self._gone(known)
                if known != identity:
                    os.pwrite(lock, identity.encode(), 0)
                    os.fsync(lock)
                yield journal
            finally:
                journal.close()

    @contextmanager
    def _locked(self) -> Iterator[int]:
        lock = self.path.with_name(f"{self.path.name}.lock")
        try:
            with exclusive(lock, wait_s=self._lock_wait_s) as descriptor:
                yield descriptor
        except Held:
            raise LedgerError(
                f"{lock.name}: another process holds it for {self._lock_wait_s:g} s already; let "
                "its charge finish, or end that process"
            ) from None

    def _begin(self, journal: Journal, known: str) -> None:
        """Begin a ledger, where there never was one."""
        if known:
            raise self._gone(known)
        identity = secrets.token_hex(IDENTITY_BYTES // 2)
        opened = Opened(site=self.site, data=self.data, format=FORMAT, ledger=identity)
        journal.append("opened", **body_of(opened))

    def _gone(self, identity: str) -> LedgerError:
        return LedgerError(
            f"{self.path.name}: ledger {identity[:8]} was here, as {self.path.name}.lock knows, "
            "and is gone or exchanged; restore its newest copy: beginning anew would forget what "
            "the data set has spent"
        )

    def _append(self, journal: Journal, kind: str, body: BaseModel) -> Entry:
        entry = journal.append(kind, **body_of(body))
        self._catch_up(journal)
        return entry

    def _catch_up(self, journal: Journal) -> None:
        """Count the charges that the journal has and this object does not know."""
        entries, known = tuple(journal.entries), 0
        if self._last is not None:
            known = len(self._last.entries)
            if len(entries) < known or entries[known - 1].digest != self._last.head:
                raise rolled_back(self.path, self._last.head, len(entries))
        book = book_of(entries, path=self.path)
        own, found = (self.site, self.data), (book.opened.site, book.opened.data)
        for name, mine, other in zip(("site", "data set"), own, found, strict=True):
            if mine != other:
                raise LedgerError(
                    f"{self.path.name}: opened for another {name} than {mine!r}; name this one's "
                    "own ledger in site.toml (data.ledger), and leave that file as it is"
                )
        for place, charge in book.charges.items():
            if place >= known:
                self._spending.add(charge)
        self._last = book

    def _time(self, journal: Journal) -> datetime:
        """Return the time to write: never earlier than the last entry's."""
        now = self._now()
        last = datetime.fromisoformat(journal.entries[-1].time) if journal.entries else now
        if last - now > CLOCK_BACK_MAX:
            raise LedgerError(
                f"{self.path.name}: the clock is {last - now} behind the last entry, written at "
                f"{last.isoformat(timespec='seconds')}; set the clock right"
            )
        return max(now, last)


def _name_in(content: bytes) -> str:
    """Return the ledger's name that a lock file holds, or ''; a torn one is none."""
    text = content.decode(errors="replace")
    return text if re.fullmatch(f"[0-9a-f]{{{IDENTITY_BYTES}}}", text) else ""
