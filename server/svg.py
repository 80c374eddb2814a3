"""A figure as one inline SVG element: its style, its size, its ids.

Text stays text, in a generic font, so that it can be searched and read aloud. The same figure
gives the same bytes. Nothing here touches pyplot, whose state belongs to whoever imports us.
"""

import io
import re
import warnings
from contextlib import AbstractContextManager
from html import escape
from typing import Any, Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

WIDTH: Final = 7.2
"""Inches; the width of a page's text, so that type keeps its size."""

INK: Final = "#222222"
FAINT: Final = "#bbbbbb"
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "intramural",
    "font.family": ["sans-serif"],
    "font.size": 8.5,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.unicode_minus": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
}


def style() -> AbstractContextManager[None]:
    """Return a context in which figures are made and written; the old style returns after it."""
    return matplotlib.rc_context(STYLE)


def new_figure(
    *, height: float, columns: int = 1, ratios: tuple[float, float] = (1, 1)
) -> tuple[Figure, list[Axes]]:
    """Return a figure of one or two panels side by side, `height` in inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    widths = ratios[:columns]
    panels = figure.subplots(1, columns, squeeze=False, gridspec_kw={"width_ratios": widths})
    return figure, list(panels[0])


def to_svg(figure: Figure, *, key: str, title: str, text: str) -> str:
    """Return the figure as one inline `<svg>` element with a title and a description.

    Matplotlib numbers its elements from one in every figure; `key` goes before each id, so that
    several figures can stand in one page.
    """
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # A site named in a script the measuring font lacks: the reader's own font draws it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    drawn = buffer.getvalue()
    body = drawn[drawn.index(">", drawn.index("<svg")) + 1 :]
    # Its style sheet would apply to the whole page; both rules move to the root, and inherit.
    body = re.sub(r"<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{key}-', body)
    body = re.sub(r'href="#', f'href="#{key}-', body).replace("url(#", f"url(#{key}-")
    width, height = (72 * float(side) for side in figure.get_size_inches())
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="{key}-t {key}-d"'
        ' style="stroke-linejoin: round; stroke-linecap: butt">'
        f'<title id="{key}-t">{escape(title)}</title><desc id="{key}-d">{escape(text)}</desc>{body}'
    )
