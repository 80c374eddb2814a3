"""The page is well formed, self-contained, complete, honest, and safe to open."""

import re
from collections import Counter
from functools import cache
from html.parser import HTMLParser
from typing import Any

import pytest

from intramural.server import plots
from intramural.server.report_html import render_html
from intramural.server.report_words import (
    NO_PRIVACY,
    bytes_text,
    headline,
    joining,
    seconds_text,
)
from tests.server.reports import DIGEST, SITES, generation, report, scores, statement

VOID = {"meta", "br", "hr", "img", "link", "input"}
FIGURES = (
    plots.metrics_by_round,
    plots.sites_on_pooled_test,
    plots.sites_on_own_test,
    plots.cost_by_round,
    plots.records_by_site,
)


class Page(HTMLParser):
    """Reads a page strictly: every element closed in order; collects links, ids and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.note(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.note(tag, attrs)

    def note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            self.attributes.append((name, value or ""))
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text += data


REPORTS: dict[str, dict[str, Any]] = {
    "full": report(),
    "generation": generation(),
    "nothing": {},
    "no final": report(final=None),
    "no comparison": report(final={"federated": scores(0.7)}),
    "nulls": report(
        final={"federated": None, "pooled": None, "baseline": None, "local": {}, "own_test": {}},
        rounds=[],
        sites=[],
        samples=[],
        model={},
        plan={},
    ),
    "deployed": report(
        sites=[],
        final={
            "federated": scores(0.7),
            "pooled": None,
            "baseline": None,
            "local": {},
            "own_test": {site: {"federated": scores(0.7)} for site in SITES},
        },
    ),
    "null scores": report(
        final={
            "federated": scores(0.7),
            "local": {SITES[0]: None, SITES[1]: scores(0.5)},
            "own_test": {SITES[0]: {"federated": scores(0.6), "local": None}, SITES[1]: None},
        }
    ),
    "no metrics": report(rounds=[{"round": 1, "sites": [], "metrics": {}, "train_loss": None}]),
    "privacy": report(
        privacy={SITES[0]: statement(), SITES[1]: statement(epsilon=3.25, sample_rate=0.02)}
    ),
    "seeded": report(
        privacy={
            SITES[0]: statement(),
            SITES[1]: statement(
                claim="none: seeded randomness",
                private=False,
                epsilon=None,
                epsilon_of_this_run=None,
                random="aes-256-ctr from a seed: NOT PRIVATE",
            ),
        }
    ),
}


@cache
def html_of(name: str) -> str:
    return render_html(REPORTS[name])


@pytest.mark.parametrize("name", REPORTS)
def test_page_is_well_formed_whatever_is_missing(name: str) -> None:
    page = Page(html_of(name))
    assert page.tags["html"] == page.tags["h1"] == 1
    assert ("lang", "en") in page.attributes
    assert headline(REPORTS[name]) in page.text
    assert "None" not in page.text
    assert "nan" not in page.text.split()


@pytest.mark.parametrize("name", REPORTS)
def test_page_asks_nothing_of_any_network(name: str) -> None:
    html = html_of(name)
    page = Page(html)
    assert all(link.startswith("#") for link in page.links)
    assert page.tags["script"] == page.tags["link"] == page.tags["iframe"] == 0
    assert not re.search(r"@import|https?://|url\((?!#)", html)
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_figures_share_a_page_without_sharing_ids() -> None:
    page = Page(html_of("full"))
    assert page.tags["svg"] == len(FIGURES)
    assert [name for name, count in Counter(page.ids).items() if count > 1] == []
    referred = {link.removeprefix("#") for link in page.links}
    labelled = " ".join(value for name, value in page.attributes if name == "aria-labelledby")
    assert referred | set(labelled.split()) <= set(page.ids)


def test_a_label_or_site_that_is_markup_is_shown_and_not_obeyed() -> None:
    site = "<script>alert(1)</script>"
    hostile = report(
        name="<i>run</i>",
        notes=["<u>note</u>"],
        sites=[{"name": site, "train": 5, "validation": 1, "test": 1, "labels": {"<b>x</b>": 7}}],
    )
    hostile["final"]["local"] = {site: scores(0.5)}
    html = render_html(hostile)
    page = Page(html)
    assert page.tags["script"] == page.tags["i"] == page.tags["u"] == 0
    assert "<b>x</b>" not in html
    assert "&lt;b&gt;x&lt;/b&gt;" in html
    for shown in (site, "<i>run</i>", "<u>note</u>", "<b>x</b>"):
        assert shown in page.text


def test_a_dollar_in_a_name_is_not_mathematics() -> None:
    site = {"name": "$bank_1$ & $co", "train": 9, "labels": {"$label_1$": 9}}
    drawn = plots.records_by_site(report(labels=["$label_1$"], sites=[site]))
    assert "$bank_1$ &amp; $co" in drawn
    assert "$label_1$" in drawn


def test_a_name_in_another_script_is_drawn_without_a_warning() -> None:
    assert "東京病院" in plots.records_by_site(report(sites=[{"name": "東京病院", "train": 9}]))


def test_every_number_of_the_final_results_appears() -> None:
    full = report()
    page = Page(html_of("full"))
    final = full["final"]
    models = [final["federated"], final["pooled"], final["baseline"], *final["local"].values()]
    models += [model for site in final["own_test"].values() for model in site.values()]
    for model in models:
        assert f"{model['macro_f1']:.3f}" in page.text
        low, high = model["interval"]["macro_f1"]
        assert f"[{low:.3f}, {high:.3f}]" in page.text
    for model in models[:6]:
        assert f"{model['accuracy']:.3f}" in page.text
        assert f"{model['loss']:.3f}" in page.text
    assert "0.550" in page.text  # the mean of 0.6, 0.55 and 0.5
    for gain in (
        "\N{MINUS SIGN}2.0",
        "+15.0",
        "+12.0",
        "+10.0",
        "+20.0",
        "+5.0",
        "\N{MINUS SIGN}1.0",
        "+18.0",
    ):
        assert gain in page.text


def test_the_run_can_be_identified_from_the_page() -> None:
    page = Page(html_of("full"))
    for fact in (DIGEST, "minilm", "22,000,000", "312,981 (1.42 %)", "fedavg", "torch 2.9.0"):
        assert fact in page.text
    assert "15.0 MB" in page.text  # 3.762 MB up and 11.286 MB down
    assert "2 min 05 s" in page.text
    assert "egress-refused: 1" in page.text
    assert "without lakeview" in page.text


def test_privacy_is_claimed_only_where_the_report_holds_a_claim() -> None:
    assert NO_PRIVACY in Page(html_of("full")).text
    private = Page(html_of("privacy")).text
    assert NO_PRIVACY not in private
    # the worst of the sites, with delta, unit, relation and sampler in the same breath
    assert (
        "epsilon at most 7.9100 at delta 1e-05, one record, add-remove, poisson sampling" in private
    )
    for shown in ("7.910", "3.250", "epsilon, all runs", "neighbours", "PLD, dp-accounting"):
        assert shown in private
    for shown in ("The site's own machine is trusted.", "what the site releases elsewhere"):
        assert shown in private


def test_one_seeded_site_takes_the_claim_from_all() -> None:
    text = Page(html_of("seeded")).text
    assert "NOT PRIVATE: sampling and noise came from a test's seed." in text
    assert "epsilon at most" not in text
    assert "none: seeded randomness" in text


def test_intervals_are_explained_only_where_there_are_some() -> None:
    assert "bars are 95 % intervals" in Page(html_of("full")).text
    assert "interval" not in Page(html_of("generation")).text


def test_samples_are_shown_in_full() -> None:
    text = Page(html_of("generation")).text
    for shown in ("Summarise <the> note", "a reference", "words before", "words after"):
        assert shown in text


def test_the_same_report_gives_the_same_page() -> None:
    assert render_html(report()) == html_of("full")


@pytest.mark.parametrize("draw", FIGURES)
def test_a_figure_has_a_title_and_is_empty_without_data(draw: Any) -> None:
    assert Page(draw(report())).tags["title"] == 1
    assert draw({}) == ""
    assert draw(REPORTS["nulls"]) == ""


def test_drawing_leaves_the_style_of_others_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.metrics_by_round(report())
    assert dict(matplotlib.rcParams) == before


def test_many_labels_and_sites_still_draw() -> None:
    labels = [f"label-{number}" for number in range(60)]
    sites = [
        {
            "name": f"site-{n}",
            "train": 60,
            "validation": 1,
            "test": 1,
            "labels": dict.fromkeys(labels, 1),
        }
        for n in range(40)
    ]
    drawn = plots.records_by_site(report(labels=labels, sites=sites))
    assert "site-39" in drawn
    assert "label-28" in drawn
    assert "label-29" not in drawn  # 29 labels and 'other' fill the 30 columns
    assert ">52<" in drawn  # the other 31 of 60 labels: 51.7 %


def test_headline_counts_for_and_against() -> None:
    # 0.700 against the mean 0.550, pooled 0.720 +- 0.04 (overlaps), baseline 0.580 +- 0.04 (not).
    assert headline(report()) == (
        "Trained across 3 sites, the model reaches macro-F1 0.700 on the pooled test split:"
        " 15.0 points above the mean of 3 local-only models (0.550), 2.0 points below training on"
        " all records pooled (0.720; the intervals overlap), and it beats TF-IDF + LinearSVC"
        " (0.580) by 12.0 points."
    )


def test_headline_admits_falling_short_and_being_level() -> None:
    final = {"federated": scores(0.6), "pooled": scores(0.6004), "baseline": scores(0.71)}
    told = headline(report(final=final))
    assert "level with training on all records pooled" in told
    assert "falls short of TF-IDF + LinearSVC (0.710) by 11.0 points" in told


def test_headline_of_a_generation_knows_that_lower_is_better() -> None:
    told = headline(generation())
    assert "loss 2.000 on the pooled test split (lower is better)" in told
    assert "0.400 below the mean of 3 local-only models (2.400)" in told
    assert "0.100 above training on all records pooled (1.900)" in told


def test_joining_names_the_sites_that_lose() -> None:
    # Local 0.65, 0.71, 0.52 against federated 0.70 on each site's own records.
    assert joining(report()) == (
        "On their own test records, 2 of 3 sites do better with the federated model than with a"
        " model trained alone; worse off: county-general by 1.0 point."
    )
    assert "3 of 3 sites" in joining(generation())
    assert joining(report(final=None)) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_254_000, "1.3 MB"), (999_960, "1.0 MB")],
)
def test_bytes_are_told_in_decimal_units(value: int, text: str) -> None:
    assert bytes_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.04, "0.0 s"),
        (4.2, "4.2 s"),
        (59.7, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7800, "2 h 10 min"),
    ],
)
def test_seconds_are_told_as_a_person_would(value: float, text: str) -> None:
    assert seconds_text(value) == text
