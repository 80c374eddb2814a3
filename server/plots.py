"""The figures of a report, as SVG to set inline in a page.

Every figure is told twice: in colour (Okabe and Ito's palette, safe for colour-blind readers) and
in marker, fill or hatch, so that a black-and-white print loses nothing. A function returns '' where
the report holds nothing to draw.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from intramural.server.report_words import (
    Measure,
    Report,
    Scores,
    bytes_text,
    counted,
    final_of,
    headline_measure,
    interval,
    score,
)
from intramural.server.svg import FAINT, INK, new_figure, style, to_svg

NAME_MAX: Final = 34
"""Characters of a row's name; a longer one would leave no room for the data."""

LABELS_MAX: Final = 30
"""More labels than this are folded into one column, 'other'."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """How one model is drawn everywhere."""

    label: str
    color: str
    marker: str
    filled: bool


LOOKS: Final = {
    "federated": Look(label="federated", color="#0072B2", marker="o", filled=True),
    "pooled": Look(label="pooled", color="#D55E00", marker="^", filled=True),
    "local": Look(label="local-only", color="#222222", marker="s", filled=False),
    "baseline": Look(label="baseline", color="#009E73", marker="D", filled=False),
}


def metrics_by_round(report: Report) -> str:
    """Draw the validation metrics after each round; '' where no round was evaluated."""
    rounds = [entry for entry in report.get("rounds") or [] if entry.get("metrics")]
    main = headline_measure(report)
    measures = [main]
    if main.key == "macro_f1":
        measures.append(Measure(key="accuracy", title="accuracy"))
    with style():
        figure, (axes,) = new_figure(height=2.5)
        lines = []
        for measure, look in zip(measures, (LOOKS["federated"], LOOKS["local"]), strict=False):
            points = [(entry["round"], score(entry["metrics"], measure)) for entry in rounds]
            points = [(number, value) for number, value in points if value is not None]
            if points:
                mark = look.marker if len(points) <= 40 else ""
                x, y = zip(*points, strict=True)
                axes.plot(x, y, color=look.color, lw=1.3, label=measure.title, **_mark(look, mark))
                lines.append((measure.title, y))
        if not lines:
            return ""
        axes.set_xlabel("round")
        axes.set_ylabel(f"on the sites' validation records\n({_direction(main)})")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _legend(axes)
        told = "; ".join(f"{name} from {y[0]:.3f} to {y[-1]:.3f}" for name, y in lines)
        return to_svg(
            figure,
            key="rounds",
            title="Validation metrics after each round",
            text=f"Over {counted(len(rounds), 'round')}, first to last: {told}.",
        )


def sites_on_pooled_test(report: Report) -> str:
    """Draw every model on the pooled test split, with intervals; '' where there is none."""
    measure = headline_measure(report)
    entries = [
        (part.capitalize(), part, final_of(report, part)) for part in ("federated", "pooled")
    ]
    local = final_of(report, "local").items()
    entries += [(f"{site} alone", "local", scores) for site, scores in local]
    entries = [entry for entry in entries if score(entry[2], measure) is not None]
    if not entries:
        return ""
    with style():
        figure, (axes,) = new_figure(height=0.9 + 0.24 * len(entries))
        for place, (_, part, scores) in enumerate(entries):
            _dot(axes, scores, measure, place=place, look=LOOKS[part])
        baseline = score(final_of(report, "baseline"), measure)
        if baseline is not None:
            axes.axvline(baseline, color=LOOKS["baseline"].color, lw=1.2, ls=(0, (5, 3)), zorder=1)
            axes.annotate(
                f"baseline {baseline:.3f}",
                (baseline, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                color=LOOKS["baseline"].color,
            )
        _rows(axes, [name for name, _, _ in entries])
        axes.set_xlabel(f"{measure.title} on the pooled test split ({_direction(measure)})")
        told = ", ".join(f"{name} {score(scores, measure):.3f}" for name, _, scores in entries[:12])
        return to_svg(
            figure,
            key="pooled-test",
            title=f"{measure.title} of every model on the pooled test split",
            text=f"{told}.",
        )


def sites_on_own_test(report: Report) -> str:
    """Draw the models on each site's own test split: should it join? '' where there is none."""
    measure = headline_measure(report)
    sites = {
        site: {part: m for part, m in (models or {}).items() if score(m, measure) is not None}
        for site, models in final_of(report, "own_test").items()
    }
    sites = {site: models for site, models in sites.items() if models}
    if not sites:
        return ""
    with style():
        figure, (axes,) = new_figure(height=0.95 + 0.5 * len(sites))
        parts = [part for part in LOOKS if any(part in models for models in sites.values())]
        for row, models in enumerate(sites.values()):
            for slot, part in enumerate(parts):
                if part in models:
                    place = row + 0.17 * (slot - (len(parts) - 1) / 2)
                    _dot(axes, models[part], measure, place=place, look=LOOKS[part])
            if row:
                axes.axhline(row - 0.5, color=FAINT, lw=0.5, zorder=0)
        for part in parts:
            look = LOOKS[part]
            axes.plot([], [], ls="", color=look.color, label=look.label, **_mark(look))
        _rows(axes, list(sites))
        _legend(axes)
        axes.set_xlabel(f"{measure.title} on the site's own test records ({_direction(measure)})")
        return to_svg(
            figure,
            key="own-test",
            title=f"{measure.title} on each site's own test records",
            text=f"{', '.join(parts)} for {counted(len(sites), 'site')}; see the table below.",
        )


