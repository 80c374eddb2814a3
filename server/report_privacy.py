"""What a report says of privacy: a line for the screen, a table for the page."""

from collections.abc import Mapping
from math import inf
from typing import Any, Final

from intramural.privacy.told import told
from intramural.server.report_words import NO_PRIVACY, Report, number_text

TERMS: Final = {
    "epsilon": "epsilon, all runs",
    "epsilon_of_this_run": "epsilon, this run",
    "delta": "delta",
    "unit": "unit",
    "records_per_person": "records a person",
    "relation": "neighbours",
    "sampler": "sampler",
    "sample_rate": "sample rate",
    "clip_norm": "clip norm",
    "noise_multiplier": "noise multiplier",
    "steps": "steps",
    "accountant": "accountant",
}
"""Columns of the page's table, by key of a site's statement."""


def privacy_line(report: Report) -> str:
    """Return the claim in one line; an epsilon never stands without its terms."""
    sites: Mapping[str, Any] = report.get("privacy") or {}
    plan: Mapping[str, Any] | None = report.get("privacy_plan")
    hidden: Mapping[str, Any] | None = report.get("site_privacy")
    lines = []
    if plan and plan["seeded"]:
        return f"NOT PRIVATE: {', '.join(plan['seeded'])} drew from a test's seed."
    if plan and not sites:
        lines.append(
            f"Differential privacy was planned: epsilon {told(plan['epsilon'])} at delta "
            f"{plan['delta']:g} over the run, one {plan['unit']}, {plan['relation']}, "
            f"{plan['sampler']} sampling; {plan['accountant']}. What each site has spent over all "
            "its runs, its own ledger says."
        )
    if sites:
        stated = list(sites.values())
        if not all(site.get("private") for site in stated):
            return "NOT PRIVATE: sampling and noise came from a test's seed."
        epsilons = [inf if site["epsilon"] is None else site["epsilon"] for site in stated]
        terms = sorted({f"{s['unit']}, {s['relation']}, {s['sampler']} sampling" for s in stated})
        deltas = sorted({f"{site['delta']:g}" for site in stated})
        lines.append(
            f"Differential privacy at each site, over all its runs: epsilon at most "
            f"{told(max(epsilons))} at delta {' or '.join(deltas)}, one {' or '.join(terms)}; "
            f"{stated[0]['accountant']}. See privacy.md."
        )
    if hidden:
        lines.append(str(hidden["words"]))
    return " ".join(lines) or f"{NO_PRIVACY}."


def privacy_table(report: Report) -> dict[str, Any] | None:
    """Return titles and rows of the sites' statements, and what they have in common."""
    sites: Mapping[str, Any] = report.get("privacy") or {}
    if not sites:
        return None
    shown = [k for k in TERMS if any(site.get(k) is not None for site in sites.values())]
    first = next(iter(sites.values()))
    return {
        "titles": [TERMS[key] for key in shown],
        "rows": [
            (name, [_cell(key, site.get(key)) for key in shown])
            for name, site in sorted(sites.items())
        ],
        "claims": sorted({str(site.get("claim")) for site in sites.values()}),
        "trust": first.get("trust", ""),
        "not_covered": list(first.get("not_covered", ())),
    }


def _cell(key: str, value: Any) -> str:
    if key.startswith("epsilon") and value is not None:
        return told(value)
    if isinstance(value, float) and 1e-3 <= abs(value) < 1e6:
        return number_text(value)
    return "" if value is None else str(value)
