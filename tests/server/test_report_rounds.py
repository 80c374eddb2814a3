"""report.html: what a round's line tells of what the round met."""

from intramural.server.report_html import render_html
from tests.server.reports import SITES, report, round_of


def test_a_round_that_was_undone_says_so_with_what_the_held_out_records_said() -> None:
    undone = round_of(2, {}, sites=SITES[:2]) | {
        "holdout": {"loss": 3.25, "accuracy": 0.5, "macro_f1": 0.25},
        "gate": {"metric": "loss", "kept": 2.0, "round": 3.25},
        "rolled_back": True,
    }
    diverged = round_of(3, {}) | {
        "holdout": {},
        "gate": {"metric": "loss", "kept": 2.0, "round": None},
    }
    text = render_html(report(rounds=[round_of(1, {}), undone, diverged]))
    told = (
        "egress-refused: 1; held out: loss 3.250, accuracy 0.500; rolled back: loss 3.250 after 2"
    )
    assert told in text
    assert "rolled back: loss none after 2.000" in text
