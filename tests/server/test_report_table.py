"""The terminal says the same as the page."""

import io
from typing import Any

import pytest
from rich.console import Console

from intramural.server.report_table import print_report
from intramural.server.report_words import NO_PRIVACY, headline, joining
from tests.server.reports import generation, report, scores


def printed(value: dict[str, Any], *, width: int = 200) -> str:
    file = io.StringIO()
    print_report(value, Console(file=file, width=width, color_system=None))
    return file.getvalue()


def test_every_number_of_the_final_results_is_printed() -> None:
    full = report()
    text = printed(full)
    final = full["final"]
    for model in (final["federated"], final["pooled"], final["baseline"], *final["local"].values()):
        for name in ("macro_f1", "accuracy", "loss"):
            assert f"{model[name]:.3f}" in text
        low, high = model["interval"]["macro_f1"]
        assert f"[{low:.3f}, {high:.3f}]" in text
    for gain in ("-2.0", "+15.0", "+12.0", "+10.0", "+20.0"):
        assert gain in text


@pytest.mark.parametrize("value", [report(), generation()])
def test_headline_joining_and_privacy_are_those_of_the_page(value: dict[str, Any]) -> None:
    text = " ".join(printed(value).split())
    assert headline(value) in text
    assert joining(value) in text
    assert NO_PRIVACY in text


def test_sites_come_last_and_in_order() -> None:
    text = printed(report())
    places = [text.index(name) for name in ("Federated", "Pooled", "Baseline", "lakeview alone")]
    assert places == sorted(places)


def test_no_number_is_cut_on_a_narrow_terminal() -> None:
    text = printed(report(), width=80)
    assert "[0.660, 0.740]" in text
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_name_is_printed_as_it_is_and_never_read_as_markup() -> None:
    hostile = report(name="[bold]run[/bold]")
    hostile["final"]["local"] = {"[red]site[/red]": scores(0.5)}
    text = printed(hostile)
    assert "[bold]run[/bold]" in text
    assert "[red]site[/red] alone" in text


@pytest.mark.parametrize(
    "value",
    [
        {},
        report(final=None),
        report(final={"federated": None, "local": {"a": scores(0.5)}}),
        report(final={"federated": scores(0.7)}, rounds=[], sites=[]),
    ],
)
def test_missing_parts_are_left_out(value: dict[str, Any]) -> None:
    text = " ".join(printed(value).split())
    assert headline(value) in text
    assert "None" not in text


def test_a_private_run_does_not_print_that_it_is_not() -> None:
    assert NO_PRIVACY not in printed(report(privacy={"site": {"epsilon": 7.9}}))
