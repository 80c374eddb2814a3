"""sweep.html: a sweep's table and figures as one self-contained page."""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from matplotlib.axes import Axes

import intramural.server
from intramural.privacy.told import told
from intramural.server.report_words import ABSENT, bytes_text, counted, number_text, seconds_text
from intramural.server.svg import INK, new_figure, style, to_svg

PAGE: Final = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{{ report.name }}: sweep</title>
<style>
{{ css }}
</style>
</head>
<body>
<header>
<p class="kind">Sweep · {{ report.kind }} · {{ report.task }}</p>
<h1>{{ report.name }}</h1>
<p class="headline">{{ headline }}</p>
{% for note in report.notes %}
<p>{{ note }}</p>
{% endfor %}
{% if report.privacy %}
<p class="privacy"><strong>{{ report.privacy.words }}</strong></p>
{% endif %}
</header>
<main>
{% for svg in figures %}
<figure>
{{ svg }}
</figure>
{% endfor %}
{% for table in tables %}
<section>
<h2>{{ table.title }}</h2>
<div class="wide">
<table class="dense">
<thead><tr>
{% for title in table.titles %}
<th scope="col">{{ title }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in table.rows %}
<tr{% if row.best %} class="federated"{% endif %}>
<th scope="row">{{ row.cells[0] }}</th>
{% for text in row.cells[1:] %}
<td>{{ text }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
</section>
{% endfor %}
</main>
</body>
</html>
"""
LOG_FROM: Final = 20.0
"""Largest value / smallest from which a parameter's axis is logarithmic."""
BLUE: Final = "#0072B2"


def sweep_html(report: Mapping[str, Any]) -> str:
    """Return sweep.json as one HTML page, which asks nothing of any network."""
    css = (Path(intramural.server.__path__[0]) / "report.css").read_text()
    return _template().render(
        report=report,
        css=Markup(css),
        headline=headline_of(report),
        figures=[Markup(svg) for svg in figures_of(report)],
        tables=tables_of(report),
    )


def headline_of(report: Mapping[str, Any]) -> str:
    """Return the sweep's outcome in one sentence."""
    cells, best = report["cells"], report["best"]
    failed = sum(row["state"] == "failed" for row in cells)
    tail = f" {counted(failed, 'cell')} of {len(cells)} failed." if failed else ""
    if best is None:
        return f"No cell of {len(cells)} has a result.{tail}"
    way = "highest" if report["rises"] else "lowest"
    if report["groups"]:
        group = report["groups"][0]
        spread = "" if group["sd"] is None else f", standard deviation {group['sd']:.3f}"
        return (
            f"The {way} mean {report['metric']} on validation records is {group['mean']:.3f} over "
            f"{counted(group['measured'], 'seed')}{spread}: {words_of(group['parameters'])}.{tail}"
        )
    return (
        f"The {way} {report['metric']} on validation records is {best['metric']:.3f}: "
        f"{words_of(best['parameters'])}.{tail}"
    )


def words_of(parameters: Mapping[str, Any]) -> str:
    """Write parameters as `exchange.rank = 8, training.learning_rate = 0.002`."""
    return ", ".join(f"{k} = {value_text(v)}" for k, v in parameters.items()) or "no parameter"


def value_text(value: Any) -> str:
    """Write one parameter's value."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def tables_of(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tables of cells and, where seeds were swept, of their groups; best first."""
    tables = [_cells_table(report)]
    return [_seeds_table(report), *tables] if report["groups"] else tables


def _seeds_table(report: Mapping[str, Any]) -> dict[str, Any]:
    best = (report["best"] or {}).get("cell")
    kept = list(report["groups"][0]["parameters"])
    kept = [name for name in report["parameters"] if name in kept]
    rows = [
        {
            "best": best in group["cells"],
            "cells": [
                *(value_text(group["parameters"][name]) for name in kept),
                number_text(group["mean"]),
                number_text(group["sd"]),
                str(group["measured"]),
            ],
        }
        for group in report["groups"]
    ]
    titles = [*_short(kept), f"mean {report['metric']}", "standard deviation", "seeds"]
    return {"title": "Seeds together", "titles": titles, "rows": rows}


def _cells_table(report: Mapping[str, Any]) -> dict[str, Any]:
    best, swept = (report["best"] or {}).get("cell"), report["parameters"]
    epsilons = (report["privacy"] or {}).get("cells") or {}
    reasons = any(row["reason"] for row in report["cells"])
    rows = []
    for row in report["cells"]:
        epsilon = epsilons.get(row["cell"])
        cells = [
            row["cell"],
            *(value_text(row["parameters"][name]) for name in swept),
            number_text(row["metric"]) if row["state"] == "done" else row["state"],
            *([ABSENT if epsilon is None else told(epsilon)] if epsilons else []),
            seconds_text(row["seconds"]),
            bytes_text(row["bytes_up"]),
            *([row["reason"]] if reasons else []),
        ]
        rows.append({"best": row["cell"] == best, "cells": cells})
    cost = ["epsilon, alone"] if epsilons else []
    why = ["why it failed"] if reasons else []
    titles = ["cell", *_short(swept), report["metric"], *cost, "duration", "sent up", *why]
    return {"title": "Cells, on validation records", "titles": titles, "rows": rows}


def _short(keys: Sequence[str]) -> list[str]:
    """Return the last parts of keys, or whole keys where two would read alike."""
    ends = [key.rpartition(".")[2] for key in keys]
    return ends if len(set(ends)) == len(ends) else list(keys)


def figures_of(report: Mapping[str, Any]) -> list[str]:
    """Draw the metric against each parameter that varies, two beside each other."""
    done = [row for row in report["cells"] if row["metric"] is not None]
    varied = [
        name
        for name in report["parameters"]
        if len({value_text(row["parameters"][name]) for row in done}) > 1
    ]
    starts = range(0, len(varied), 2)
    return [_figure(report, done, varied[at : at + 2], key=f"sweep-{at}") for at in starts]


def _figure(
    report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], names: Sequence[str], *, key: str
) -> str:
    best = (report["best"] or {}).get("cell")
    with style():
        figure, panels = new_figure(height=2.5, columns=len(names))
        for axes, name in zip(panels, names, strict=True):
            _panel(axes, name, rows, best=best)
        panels[0].set_ylabel(f"{report['metric']}\non validation records")
        return to_svg(
            figure,
            key=key,
            title=f"{report['metric']} against {' and '.join(names)}",
            text=f"One circle a cell, {len(rows)} in all, the best one filled; the line joins the "
            "means of equal values. The table below has every number.",
        )


