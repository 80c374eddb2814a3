"""Book: what a privacy ledger's file holds, read and verified."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from intramural.core.errors import JournalError, LedgerError
from intramural.core.journal import GENESIS, Entry, scan
from intramural.privacy.charges import Charge

FORMAT: Final = 1

Outcome = Literal["done", "failed"]


class Opened(BaseModel):
    """A ledger's first entry."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    site: str
    data: str
    """Name of the data set."""
    format: Literal[1]
    """Of the entries that follow."""
    ledger: str
    """Random name of this ledger, drawn when it was opened."""


class Settled(BaseModel):
    """How a charge's work ended; for people, since no charge is ever refunded."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    charge: Annotated[int, Field(ge=1)]
    """Place of the charge's entry."""
    outcome: Outcome
    nonce: str = Field(default_factory=lambda: secrets.token_hex(16))
    """The chain's head leaves the site: without this, who knows two of them could try out the
    times between them, and with the time of training learn about the records."""


@dataclass(frozen=True, kw_only=True)
class Book:
    """A ledger's content at one moment."""

    opened: Opened
    entries: tuple[Entry, ...]
    charges: dict[int, Charge]
    """By the place of their entries."""
    outcomes: dict[int, Outcome]
    """By the place of the charge; a charge whose work was cut off has none."""

    @property
    def head(self) -> str:
        """Digest of the last entry; write it down elsewhere to notice a rollback."""
        return self.entries[-1].digest

    def check_head(self, expected: str, *, path: Path) -> None:
        """Check that the chain holds a head that was written down earlier.

        Raises:
            LedgerError: It does not: the ledger was rolled back, or is another one.
        """
        if expected not in {GENESIS, *(entry.digest for entry in self.entries)}:
            raise rolled_back(path, expected, len(self.entries))


def read_book(path: Path) -> Book:
    """Read and verify a ledger, without a lock and without changing it.

    A torn last record is left out: its charge never returned, so its work never began.

    Raises:
        LedgerError: There is none, or an entry is altered, missing or unknown; the first is named.
    """
    with as_ledger_error(path):
        if not path.is_file():
            raise LedgerError(f"{path.name}: no such ledger; a site writes it in its first round")
        return book_of(scan(path).entries, path=path)


def book_of(entries: tuple[Entry, ...], *, path: Path) -> Book:
    """Return the content of a verified chain's entries; what is unknown is an error, not skipped.

    Raises:
        LedgerError: An entry cannot be read by this version; the first is named.
    """
    if not entries or entries[0].kind != "opened":
        raise LedgerError(f"{path.name}: entry 0 opens no privacy ledger; name a ledger's file")
    opened = _body(Opened, entries[0], path)
    charges: dict[int, Charge] = {}
    outcomes: dict[int, Outcome] = {}
    for entry in entries[1:]:
        match entry.kind:
            case "charged":
                charges[entry.seq] = _body(Charge, entry, path)
            case "settled":
                settled = _body(Settled, entry, path)
                outcomes[settled.charge] = settled.outcome
            case _:
                raise _unknown(entry, path)
    return Book(opened=opened, entries=entries, charges=charges, outcomes=outcomes)


Body = TypeVar("Body", bound=BaseModel)


def _body(model: type[Body], entry: Entry, path: Path) -> Body:
    try:
        return model.model_validate(entry.body)
    except ValidationError:
        raise _unknown(entry, path) from None


def _unknown(entry: Entry, path: Path) -> LedgerError:
    return LedgerError(
        f"{path.name}: entry {entry.seq} ({entry.kind!r}) cannot be read by this version; "
        "install the version of intramural that wrote it"
    )


def rolled_back(path: Path, expected: str, entries: int) -> LedgerError:
    """Return the error of a chain that lacks a head known to have been in it."""
    return LedgerError(
        f"{path.name}: the earlier head {expected[:19]} is not in its chain of {entries} entries: "
        "it was rolled back or exchanged; restore the newest copy"
    )


@contextmanager
def as_ledger_error(path: Path) -> Iterator[None]:
    """Turn what the disk and the journal raise into errors of the ledger; no folder is named."""
    try:
        yield
    except JournalError as error:
        raise LedgerError(str(error).replace(str(path), path.name)) from error
    except OSError as error:
        raise LedgerError(
            f"{path.name}: {error.strerror}; check the ledger's folder, rights and free space"
        ) from error


def body_of(model: BaseModel) -> dict[str, Any]:
    """Return a model's fields as an entry's body."""
    return model.model_dump(mode="json")
