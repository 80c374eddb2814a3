"""The report as one self-contained page, for the screen and for paper.

The page asks nothing of any network: its style sheet and its figures are inside it. All text is
escaped by the template engine, for names of sites and labels come from outside; the figures are
the one exception, and escape their text themselves.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from intramural.server import plots
from intramural.server.report_personal import personal_line
from intramural.server.report_privacy import privacy_line, privacy_table
from intramural.server.report_words import (
    ABSENT,
    Measure,
    Report,
    Row,
    Scores,
    bytes_text,
    counted,
    final_of,
    final_rows,
    headline,
    headline_measure,
    interval,
    interval_text,
    joining,
    measures_of,
    number_text,
    scenario_line,
    score,
    seconds_text,
    site_names,
)

Cell = dict[str, str]
"""`text`, and `note` in small type below it."""

HELD_OUT_SHOWN = ("loss", "accuracy", "example_accuracy")
"""Metrics of the coordinator's own records in a round's line; report.json has all."""
SITES_NAMED_MAX: Final = 3
"""So many absent sites of a round are named; more are counted."""


def render_html(report: Report) -> str:
    """Return the report as one HTML page.

    Args:
        report: The content of `report.json`; any part may be missing or null.

    Returns:
        The page. The same report and the same version of Matplotlib give the same text.
    """
    main = headline_measure(report)
    return _template().render(
        name=str(report.get("name") or "Run"),
        task=str(report.get("task") or ""),
        headline=_typeset(headline(report)),
        joining=_typeset(joining(report)),
        personal=_typeset(personal_line(report)),
        scenario=_typeset(scenario_line(report)),
        privacy_line=privacy_line(report),
        privacy=privacy_table(report),
        planned=bool(report.get("privacy_plan") or report.get("site_privacy")),
        glance=_glance(report),
        main=main,
        unit=f"points of {main.title}" if main.points else main.title,
        measures=measures_of(report),
        final=[_final_row(report, row) for row in final_rows(report)],
        pooled_test=_pooled_test(report),
        own_test=_own_test(report),
        own_columns=[_title(plots.LOOKS[part].label) for part in _own_parts(report)],
        joins=bool(joining(report) or final_of(report, "local")),
        title=_title,
        intervals=any(interval(row.scores, main) for row in final_rows(report)),
        mixed=any(site.get("labels") for site in report.get("sites") or []),
        rounds=_rounds(report),
        round_measures=_round_measures(report),
        has_errors=any(row["error"] for row in _rounds(report)),
        figures={name: Markup(draw(report)) for name, draw in FIGURES.items()},
        samples=report.get("samples") or [],
        facts=_facts(report),
        versions=report.get("versions") or {},
        notes=[str(note) for note in report.get("notes") or []],
        absent=ABSENT,
    )


FIGURES: Final = {
    "rounds": plots.metrics_by_round,
    "pooled_test": plots.sites_on_pooled_test,
    "own_test": plots.sites_on_own_test,
    "cost": plots.cost_by_round,
    "records": plots.records_by_site,
}


@cache
def _template() -> Template:
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


def _title(text: str) -> str:
    """Return text with a capital first letter, the rest as it is: `Macro-F1`."""
    return text[:1].upper() + text[1:]


def _typeset(text: str) -> str:
    """Return text with a true minus sign before numbers, where the terminal has a hyphen."""
    return "".join(
        "\N{MINUS SIGN}" if sign == "-" and after.isdigit() and not before.isalnum() else sign
        for before, sign, after in zip(f" {text}", text, f"{text[1:]} ", strict=False)
    )


def _cell(scores: Scores | None, measure: Measure) -> Cell:
    """Return a score, with its interval as a note."""
    return {
        "text": number_text(score(scores, measure)),
        "note": interval_text(interval(scores, measure)),
    }


def _gain(ours: Scores | None, theirs: Scores | None, measure: Measure) -> str:
    """Return by how much ours is better, with its sign, or the sign for absent."""
    value, other = score(ours, measure), score(theirs, measure)
    if value is None or other is None:
        return ABSENT
    return measure.step(measure.gain(value, over=other)).replace("-", "\N{MINUS SIGN}")


def _count(value: Any) -> str:
    """Write a count; a site that does not share it has none."""
    return ABSENT if value is None else f"{int(value):,}"


def _final_row(report: Report, row: Row) -> dict[str, Any]:
    federated, main = final_of(report, "federated"), headline_measure(report)
    return {
        "part": row.part,
        "name": f"{row.name} alone" if row.part == "local" else row.name,
        "cells": [_cell(row.scores, measure) for measure in measures_of(report)],
        "examples": _count(row.scores.get("examples")),
        "ahead": "" if row.part == "federated" else _gain(federated, row.scores, main),
    }


def _pooled_test(report: Report) -> list[dict[str, Any]]:
    """Return a row a site: what its model trained alone reaches on the pooled test split."""
    main = headline_measure(report)
    federated, pooled = final_of(report, "federated"), final_of(report, "pooled")
    train = {site.get("name"): site.get("train") for site in report.get("sites") or []}
    return [
        {
            "name": site,
            "train": _count(train.get(site)),
            "cells": [_cell(scores, main), _cell(federated, main), _cell(pooled, main)],
            "gain": _gain(federated, scores, main),
        }
        for site, scores in final_of(report, "local").items()
    ]


def _own_parts(report: Report) -> list[str]:
    """Return which models were tested on the sites' own records, as a table's columns."""
    main, own = headline_measure(report), final_of(report, "own_test").values()
    parts = ("local", "federated", "pooled", "baseline")
    return [p for p in parts if any(score((m or {}).get(p), main) is not None for m in own)]


def _own_test(report: Report) -> list[dict[str, Any]]:
    """Return a row a site: every model on the site's own test records."""
    main = headline_measure(report)
    rows = []
    parts = _own_parts(report)
    for site, models in final_of(report, "own_test").items():
        known = {part: scores for part, scores in (models or {}).items() if scores}
        examples = [m["examples"] for m in known.values() if m.get("examples") is not None]
        rows.append(
            {
                "name": site,
                "examples": _count(examples[0] if examples else None),
                "cells": [_cell(known.get(part), main) for part in parts],
                "gain": _gain(known.get("federated"), known.get("local"), main),
            }
        )
    return rows


