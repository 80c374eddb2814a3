"""What a report says in words and numbers: the headline, the rows of a table, units.

The page and the terminal both speak through this module, so that they cannot disagree. It reads
the dictionary of `report.json` and takes nothing for granted: a run without rounds, without a
pooled model, or without a single score still has something true to say.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

Report = Mapping[str, Any]
Scores = Mapping[str, Any]
"""Metrics of one model on one test split: `{"macro_f1": .., "interval": {"macro_f1": [..]}}`."""

ABSENT: Final = "-"
BASELINES: Final = {"classification": "TF-IDF + LinearSVC", "generation": "the baseline"}
NO_PRIVACY: Final = "No differential privacy: this run makes no privacy claim"


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One metric and how to read it."""

    key: str
    """Its name in the report."""
    title: str
    rises: bool = True
    """Whether more is better."""
    points: bool = True
    """Whether differences are told in points, 100 to the whole range."""

    def gain(self, value: float, *, over: float) -> float:
        """Return by how much `value` is better: in points or in the metric's unit, + is better.

        Both are rounded to the three digits shown first, so that a reader who subtracts the
        printed numbers finds the printed difference.
        """
        gain = round(value, 3) - round(over, 3)
        return gain * (100 if self.points else 1) * (1 if self.rises else -1)

    def step(self, gain: float) -> str:
        """Write a gain with its sign, as `+3.1` points or `+0.120`."""
        text = f"{gain:+.1f}" if self.points else f"{gain:+.3f}"
        return text if float(text) else text.replace("-", "+")

    def amount(self, gain: float) -> str:
        """Write a gain's size in words, such as `3.1 points`; empty when it rounds to nothing."""
        size = self.step(gain).lstrip("+-")
        if not float(size):
            return ""
        if not self.points:
            return size
        return f"{size} point" if size == "1.0" else f"{size} points"


