"""The report tells the aggregation error of rounds that have one."""

from intramural.server.report_html import render_html
from tests.server.reports import report


def test_aggregation_errors_have_a_column_where_some_were_measured() -> None:
    without = report()
    assert "Aggregation error" not in render_html(without)
    rounds = [entry | {"aggregation_error": 0.0123} for entry in without["rounds"][:1]]
    page = render_html(without | {"rounds": [*rounds, *without["rounds"][1:]]})
    assert "Aggregation error" in page
    assert "1.2e-02" in page