def _round_measures(report: Report) -> list[Measure]:
    """Return the metrics that some round was validated with; two keep the table narrow."""
    rounds = [entry.get("metrics") for entry in report.get("rounds") or []]
    main = headline_measure(report)
    measures = [main]
    if main.key == "macro_f1":
        measures.append(Measure(key="accuracy", title="accuracy"))
    return [m for m in measures if any(score(metrics, m) is not None for metrics in rounds)]


def _rounds(report: Report) -> list[dict[str, Any]]:
    everyone = site_names(report)
    measures = _round_measures(report)
    rows = []
    for entry in report.get("rounds") or []:
        present = entry.get("sites") or []
        missing = [site for site in everyone if site not in present]
        without = ", ".join(missing) if len(missing) <= SITES_NAMED_MAX else str(len(missing))
        rows.append(
            {
                "round": str(entry.get("round", ABSENT)),
                "sites": f"{len(present)} of {len(everyone)}" if everyone else str(len(present)),
                "without": f"without {without}" if missing else "",
                "loss": number_text(entry.get("train_loss")),
                "metrics": [number_text(score(entry.get("metrics"), m)) for m in measures],
                "error": error_text(entry.get("aggregation_error")),
                "up": bytes_text(entry.get("bytes_up")),
                "down": bytes_text(entry.get("bytes_down")),
                "seconds": seconds_text(entry.get("seconds")),
                "refusals": "; ".join(_happenings(entry)),
            }
        )
    return rows


def _happenings(entry: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a round met: refusals, what the coordinator's own records say, a way back."""
    yield from (f"{reason}: {count}" for reason, count in (entry.get("refusals") or {}).items())
    held_out = entry.get("holdout") or {}
    told = [f"{n} {number_text(held_out[n])}" for n in HELD_OUT_SHOWN if n in held_out]
    if told:
        yield f"held out: {', '.join(told)}"
    if (gate := entry.get("gate")) is not None:
        now = "none" if gate["round"] is None else number_text(gate["round"])
        yield f"rolled back: {gate['metric']} {now} after {number_text(gate['kept'])}"


def error_text(error: float | None) -> str:
    """Write an aggregation error; '' where none was measured."""
    return "" if error is None else f"{error:.1e}"


def _glance(report: Report) -> list[tuple[str, str]]:
    """Return the run in a few figures, each a caption and a value."""
    model, rounds = report.get("model") or {}, report.get("rounds") or []
    sites = report.get("sites") or []
    train = [site.get("train") for site in sites]
    known = all(count is not None for count in train) and train
    glance = [
        ("sites", _count(len(site_names(report)) or None)),
        ("training records", _count(sum(train)) if known else ABSENT),
        ("rounds", _count(len(rounds))),
        ("parameters trained", f"{_count(model.get('trained'))}{_share(model)}"),
        ("to and from the sites", _both_ways(report)),
        ("duration", seconds_text(report.get("seconds"))),
        ("on the scenario's links", seconds_text(report.get("simulated_seconds"))),
    ]
    return [(caption, value) for caption, value in glance if value != ABSENT]


def _share(model: Mapping[str, Any]) -> str:
    """Return the trained share of the parameters, ' (1.4 %)'."""
    trained, total = model.get("trained"), model.get("parameters")
    return f" ({100 * trained / total:.3g} %)" if trained and total else ""


def _both_ways(report: Report) -> str:
    up, down = report.get("bytes_up"), report.get("bytes_down")
    return ABSENT if up is None or down is None else bytes_text(up + down)


def _facts(report: Report) -> list[tuple[str, str]]:
    """Return what identifies and repeats the run, each a caption and a value."""
    model, plan = report.get("model") or {}, report.get("plan") or {}
    facts = [
        ("Name", report.get("name")),
        ("Task", report.get("task")),
        ("Labels", counted(len(report["labels"]), "label") if report.get("labels") else None),
        ("Run digest", report.get("digest")),
        ("Manifest digest", report.get("manifest")),
        ("Base model", model.get("base")),
        ("Base model digest", model.get("digest")),
        ("Parameters", _count(model.get("parameters"))),
        ("Parameters trained", f"{_count(model.get('trained'))}{_share(model)}"),
        ("What travels (exchange)", report.get("exchange")),
        ("Rule that combines updates", plan.get("rule")),
        ("Rounds planned", plan.get("rounds")),
        ("Local steps a round", plan.get("local_steps")),
        ("Local epochs a round", plan.get("local_epochs")),
        ("Batch size, records", plan.get("batch_size")),
        ("Learning rate", plan.get("learning_rate")),
        ("Seed", plan.get("seed")),
        ("Engine", report.get("engine")),
        ("Bytes from the sites", bytes_text(report.get("bytes_up"))),
        ("Bytes to the sites", bytes_text(report.get("bytes_down"))),
        ("Duration", seconds_text(report.get("seconds"))),
    ]
    return [(caption, str(value)) for caption, value in facts if value not in (None, "", ABSENT)]
