"""Report of benchmarks/byzantine.py: means over seeds, the gates, and the tables."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rich.table import Table

from benchmarks.harness import Row

CLEAN, PLAIN, CHOSEN = "none", "mean", "nnm + trimmed-mean"
"""Names of the row and column that others are held against, and of the rule that is."""
LOST_MAX, FALL_MIN = 3.0, 15.0
"""Points that the chosen rule may lose, and that the plain mean must."""
BREAKERS = ("sign-flip x10", "ipm 1.1", "ipm tuned")
"""Attacks of which one must break the plain mean, or they prove nothing."""
TUNED = ("ipm tuned", "alie tuned")
"""Attacks that try the rule itself, with its state and all honest updates, before they send."""
BACKDOORS = ("backdoor x1", "backdoor")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One federation under one attack."""

    private: bool
    seed: int
    rule: str
    attack: str
    accuracy: float
    success: float
    """Of the backdoor, whatever the attack: the rate that there is without one is a baseline."""


Scores = dict[tuple[str, str], list[float]]
"""By rule and attack, one a seed."""


def scores(cells: Sequence[Cell], *, private: bool, of: str = "accuracy") -> Scores:
    """Return one side's scores, in percent, in the order of the seeds."""
    found: Scores = defaultdict(list)
    for cell in sorted(cells, key=lambda cell: cell.seed):
        if cell.private == private:
            found[cell.rule, cell.attack].append(100 * getattr(cell, of))
    return dict(found)


def worst(found: Scores, rule: str, *, but: Sequence[str] = ()) -> tuple[float, str]:
    """Return a rule's lowest mean over seeds, and the attack it was under; `but` are left out."""
    return min(
        (fmean(seen), attack)
        for (own, attack), seen in found.items()
        if own == rule and attack not in but
    )


def rows_of(cells: Sequence[Cell]) -> list[Row]:
    """Return every cell's mean, the backdoor's success, and the gates."""
    rows = []
    for private in sorted({cell.private for cell in cells}):
        side = _side(private)
        found = scores(cells, private=private)
        rows += [
            Row(name=f"{side}: {rule}, {attack}", value=fmean(seen), unit="%", samples=seen)
            for (rule, attack), seen in found.items()
        ]
        rows += [
            Row(
                name=f"{side}: {rule}, {attack}, success", value=fmean(seen), unit="%", samples=seen
            )
            for (rule, attack), seen in scores(cells, private=private, of="success").items()
            if attack in (CLEAN, *BACKDOORS)
        ]
        rows += gates(found, side)
    return rows


def gates(found: Scores, side: str) -> list[Row]:
    """Return what must hold of one side's accuracies; those of rules that were not run are out."""
    rows: list[Row] = []
    if (PLAIN, CLEAN) not in found:
        return rows
    clean = fmean(found[PLAIN, CLEAN])
    for but, told in ((TUNED, "attacks that do not try the rule"), ((), "all attacks")):
        if not any(rule == CHOSEN and attack not in but for rule, attack in found):
            continue
        lowest, attack = worst(found, CHOSEN, but=but)
        rows.append(
            Row(
                name=f"{side}: {CHOSEN}, worst of {told} ({attack}) below clean {PLAIN}",
                value=clean - lowest,
                unit="points",
                target=f"at most {LOST_MAX:g}",
                ok=clean - lowest <= LOST_MAX,
                peer=f"clean {PLAIN}: {clean:.1f} %",
            )
        )
    broken = {a: fmean(found[PLAIN, a]) for a in BREAKERS if (PLAIN, a) in found}
    if broken:
        attack = min(broken, key=broken.__getitem__)
        rows.append(
            Row(
                name=f"{side}: {PLAIN}, fall under {attack}",
                value=clean - broken[attack],
                unit="points",
                target=f"at least {FALL_MIN:g}",
                ok=clean - broken[attack] >= FALL_MIN,
                peer=f"clean {PLAIN}: {clean:.1f} %",
            )
        )
    return rows


def tables(cells: Sequence[Cell]) -> list[Table]:
    """Return a table of accuracies and one of the backdoor's success for each side."""
    made = []
    for private in sorted({cell.private for cell in cells}):
        found = scores(cells, private=private)
        names = list(dict.fromkeys(attack for _, attack in found))
        table = Table("rule", *names, "worst", title=f"Accuracy in %, {_side(private)}")
        for rule in dict.fromkeys(rule for rule, _ in found):
            means = [f"{fmean(found[rule, name]):.1f}" for name in names]
            table.add_row(rule, *means, f"{worst(found, rule)[0]:.1f}")
        made.append(table)
        success = scores(cells, private=private, of="success")
        shown = [name for name in (CLEAN, *BACKDOORS) if name in names]
        table = Table("rule", *shown, title=f"Trigger to target in %, {_side(private)}")
        for rule in dict.fromkeys(rule for rule, _ in success):
            table.add_row(rule, *(f"{fmean(success[rule, name]):.1f}" for name in shown))
        made.append(table)
    return made


def _side(private: bool) -> str:
    return "epsilon 8" if private else "no privacy"