def cost_by_round(report: Report) -> str:
    """Draw bytes and seconds of each round; '' where there was no round."""
    rounds = report.get("rounds") or []
    if not rounds:
        return ""
    numbers = [entry["round"] for entry in rounds]
    up = [entry.get("bytes_up") or 0 for entry in rounds]
    down = [entry.get("bytes_down") or 0 for entry in rounds]
    seconds = [entry.get("seconds") or 0.0 for entry in rounds]
    with style():
        figure, (left, right) = new_figure(height=2.2, columns=2)
        bar: dict[str, Any] = {"width": 0.7, "edgecolor": INK, "linewidth": 0.4}
        left.bar(numbers, down, color="#56B4E9", label="to the sites", **bar)
        left.bar(
            numbers, up, bottom=down, color="white", hatch="////", label="from the sites", **bar
        )
        left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_text(value)))
        left.set_title("bytes on the wire, all sites", pad=18)
        _legend(left)
        right.bar(numbers, seconds, color=FAINT, **bar)
        right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} s"))
        right.set_title("duration", pad=18)
        for axes in (left, right):
            axes.set_xlabel("round")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axes.yaxis.set_major_locator(MaxNLocator(5))
        return to_svg(
            figure,
            key="cost",
            title="Bytes and seconds of each round",
            text=f"{counted(len(rounds), 'round')}: {bytes_text(sum(down))} to the sites,"
            f" {bytes_text(sum(up))} from the sites, {sum(seconds):.0f} s.",
        )


def records_by_site(report: Report) -> str:
    """Draw each site's records by split and its mix of labels; '' where no count is known."""
    sites = report.get("sites") or []
    splits = [[site.get(split) or 0 for site in sites] for split in ("train", "validation", "test")]
    if not any(map(sum, splits)):
        return ""
    names = [str(site.get("name")) for site in sites]
    labels, shares = _label_mix(report)
    with style():
        height = (1.25 if labels else 0.85) + 0.3 * len(sites)
        figure, panels = new_figure(height=height, columns=2 if labels else 1, ratios=(1, 1.9))
        bars = panels[0]
        left = [0] * len(sites)
        fills = (("train", "#56B4E9", ""), ("validation", "white", "////"), ("test", INK, ""))
        for counts, (split, color, hatch) in zip(splits, fills, strict=True):
            look: dict[str, Any] = {"color": color, "hatch": hatch, "edgecolor": INK, "lw": 0.4}
            bars.barh(range(len(sites)), counts, left=left, height=0.6, label=split, **look)
            left = [before + count for before, count in zip(left, counts, strict=True)]
        _rows(bars, names)
        bars.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        bars.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        bars.set_xlabel("records")
        _legend(bars, columns=3)
        if labels:
            _heatmap(panels[1], labels, shares)
        return to_svg(
            figure,
            key="records",
            title="Records and labels of each site",
            text="; ".join(f"{n} {counted(t, 'record')}" for n, t in zip(names, left, strict=True)),
        )