def _panel(axes: Axes, name: str, rows: Sequence[Mapping[str, Any]], *, best: str | None) -> None:
    values = [row["parameters"][name] for row in rows]
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    labels = list(dict.fromkeys(map(value_text, sorted(values) if numeric else values)))
    places = list(values) if numeric else [labels.index(value_text(value)) for value in values]
    scores = [row["metric"] for row in rows]
    means = {at: fmean(s for p, s in zip(places, scores, strict=True) if p == at) for at in places}
    line = sorted(means.items())
    if len(line) < len(rows):  # of values that were all drawn once, a line would say nothing
        for (x0, y0), (x1, y1) in pairwise(line):
            axes.plot((x0, x1), (y0, y1), color=BLUE, lw=1.0, zorder=1)
    for place, score, row in zip(places, scores, rows, strict=True):
        fill = BLUE if row["cell"] == best else "white"
        look: dict[str, Any] = {"markersize": 5, "markeredgecolor": BLUE, "markerfacecolor": fill}
        axes.plot([place], [score], marker="o", ls="", zorder=3, **look)
    if not numeric:
        axes.set_xticks(range(len(labels)), labels, parse_math=False)
        axes.set_xlim(-0.5, len(labels) - 0.5)
    elif min(places) > 0 and max(places) / min(places) >= LOG_FROM:
        axes.set_xscale("log")
    if numeric and len(line) < len(rows) and len(line) <= 6:  # a grid's own values as ticks
        axes.set_xticks([x for x, _ in line], labels)
        axes.minorticks_off()
    axes.set_xlabel(name)
    axes.grid(axis="y", color="#e6e6e6", lw=0.5)
    axes.tick_params(colors=INK)
    axes.margins(x=0.08 if math.isfinite(sum(scores)) else 0.0)


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(PAGE)
