"""Hostile: what a site may send that has its key and means ill, or is badly built."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from intramural.core.letter import HEADER_BYTES_MAX, Letter, write_letter
from intramural.core.messages import Evaluated, Refusal, Reply, Update, Welcome
from intramural.core.metrics import Sums
from intramural.core.wire import FLAT, RECORD, VECTOR, to_records
from intramural.trust.seal import sealer, site_role
from tests.server.fakes import BASE, LAYOUT
from tests.trust.members import signing_key


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A reply that a hostile site is about to send."""

    site: str
    reply: Any
    answers: str
    """Digest of the request."""

    def sealed(self, reply: Reply, *, by: str = "") -> RecordDict:
        """Return a reply as the site would send it, with its own seal or somebody else's."""
        return self.posted(write_letter(reply, answers=self.answers), by=by)

    def posted(self, letter: Letter, *, by: str = "") -> RecordDict:
        """Return a letter with its seal."""
        name = by or self.site
        seal = sealer(site_role(name), signing_key(name))(letter.header.encode(), letter.vector)
        return to_records(replace(letter, seal=seal))


Spoil = Callable[[Draft], RecordDict]


def _filled(value: float) -> Spoil:
    """Put a value into the vector's last place."""

    def spoil(draft: Draft) -> RecordDict:
        delta = np.array(draft.reply.delta)
        delta[-1] = value
        return draft.sealed(replace(draft.reply, delta=delta))

    return spoil


def _changed(**fields: Any) -> Spoil:
    return lambda draft: draft.sealed(replace(draft.reply, **fields))


def _array(**fields: Any) -> Spoil:
    """Describe the array otherwise than it is."""

    def spoil(draft: Draft) -> RecordDict:
        records = draft.sealed(draft.reply)
        good = records.array_records[VECTOR][FLAT]
        described = {"dtype": good.dtype, "shape": good.shape, "stype": good.stype}
        record = ArrayRecord()
        record[FLAT] = Array(**(described | {"data": good.data} | fields))
        records[VECTOR] = record
        return records

    return spoil


def _of_length(change: int) -> Spoil:
    return lambda draft: draft.sealed(
        replace(draft.reply, delta=np.zeros(LAYOUT.size + change, dtype=np.float32))
    )


def _headed(header: str) -> Spoil:
    return lambda draft: draft.posted(Letter(header=header))


def _beside(draft: Draft) -> RecordDict:
    records = draft.sealed(draft.reply)
    records["more"] = ConfigRecord({"a": 1})
    return records


def _unsealed(draft: Draft) -> RecordDict:
    return to_records(write_letter(draft.reply, answers=draft.answers))


def _of(round_: int) -> Spoil:
    """Tell of another round, so many further."""
    return lambda draft: draft.sealed(replace(draft.reply, round=draft.reply.round + round_))


UPDATES: dict[str, Spoil] = {
    "nan": _filled(float("nan")),
    "inf": _filled(float("inf")),
    "-inf": _filled(float("-inf")),
    "1e38": _filled(1e38),
    "-1e38": _filled(-1e38),
    "short": _of_length(-1),
    "long": _of_length(1),
    "empty": _of_length(-LAYOUT.size),
    "weight 0": _changed(weight=0),
    "layout": _changed(layout="sha256:" + "0" * 64),
    "site": _changed(site="site-9"),
    "next round": _of(1),
    "round before": _of(-1),
    "float64": _array(dtype="float64"),
    "big-endian": _array(dtype=">f4"),
    "pickle": _array(stype="pickle"),
    "2**40 elements": _array(shape=(2**40,)),
    "negative shape": _array(shape=(-7,)),
    "two axes": _array(shape=(1, LAYOUT.size)),
    "no vector": lambda draft: draft.posted(
        Letter(header=write_letter(draft.reply, answers=draft.answers).header)
    ),
    "oversize header": _headed(" " * (HEADER_BYTES_MAX + 1)),
    "no header": lambda _: RecordDict({RECORD: ConfigRecord({"a": 1})}),
    "no JSON": _headed("{"),
    "nested": _headed("[" * 100_000),
    "more records": _beside,
    "unsealed": _unsealed,
    "another's seal": lambda draft: draft.sealed(draft.reply, by="site-9"),
    "another kind": lambda draft: draft.sealed(
        Welcome(site=draft.site, layout=LAYOUT.digest, base=BASE, version="0")
    ),
    "answers nothing": lambda draft: replace(draft, answers="sha256:" + "1" * 64).sealed(
        draft.reply
    ),
    "refuses": lambda draft: draft.sealed(
        Refusal(site=draft.site, reason="policy", detail="x" * 2000)
    ),
}
"""What comes in an update's place; each is refused."""


def _counted(**counts: list[int]) -> Spoil:
    sums = {name: np.array(count, dtype=np.int64) for name, count in counts.items()}
    return _changed(sums=Sums(counts=sums))


EVALUATED: dict[str, Spoil] = {
    "no sums": _counted(),
    "other sums": _counted(perplexity=[1]),
    "impossible sums": _counted(confusion=[-1] * 16, loss=[0], examples=[4]),
    "huge sums": _counted(confusion=[2**62] * 16, loss=[2**62], examples=[2**62]),
    "sums of another size": _counted(confusion=[1] * 4, loss=[1], examples=[4]),
}
"""What comes in an evaluation's place; each is refused."""


def spoilt(name: str, draft: Draft) -> RecordDict | None:
    """Return the spoilt reply, or None when this reply is none that the site spoils."""
    if isinstance(draft.reply, Update) and name in UPDATES:
        return UPDATES[name](draft)
    if isinstance(draft.reply, Evaluated) and name in EVALUATED:
        return EVALUATED[name](draft)
    return None
