"""Write the tables of docs/strategies.md from the rules: `python docs/make_strategies.py`."""

from pathlib import Path

from intramural.strategies.catalogue import KINDS
from intramural.strategies.matrix import COLUMNS, table

TARGET = Path(__file__).with_name("strategies.md")
BEGIN, END = "<!-- made by docs/make_strategies.py -->\n", "<!-- end -->\n"


def render() -> str:
    """Return the file's content, its table made anew."""
    before, _, rest = TARGET.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n".join(_lines()) + "\n" + END + after


def _lines() -> list[str]:
    titles, *rows = table()
    lines = ["", f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    lines += [f"| `{name}` | {' | '.join(cells)} |" for name, *cells in rows]
    lines += ["", "| rule | called | from |", "|---|---|---|"]
    lines += [f"| `{name}` | {kind.title} | {kind.paper} |" for name, kind in KINDS.items()]
    lines += ["", "Why a rule without a `yes` is refused:", ""]
    lines += [f"- {column.title} (`{column.key}`): {column.why}." for column in COLUMNS]
    return [*lines, ""]


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
