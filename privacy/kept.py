"""Kept: the composed distribution of a ledger's charges, beside the ledger, for the next load.

The file saves time and says nothing of its own: the ledger's events are the truth. It is used only
if it is whole and was composed of exactly the ledger's first entries, by the same accountant; else
it is written anew. Charges are never decided by it, see `Spending`; a figure that rests on it is
compared with the events, see `Composer`.
"""

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
from dp_accounting.pld.pld_pmf import DensePLDPmf
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from pydantic import BaseModel, ConfigDict, Field

from intramural.privacy.accountant import (
    ACCOUNTANT,
    RECORD_INTERVAL,
    Groups,
    Relation,
    groups_of,
)
from intramural.privacy.book import Book
from intramural.privacy.charges import events_of, relations_of, steps_of
from intramural.privacy.composer import Composed, Composer

SUFFIX: Final = ".composed"
BYTES_MAX: Final = 1 << 28
"""A larger file is not read."""

Whole = Annotated[int, Field(ge=1)]


class Pmf(BaseModel):
    """One side of a distribution, without its probabilities."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    lower_loss: Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)]
    """The smallest loss, in bins."""
    infinity_mass: Annotated[float, Field(ge=0, le=1)]
    """Probability of a loss without bound."""
    size: Whole
    """Number of bins."""


class Part(BaseModel):
    """What was composed under one relation."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    relation: Relation
    sample_rates: list[float]
    noise_multipliers: list[float]
    steps: list[Whole]
    """Mechanisms in order: a rate, a noise multiplier and a number of steps each."""
    pmfs: Annotated[list[Pmf], Field(min_length=1, max_length=2)]
    """One, where a unit that comes and one that goes cost the same; else of one that goes first."""

    @property
    def groups(self) -> Groups:
        """The steps of each mechanism."""
        mechanisms = zip(self.sample_rates, self.noise_multipliers, strict=True)
        return tuple(zip(mechanisms, self.steps, strict=True))


class Header(BaseModel):
    """What the probabilities belong to; they follow as little-endian float64."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    format: Literal[1] = 1
    accountant: str = ACCOUNTANT
    interval: float = RECORD_INTERVAL
    """Width of a bin, in epsilon."""
    head: str
    """Digest of the ledger's last entry then, which commits to all before it."""
    entries: Whole
    """The ledger's length then."""
    parts: list[Part]


def compose_kept(composer: Composer, ledger: Path, book: Book) -> None:
    """Compose what a book's charges cost, with what is kept beside the ledger; then keep that.

    Afterwards the composer answers for these charges at once.
    """
    charges = list(book.charges.values())
    if not charges:
        return
    path = kept_beside(ledger)
    kept = take_kept(composer, ledger, book)
    events, delta = events_of(steps_of(charges)), min(charge.delta for charge in charges)
    found = {}
    for relation in relations_of(charges):
        composer(events, delta=delta, relation=relation)
        composed = composer.composed(events, relation)
        if composed is not None:
            found[relation] = composed
    if any(kept.get(relation) is not composed for relation, composed in found.items()):
        write_kept(path, book, found)


def take_kept(composer: Composer, ledger: Path, book: Book) -> dict[Relation, Composed]:
    """Let a composer build upon what is kept beside a ledger; nothing is written."""
    kept = read_kept(kept_beside(ledger), book)
    for relation, composed in kept.items():
        composer.take(relation, composed)
    return kept


def kept_beside(ledger: Path) -> Path:
    """Return where a ledger's composed distribution is kept."""
    return ledger.with_name(ledger.name + SUFFIX)


def read_kept(path: Path, book: Book) -> dict[Relation, Composed]:
    """Return what is kept and belongs to the book's first entries; nothing, if it does not."""
    with suppress(OSError, ValueError, OverflowError):  # torn, altered or of another version
        if path.stat().st_size > BYTES_MAX:
            return {}
        digest, _, content = path.read_bytes().partition(b"\n")
        if digest.decode() != hashlib.sha256(content).hexdigest():
            return {}
        line, _, numbers = content.partition(b"\n")
        header = Header.model_validate_json(line)
        if _belongs(header, book):
            return _composed(header, np.frombuffer(numbers, dtype="<f8"))
    return {}


def _belongs(header: Header, book: Book) -> bool:
    """Return whether the file was made of the book's first entries, and as it would be now."""
    if (header.accountant, header.interval) != (ACCOUNTANT, RECORD_INTERVAL):
        return False
    if header.entries > len(book.entries) or book.entries[header.entries - 1].digest != header.head:
        return False
    charges = [charge for seq, charge in book.charges.items() if seq < header.entries]
    sampled = tuple(g for g in groups_of(events_of(steps_of(charges))) if g[0][0] < 1)
    return all(part.groups == sampled for part in header.parts)


def _composed(header: Header, numbers: np.ndarray[Any, np.dtype[np.float64]]) -> dict[Any, Any]:
    sizes = [pmf.size for part in header.parts for pmf in part.pmfs]
    if sum(sizes) != len(numbers) or not (np.abs(numbers) <= 1).all():  # a NaN is not
        raise ValueError("probabilities are missing, or are no numbers")
    pieces = iter(np.split(numbers.astype(np.float64), np.cumsum(sizes)[:-1]))
    found = {}
    for part in header.parts:
        sides = [
            DensePLDPmf(RECORD_INTERVAL, pmf.lower_loss, next(pieces), pmf.infinity_mass, True)
            for pmf in part.pmfs
        ]
        distribution = PrivacyLossDistribution(*sides)
        found[part.relation] = Composed(groups=part.groups, distribution=distribution, is_read=True)
    return found


def write_kept(path: Path, book: Book, composed: Mapping[Relation, Composed]) -> None:
    """Keep what was composed of all the book's charges; without space or rights, nothing is kept.

    Nobody but the owner may read or write the file. It need not survive a power cut: a torn one is
    noticed and made anew.
    """
    parts, numbers = [], b""
    for relation, one in composed.items():
        whole = one.distribution
        sides = [whole._pmf_remove] if whole._symmetric else [whole._pmf_remove, whole._pmf_add]
        dense = [side.to_dense_pmf() for side in sides]
        pmfs = [
            Pmf(
                lower_loss=int(side._lower_loss),
                infinity_mass=float(side._infinity_mass),
                size=side.size,
            )
            for side in dense
        ]
        numbers += b"".join(side._probs.astype("<f8").tobytes() for side in dense)
        parts.append(
            Part(
                relation=relation,
                sample_rates=[rate for (rate, _), _ in one.groups],
                noise_multipliers=[noise for (_, noise), _ in one.groups],
                steps=[steps for _, steps in one.groups],
                pmfs=pmfs,
            )
        )
    header = Header(head=book.head, entries=len(book.entries), parts=parts)
    content = header.model_dump_json().encode() + b"\n" + numbers
    with suppress(OSError):
        _replace(path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def _replace(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    beside.unlink(missing_ok=True)  # of a process that was killed
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            file.write(content)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
