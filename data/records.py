"""Records: what a site trains on, once read, cleaned and counted."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of a site's file, by what they are for."""

    text: str
    """Column of the text a model reads."""
    target: str
    """Column of what it should answer: a label, a number or a text."""
    person: str | None = None
    """Column of the patient or customer a record belongs to."""
    group: str | None = None
    """Column whose equal values must stay on one side of a split."""

    @property
    def names(self) -> tuple[str, ...]:
        """The columns to read, in the order above, each once."""
        given = (self.text, self.target, self.person, self.group)
        return tuple(dict.fromkeys(name for name in given if name is not None))


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One example. Its representation shows nothing of it, so that no log line can."""

    text: str = field(repr=False)
    """Cleaned text, not empty."""
    target: str = field(repr=False)
    """Cleaned label, number or text, not empty."""
    group: str | None = field(default=None, repr=False)
    """What the record must share a side with; None without such a column."""
    person: str | None = field(default=None, repr=False)
    """Whom the record belongs to; None without such a column."""
    row: int | None = field(default=None, repr=False, compare=False)
    """Its place in a population's file, where its tokens lie; None elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Records:
    """What one file held."""

    records: tuple[Record, ...] = field(repr=False)
    """The usable rows, in the file's order; at least one."""
    skipped: dict[str, int]
    """Rows left out, by reason; a reason names a column and never a value."""
