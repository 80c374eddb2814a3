"""Splits: train, validation and test, 6 : 2 : 2, by groups and without a word between sites."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil

from intramural.core.errors import DataError
from intramural.core.messages import Split
from intramural.data.records import Record
from intramural.data.text import normalise

TRAIN_END = ceil(Fraction(6, 10) * 2**256)
VALIDATION_END = ceil(Fraction(8, 10) * 2**256)
"""Ends of the sides, as 256-bit hashes count: whole numbers compare faster than fractions."""


@dataclass(frozen=True, kw_only=True)
class Splits:
    """A site's records on their three sides; the three together are all of them, each once."""

    train: tuple[Record, ...] = field(repr=False)
    """At least one."""
    validation: tuple[Record, ...] = field(repr=False)
    """May be empty."""
    test: tuple[Record, ...] = field(repr=False)
    """At least one, unless the site can do without."""


def split_records(
    records: Sequence[Record], *, salt: str, needed: Sequence[Split] = ("train", "test")
) -> Splits:
    """Put each record on the side of its grouping key, in the given order.

    The side depends on the key and the salt alone. So all sites of a federation agree without
    talking: a group that several of them hold is on the same side everywhere, and no group leaks
    from one site's training into another's test. Nor does a record change sides when others come
    or go. (Where person and group are both given, new records may join two groups, and then the
    joined one moves as a whole.) The price: shares are 6 : 2 : 2 of the groups in expectation, not
    of the records exactly.

    Args:
        records: In any order.
        salt: The same at every site; another salt gives another split.
        needed: Sides that must hold a record.

    Raises:
        DataError: No record falls on a side that must hold one.
    """
    keys = grouping_keys(records)
    sides: dict[Split, list[Record]] = {"train": [], "validation": [], "test": []}
    for record, key in zip(records, keys, strict=True):
        sides[side_of(key, salt)].append(record)
    for side in needed:
        if not sides[side]:
            raise DataError(
                f"no record for {side}: records {len(records)}, groups {len(set(keys))};"
                " add records, or name a finer group column"
            )
    return Splits(
        train=tuple(sides["train"]),
        validation=tuple(sides["validation"]),
        test=tuple(sides["test"]),
    )


def side_of(key: str, salt: str) -> Split:
    """Return the side of a grouping key: SHA-256 of salt and key, as a fraction in [0, 1)."""
    digest = hashlib.sha256(f"{salt}|{key}".encode(errors="surrogatepass")).digest()
    place = int.from_bytes(digest)
    if place < TRAIN_END:
        return "train"
    return "validation" if place < VALIDATION_END else "test"


def grouping_keys(records: Sequence[Record]) -> list[str]:
    """Return each record's grouping key; records with equal keys must never be parted.

    The key is `group:` and the record's group, else `person:` and its person, else `text:` and its
    text, so that exact duplicates stay together. Where a record has both a group and a person, the
    two are one: all records that a chain of shared groups and persons connects have the same key,
    the smallest among theirs.
    """
    parents: dict[str, str] = {}
    names = [_names(record.text, record.group, record.person) for record in records]
    for first, *others in names:
        for other in others:
            low, high = sorted((_root(parents, first), _root(parents, other)))
            parents[high] = low
    return [_root(parents, first) for first, *_ in names]


def key_of(text: str, group: str | None, person: str | None) -> str:
    """Return the grouping key of a record that no chain of groups and persons joins to others."""
    return _names(text, group, person)[0]


def _names(text: str, group: str | None, person: str | None) -> list[str]:
    """Return what a record belongs to; the prefix keeps group 7 apart from person 7."""
    given: Iterable[tuple[str, str | None]] = (("group", group), ("person", person))
    names = [f"{kind}:{value}" for kind, value in given if value is not None]
    return names or [f"text:{normalise(text)}"]


def _root(parents: dict[str, str], name: str) -> str:
    """Return the smallest member of a name's set, and shorten the way there for the next time."""
    root = name
    while (above := parents.get(root, root)) != root:
        root = above
    while name != root:
        parents[name], name = root, parents[name]
    return root
