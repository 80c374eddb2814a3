"""Commits: which committed rounds of a run still stand, as its journal tells."""

from collections.abc import Sequence
from dataclasses import dataclass

from intramural.core.journal import Entry

JOURNAL = "journal.jsonl"
"""Name of a run's journal, in the run's folder."""


@dataclass(frozen=True, kw_only=True)
class Commits:
    """The commits in a run's journal."""

    standing: tuple[Entry, ...]
    """Those that the run goes by, oldest first."""
    repeated: tuple[int, ...]
    """Rounds committed and then given up, for their checkpoint was not whole any more."""
    problem: str | None
    """The first commit that does not follow from what stands before it; None: all do."""


def commits_of(entries: Sequence[Entry]) -> Commits:
    """Return the commits of a run's journal.

    Rounds are committed in order. A round may be committed again only if an entry `resumed` stands
    between that names an earlier round to go on from: the run fell back to an older checkpoint.
    """
    standing: list[Entry] = []
    repeated: list[int] = []
    problem: str | None = None
    for entry in entries:
        last = standing[-1].body["round"] if standing else 0
        if entry.kind == "committed":
            if entry.body["round"] != last + 1 and problem is None:
                problem = f"entry {entry.seq} commits round {entry.body['round']} after {last}"
            standing.append(entry)
        elif entry.kind == "resumed":
            round_ = entry.body["round"]
            if round_ > last and problem is None:
                problem = f"entry {entry.seq} goes on from round {round_}, and {last} is the last"
            repeated += [e.body["round"] for e in standing if e.body["round"] > round_]
            standing = [e for e in standing if e.body["round"] <= round_]
    return Commits(standing=tuple(standing), repeated=tuple(repeated), problem=problem)
