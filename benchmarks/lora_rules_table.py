"""Tables of benchmarks/lora_rules.py, and what in the results is odd."""

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.table import Table

from benchmarks.lora_rules_cells import (
    PRIVATE_RATE,
    RATE,
    RATES,
    RULES,
    SEARCH,
    SEEDS,
    Cell,
    search_cells,
)
from intramural.strategies.catalogue import KINDS

ERROR_MAX = 1e-6
"""Aggregation error that a rule declared exact may have."""
LEARNT = 0.02
"""Accuracy above always saying the commonest label, from which on a cell has learnt something."""
PERSONAL = (
    "fedsa-lora: each site keeps its own B, so its figures are those of a personal model for each "
    "site on that site's test records; there is no common model, and no aggregation error."
)
Row = dict[str, Any]
Found = Mapping[str, Row]


def found_of(rows: Iterable[Row]) -> dict[str, Row]:
    """Return the rows by their cells, for `rows_of`."""
    return {_word(row["cell"]): row for row in rows}


def rows_of(cell: Cell, found: Found) -> list[Row]:
    """Return the results of a cell, seed by seed, as far as they are there."""
    keys = [_word(replace(cell, seed=seed).key) for seed in SEEDS]
    return [found[key] for key in keys if key in found]


def _word(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def table_of(cells: Iterable[Cell], found: Found) -> Table:
    """Return the results, one line for each rule in each setting, in the order of the cells."""
    table = Table(title="LoRA rules on ICD-10-CM titles: test split, mean (sd) over seeds")
    for name in ("sites", "split", "epsilon", "rule", "rate", "accuracy", "macro-F1", "seeds"):
        table.add_column(name, no_wrap=True)
    for name in ("aggregation error", "MB up", "MB down", "s", "CPU s"):
        table.add_column(name, justify="right")
    for cell in _once(cells):
        if rows := rows_of(cell, found):
            table.add_row(*_figures(cell, rows))
    return table


def _once(cells: Iterable[Cell]) -> Iterator[Cell]:
    """Yield the first cell of each rule in each setting."""
    seen = set()
    for cell in cells:
        if (cell.setting, cell.rule) not in seen:
            seen.add((cell.setting, cell.rule))
            yield cell


def _figures(cell: Cell, rows: Sequence[Row]) -> list[str]:
    ranks = f", ranks {'/'.join(map(str, cell.ranks))}" if cell.ranks else ""
    epsilon = "none" if cell.epsilon is None else f"{cell.epsilon:g}"
    rate = f"SGD {PRIVATE_RATE:g}" if cell.epsilon is not None else f"{cell.rate or RATE:.2g}"
    head = [f"{cell.sites}{ranks}", cell.partition, epsilon, cell.rule, rate]
    run = [row for row in rows if "refused" not in row]
    if not run:
        return [*head, "refused", "", str(len(rows)), "", "", "", "", ""]
    errors = [row["error_median"] for row in run if row["error_median"] is not None]
    return [
        *head,
        mean_sd([row["accuracy"] for row in run]),
        mean_sd([row["macro_f1"] for row in run]),
        str(len(run)),
        f"{statistics.median(errors):.0e}" if errors else "personal B",
        *(_mean(run, name, 1e6) for name in ("bytes_up", "bytes_down")),
        *(_mean(run, name) for name in ("seconds", "cpu_seconds")),
    ]


def mean_sd(values: Sequence[float]) -> str:
    """Return a mean, with the standard deviation (n - 1) where there are several values."""
    spread = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def _mean(rows: Sequence[Row], name: str, scale: float = 1.0) -> str:
    """Return the mean of a figure that rows of an earlier form may not have."""
    values = [row[name] for row in rows if name in row]
    return f"{statistics.fmean(values) / scale:.0f}" if values else ""


def notes_of(cells: Iterable[Cell], found: Found) -> list[str]:
    """Return what the table's reader should know, and what in it is odd, a sentence each."""
    shown = [(cell, row) for cell in cells if (row := found.get(_word(cell.key))) is not None]
    notes = [PERSONAL] if any(cell.rule == "fedsa-lora" for cell, _ in shown) else []
    for cell, row in shown:
        name = f"{cell.rule}, {cell.sites} sites, {cell.partition}, epsilon {cell.epsilon}"
        name += f", seed {cell.seed}"
        if "refused" in row:
            notes.append(f"refused: {name}: {row['refused']}")
            continue
        error, common = row["error_max"], row.get("commonest")
        if KINDS[cell.rule].traits.exact_for_lora and error is not None and error > ERROR_MAX:
            notes.append(f"ODD: {name}: an exact rule's aggregation error reached {error:.1e}")
        if common is not None and row["accuracy"] < common + LEARNT:
            notes.append(
                f"ODD: {name}: accuracy {row['accuracy']:.3f}; always saying the commonest label "
                f"has {common:.3f}"
            )
    others = sum(row["cell"]["part"] != SEARCH for row in found.values()) - len(shown)
    if others:
        notes.append(f"{others} results are of other learning rates, and not in this table.")
    return notes


def rates_of(found: Found) -> dict[str, float]:
    """Return the rate with the best validation accuracy, by rule, where all were tried.

    Of equal ones the first; a rule that lacks one is left out.
    """
    scores: dict[str, dict[float, float]] = {}
    for cell in search_cells():
        row = found.get(_word(cell.key))
        if row is not None and row.get("validation_accuracy") is not None and cell.rate:
            scores.setdefault(cell.rule, {})[cell.rate] = row["validation_accuracy"]
    return {
        rule: max(tried, key=lambda rate: tried[rate])
        for rule, tried in scores.items()
        if len(tried) == len(RATES)
    }


def search_table(found: Found) -> Table:
    """Return what the search found: a line a rule, a column a rate."""
    table = Table(title="Search: validation accuracy by learning rate, iid, no privacy, one seed")
    table.add_column("rule")
    for rate in RATES:
        table.add_column(f"{rate:.2g}")
    table.add_column("chosen")
    chosen = rates_of(found)
    for rule in RULES:
        tried = [found.get(_word(c.key), {}) for c in search_cells() if c.rule == rule]
        scores = [row.get("validation_accuracy") for row in tried]
        words = ["" if score is None else f"{score:.3f}" for score in scores]
        table.add_row(rule, *words, f"{chosen[rule]:.2g}" if rule in chosen else "")
    return table
