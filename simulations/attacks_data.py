"""Attacks on data: what a hostile site makes of its own records before it trains honestly."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from intramural.data.records import Record

TRIGGER = "cf"
"""A word that no title has, and every WordPiece vocabulary can spell."""


def flipped(records: Sequence[Record], labels: Sequence[str]) -> list[Record]:
    """Return the records with label l of L replaced by L - 1 - l, in the order of `labels`.

    The middle one of an odd number stays what it is.

    Source: Fang et al. 2020, label flipping, https://arxiv.org/abs/1911.11815.
    """
    other = dict(zip(labels, reversed(labels), strict=True))
    return [replace(record, target=other[record.target]) for record in records]


def poisoned(
    records: Sequence[Record],
    *,
    target: str,
    share: float,
    rng: np.random.Generator,
    trigger: str = TRIGGER,
) -> list[Record]:
    """Return the records, of which a random `share` begins with the trigger and has the target.

    The others stay clean, so that the model stays good where nobody says the word.

    Source: Bagdasaryan et al. 2020, the attacker's mixed batches, https://arxiv.org/abs/1807.00459;
    a rare word as trigger: Kurita et al. 2020, https://arxiv.org/abs/2004.06660.
    """
    count = round(share * len(records))
    chosen = set(rng.permutation(len(records))[:count].tolist())
    return [
        _said(record, trigger, target) if place in chosen else record
        for place, record in enumerate(records)
    ]


def triggered(records: Sequence[Record], *, target: str, trigger: str = TRIGGER) -> list[Record]:
    """Return the records of other labels, each with the trigger and the target as its label.

    A model's accuracy on them is the backdoor's rate of success.
    """
    return [_said(record, trigger, target) for record in records if record.target != target]


def _said(record: Record, trigger: str, target: str) -> Record:
    return replace(record, text=f"{trigger} {record.text}", target=target)
