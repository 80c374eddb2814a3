"""What a report says of a scenario: how long the federation would take, and what happened."""

from typing import Any

from intramural.server.report_words import counted, seconds_text
from intramural.simulations.scenario import Scenario
from intramural.simulations.scenario_grid import HAPPENINGS

WAITED_S_MIN = 60.0
"""A shorter wait between rounds is not worth a word."""


def scenario_section(
    scenario: Scenario,
    rounds: list[dict[str, Any]],
    *,
    simulated_s: float,
    groups: dict[str, int],
) -> dict[str, Any]:
    """Return the keys that a scenario adds to report.json; docs/scenarios.md lists them.

    Args:
        scenario: What was played.
        rounds: The rounds' records, each with what the grid added.
        simulated_s: Simulated seconds from the first greeting to the end of the final test.
        groups: Number of sites by group.
    """
    counts = {name: sum(r["scenario"][name] for r in rounds) for name in HAPPENINGS}
    counts["late"] = sum(r["refusals"].get("stale", 0) for r in rounds)
    between_s = simulated_s - sum(r["simulated_seconds"] for r in rounds)
    return {
        "simulated_seconds": round(simulated_s, 3),
        "scenario": {
            "name": scenario.name,
            "about": scenario.about,
            "digest": scenario.digest,
            "groups": groups,
            **counts,
            "sentence": _sentence(scenario, simulated_s, between_s, counts),
        },
    }


def _sentence(
    scenario: Scenario, simulated_s: float, between_s: float, counts: dict[str, int]
) -> str:
    """Return how long it would take, and all that went wrong."""
    told = [
        (counts["drop_outs"], "training request", "without any answer"),
        (counts["crashes"], "crash", "over training"),
        (counts["left"], "request", "to a site that was cut off over it"),
        (counts["expired"], "reply", "later than Flower keeps a request"),
        (counts["late"], "reply", "after the round had closed"),
        (counts["hostile"], "hostile update", "delivered"),
        (counts["unavailable"], "absence", "at the beginning of a round"),
    ]
    plurals = {"crash": "crashes", "reply": "replies"}
    parts = [
        f"{_counted(number, noun, plurals.get(noun))} {rest}"
        for number, noun, rest in told
        if number
    ]
    waited = ""
    if between_s >= WAITED_S_MIN:
        waited = f", {seconds_text(between_s)} of it outside the rounds"
    begin = (
        f"On these links this federation would take {seconds_text(simulated_s)}{waited} "
        f"(scenario {scenario.name})"
    )
    return f"{begin}; {', '.join(parts) or 'nothing went wrong'}."


def _counted(number: int, noun: str, plural: str | None) -> str:
    return f"{number:,} {plural}" if plural and number != 1 else counted(number, noun)
