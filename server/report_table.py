"""The final table in the terminal: the same rows and the same headline as the page."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from intramural.server.report_privacy import privacy_line
from intramural.server.report_words import (
    Measure,
    Report,
    Row,
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
)


def print_report(report: Report, console: Console) -> None:
    """Print the final results, the headline and the privacy line.

    Args:
        report: The content of `report.json`; any part may be missing.
        console: Where to print. Names are printed as they are, never read as markup.
    """
    if final_rows(report):
        console.print(_table(report))
    for line in (headline(report), joining(report), scenario_line(report)):
        if line:
            console.print(Text(line))
    console.print(Text(privacy_line(report)))


def _table(report: Report) -> Table:
    """Return the models tested on the pooled test split, one a line, sites last."""
    main = headline_measure(report)
    # Balanced accuracy is left to the page: a terminal of 80 columns has no room for it.
    shown = [measure for measure in measures_of(report) if measure.key != "balanced_accuracy"]
    federated = score(final_of(report, "federated"), main)
    table = Table(title=Text(f"{report.get('name', 'run')}: pooled test split"))
    table.add_column("model", overflow="fold")
    for measure in shown:
        table.add_column(Text(measure.title), justify="right", no_wrap=True)
    unit = "points" if main.points else main.title
    table.add_column(Text(f"federated\nahead by\n({unit})"), justify="right", no_wrap=True)
    parts = ""
    for row in final_rows(report):
        if row.part == "local" != parts:
            table.add_section()
        parts = row.part
        cells = [_cell(row, measure) for measure in shown]
        value = score(row.scores, main)
        if row.part == "federated" or value is None or federated is None:
            cells.append("")
        else:
            cells.append(main.step(main.gain(federated, over=value)))
        name = f"{row.name} alone" if row.part == "local" else row.name
        style = "bold" if row.part == "federated" else ""
        table.add_row(Text(name), *map(Text, cells), style=style)
    return table


def _cell(row: Row, measure: Measure) -> str:
    """Return a score with its interval on a line below."""
    ends = interval_text(interval(row.scores, measure))
    return f"{number_text(score(row.scores, measure))}\n{ends}".rstrip()