def _label_mix(report: Report) -> tuple[list[str], list[list[float]]]:
    """Return label names and, a row a site, each label's share of the site's records in percent."""
    mixes = [site.get("labels") or {} for site in report.get("sites") or []]
    order = list(report.get("labels") or [])
    order += sorted({label for mix in mixes for label in mix} - set(order))
    if not any(sum(mix.values()) for mix in mixes):
        return [], []
    kept = order if len(order) <= LABELS_MAX else order[: LABELS_MAX - 1]
    shares = []
    for mix in mixes:
        total = sum(mix.values()) or 1
        row = [100 * mix.get(label, 0) / total for label in kept]
        rest = 100 * sum(mix.get(label, 0) for label in order[len(kept) :]) / total
        shares.append(row if kept == order else [*row, rest])
    return kept if kept == order else [*kept, "other"], shares


def _heatmap(axes: Axes, labels: list[str], shares: list[list[float]]) -> None:
    """Draw shares in percent as grey cells, each with its number where it rounds to 1 or more."""
    top = max(map(max, shares)) or 1.0
    axes.pcolormesh(
        shares, cmap="Greys", vmin=0, vmax=top * 1.25, edgecolors="white", linewidth=0.8
    )
    for row, values in enumerate(shares):
        for column, value in enumerate(values):
            if value >= 0.5:
                color = "white" if value > 0.7 * top else INK
                at = (column + 0.5, row + 0.5)
                axes.text(*at, f"{value:.0f}", ha="center", va="center", color=color, fontsize=6.5)
    axes.set_ylim(len(shares), 0)
    axes.set_yticks([])
    places = [column + 0.5 for column in range(len(labels))]
    upright: dict[str, Any] = {"rotation": 90, "rotation_mode": "anchor"}
    upright |= {"ha": "right", "va": "center"}
    axes.set_xticks(places, labels, fontsize=7, parse_math=False, **upright)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("label mix, % of the site's records", fontsize=8.5)


def _direction(measure: Measure) -> str:
    return "higher is better" if measure.rises else "lower is better"


def _mark(look: Look, marker: str | None = None) -> dict[str, Any]:
    """Return the arguments that draw one model's marker, hollow or filled."""
    return {
        "marker": look.marker if marker is None else marker,
        "markersize": 4.8,
        "markerfacecolor": look.color if look.filled else "white",
        "markeredgecolor": look.color,
    }


def _dot(axes: Axes, scores: Scores, measure: Measure, *, place: float, look: Look) -> None:
    """Draw one score at height `place`, with its interval where it has one."""
    ends = interval(scores, measure)
    if ends:
        axes.plot(ends, (place, place), color=look.color, lw=1.1, solid_capstyle="butt", zorder=2)
    axes.plot([scores[measure.key]], [place], color=look.color, zorder=3, **_mark(look))


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows, first at the top. A `$` in a name is a dollar sign, not mathematics."""
    axes.set_yticks(range(len(names)), map(_short, names), parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e6e6e6", lw=0.5)
    axes.set_axisbelow(True)


def _short(name: str) -> str:
    return name if len(name) <= NAME_MAX else f"{name[: NAME_MAX - 1]}\N{HORIZONTAL ELLIPSIS}"


def _legend(axes: Axes, columns: int = 4) -> None:
    """Set the legend above the axes, where it hides no data."""
    options: dict[str, Any] = {"handlelength": 1.5, "columnspacing": 1.2, "borderaxespad": 0.2}
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, **options)