MEASURES: Final = {
    "classification": (
        Measure(key="macro_f1", title="macro-F1"),
        Measure(key="accuracy", title="accuracy"),
        Measure(key="balanced_accuracy", title="balanced accuracy"),
        Measure(key="loss", title="loss", rises=False, points=False),
    ),
    "generation": (
        Measure(key="loss", title="loss", rises=False, points=False),
        Measure(key="perplexity", title="perplexity", rises=False, points=False),
        Measure(key="token_accuracy", title="token accuracy"),
        Measure(key="example_accuracy", title="example accuracy"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model's line in a table of results."""

    part: str
    """`federated`, `pooled`, `mean`, `baseline`, or `local`: one site's model trained alone."""
    name: str
    scores: Scores


def task_of(report: Report) -> str:
    """Return the report's task; one this module does not know reads as a classification."""
    task = str(report.get("task"))
    return task if task in MEASURES else "classification"


def measures_of(report: Report) -> tuple[Measure, ...]:
    """Return the metrics that some model has in the final results, most telling first."""
    rows = [row.scores for row in final_rows(report)]
    measures = MEASURES[task_of(report)]
    return tuple(m for m in measures if any(score(row, m) is not None for row in rows))


def headline_measure(report: Report) -> Measure:
    """Return the metric the headline is told in: macro-F1, or the loss of a generation."""
    return (measures_of(report) or MEASURES[task_of(report)])[0]


def score(scores: Scores | None, measure: Measure) -> float | None:
    """Return one metric, or None where it was not measured."""
    value = (scores or {}).get(measure.key)
    return None if value is None else float(value)


def interval(scores: Scores | None, measure: Measure) -> tuple[float, float] | None:
    """Return the 95 % interval of one metric, or None where there is none."""
    ends = ((scores or {}).get("interval") or {}).get(measure.key)
    return None if ends is None else (float(ends[0]), float(ends[1]))


def final_of(report: Report, part: str) -> Any:
    """Return one part of the final results, such as `pooled`; {} where it is absent or null."""
    return (report.get("final") or {}).get(part) or {}


def final_rows(report: Report) -> list[Row]:
    """Return the models tested on the pooled test split, in the order a reader compares them."""
    local = {site: scores for site, scores in final_of(report, "local").items() if scores}
    named = [
        ("federated", "Federated", final_of(report, "federated")),
        ("pooled", "Pooled (all records in one place)", final_of(report, "pooled")),
        ("initial", "Before training", (report.get("initial") or {}).get("test") or {}),
        ("mean", _mean_name(len(local)).capitalize(), _mean(list(local.values()))),
        ("baseline", f"Baseline: {_baseline(report)}", final_of(report, "baseline")),
        *(("local", site, scores) for site, scores in local.items()),
    ]
    rows = [Row(part=part, name=name, scores=scores) for part, name, scores in named]
    return [row for row in rows if row.scores]


def _mean(scores: list[Scores]) -> Scores:
    """Return the plain mean over sites of each metric all of them have, without intervals."""
    names = [name for name in (scores[0] if scores else {}) if name not in ("interval", "examples")]
    names = [name for name in names if all(site.get(name) is not None for site in scores)]
    return {name: sum(float(site[name]) for site in scores) / len(scores) for name in names}


def _baseline(report: Report) -> str:
    return BASELINES[task_of(report)].removeprefix("the ")


def site_names(report: Report) -> list[str]:
    """Return every site the report knows of; a deployed run names them only where they act."""
    names = [str(site.get("name")) for site in report.get("sites") or []]
    for entry in report.get("rounds") or []:
        names += entry.get("sites") or []
    names += [*final_of(report, "local"), *final_of(report, "own_test")]
    return list(dict.fromkeys(names))


def headline(report: Report) -> str:
    """Return the one sentence a reader should remember, including what speaks against the run."""
    measure = headline_measure(report)
    federated = final_of(report, "federated")
    reached = score(federated, measure)
    if reached is None:
        return "This run has no final result for the federated model."
    sites = site_names(report)
    begin = f"Trained across {counted(len(sites), 'site')}, the model" if sites else "The model"
    begin += f" reaches {measure.title} {reached:.3f} on the pooled test split"
    if not measure.rises:
        begin += " (lower is better)"
    local = {s: m for s, m in final_of(report, "local").items() if score(m, measure) is not None}
    clauses = [
        _against(federated, _mean(list(local.values())), measure, f"the {_mean_name(len(local))}"),
        _against(federated, final_of(report, "pooled"), measure, "training on all records pooled"),
        _contest(federated, final_of(report, "baseline"), measure, BASELINES[task_of(report)]),
    ]
    told = [clause for clause in (_fall(report, measure), *clauses) if clause]
    if not told:
        return f"{begin}; there is nothing to compare it with."
    if len(told) > 1:
        told[-1] = f"and {told[-1]}"
    return f"{begin}: {(', ' if len(told) > 2 else ' ').join(told)}."


def _fall(report: Report, measure: Measure) -> str:
    """Return how far a loss fell on the validation records since before training, or nothing."""
    rounds = [entry.get("metrics") for entry in report.get("rounds") or []]
    before = score((report.get("initial") or {}).get("validation"), measure)
    after = score(next((m for m in reversed(rounds) if m), None), measure)
    if measure.rises or before is None or after is None:
        return ""
    verb = "fell" if after < before else "rose"
    share = abs(after - before) / before
    return f"on validation records it {verb} from {before:.3f} to {after:.3f} ({share:.0%})"


def _mean_name(num_sites: int) -> str:
    if num_sites == 1:
        return "one local-only model"
    return f"mean of {num_sites} local-only models"


def _against(ours: Scores, theirs: Scores, measure: Measure, name: str) -> str:
    """Return '3.1 points above NAME (0.681)', or nothing where there is nothing to compare."""
    value, other = score(ours, measure), score(theirs, measure)
    if value is None or other is None:
        return ""
    gain = measure.gain(value, over=other)
    amount = measure.amount(gain)
    place = "above" if value > other else "below"
    lead = f"{amount} {place}" if amount else "level with"
    return f"{lead} {name} ({_told(ours, theirs, measure)})"


def _contest(ours: Scores, theirs: Scores, measure: Measure, name: str) -> str:
    """Return 'it beats NAME (0.681) by 3.1 points', or that it falls short, or nothing."""
    value, other = score(ours, measure), score(theirs, measure)
    if value is None or other is None:
        return ""
    gain = measure.gain(value, over=other)
    amount = measure.amount(gain)
    told = _told(ours, theirs, measure)
    if not amount:
        return f"it is level with {name} ({told})"
    verb = "beats" if gain > 0 else "falls short of"
    return f"it {verb} {name} ({told}) by {amount}"


def _told(ours: Scores, theirs: Scores, measure: Measure) -> str:
    """Return the other's score, and say so where the intervals do not separate the two."""
    a, b = interval(ours, measure), interval(theirs, measure)
    overlap = a is not None and b is not None and a[0] <= b[1] and b[0] <= a[1]
    return f"{score(theirs, measure):.3f}" + ("; the intervals overlap" if overlap else "")


def joining(report: Report) -> str:
    """Return one sentence on which sites gain by joining, on their own test records; or ''."""
    measure = headline_measure(report)
    gains: dict[str, float] = {}
    for site, models in final_of(report, "own_test").items():
        federated = score((models or {}).get("federated"), measure)
        local = score((models or {}).get("local"), measure)
        if federated is not None and local is not None:
            gains[site] = measure.gain(federated, over=local)
    if not gains:
        return ""
    # A gain that rounds to nothing in the table is not called one here.
    better = sum(gain > 0 and bool(measure.amount(gain)) for gain in gains.values())
    worse = sorted(
        (s for s, g in gains.items() if g < 0 and measure.amount(g)), key=gains.__getitem__
    )
    named = ", ".join(f"{site} by {measure.amount(gains[site])}" for site in worse[:3])
    more = f" and {len(worse) - 3} more" if len(worse) > 3 else ""
    verb = "does" if better == 1 else "do"
    text = (
        f"On their own test records, {better} of {counted(len(gains), 'site')} {verb} better with"
        " the federated model than with a model trained alone; "
    )
    return text + (f"worse off: {named}{more}." if worse else "none is worse off.")


def scenario_line(report: Report) -> str:
    """Return how long the federation would take under its simulated scenario; or ''."""
    return str((report.get("scenario") or {}).get("sentence") or "")


def counted(number: int, noun: str) -> str:
    """Write a count with its noun: `1 site`, `5 sites`."""
    return f"{number} {noun}" if number == 1 else f"{number:,} {noun}s"


def number_text(value: float | None, digits: int = 3) -> str:
    """Write a metric to a fixed number of digits, or the sign for absent."""
    return ABSENT if value is None else f"{value:.{digits}f}"


def interval_text(ends: tuple[float, float] | None) -> str:
    """Write an interval as `[0.681, 0.742]`, or nothing."""
    return "" if ends is None else f"[{ends[0]:.3f}, {ends[1]:.3f}]"


def bytes_text(value: float | None) -> str:
    """Write bytes in decimal units: `512 B`, `1.4 MB`."""
    if value is None:
        return ABSENT
    if value < 1000:
        return f"{value:.0f} B"
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} TB"


def seconds_text(value: float | None) -> str:
    """Write a duration: `4.2 s`, `3 min 05 s`, `2 h 10 min`."""
    if value is None:
        return ABSENT
    if value < 9.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(value / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"
