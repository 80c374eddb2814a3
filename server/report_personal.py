"""Whether the sites' own models were worth it: each beside the federation's, on its own records."""

import math
from typing import Final

from intramural.core.metrics import Sums, personal_of
from intramural.server.report_words import (
    Report,
    counted,
    final_of,
    headline_measure,
    score,
)

T_975: Final = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""Student's t, two-sided 95 %, for 1 to 30 degrees of freedom."""


def personal_sums(test: dict[str, Sums]) -> dict[str, Sums]:
    """Return the sums of the sites' own models; {} without [personal]."""
    found = {site: personal_of(sums) for site, sums in sorted(test.items())}
    return {site: own for site, own in found.items() if own is not None}


def personal_line(report: Report) -> str:
    """Return a sentence on how much better the sites' own models are than the federation's; or ''.

    The interval is Student's over the sites: how much the mean would move with other sites like
    these. It says nothing of other test records or other seeds.
    """
    measure, own = headline_measure(report), final_of(report, "own_test")
    gains = []
    for site, scores in final_of(report, "personal").items():
        mine, theirs = (
            score(scores, measure),
            score((own.get(site) or {}).get("federated"), measure),
        )
        if mine is not None and theirs is not None:
            gains.append((mine - theirs) * (1 if measure.rises else -1))
    if not gains:
        return ""
    scale, unit = (100.0, " points") if measure.points else (1.0, "")
    digits = 1 if measure.points else 3
    mean = math.fsum(gains) / len(gains)
    sites = counted(len(gains), "site")
    told = f"On its own test records, a site's own model reaches {measure.title}"
    told += f" {scale * mean:+.{digits}f}{unit} from the federation's"
    if len(gains) == 1:
        return f"{told}; one site tells no more."
    spread = math.sqrt(math.fsum((g - mean) ** 2 for g in gains) / (len(gains) - 1))
    degrees = len(gains) - 1
    t = T_975[degrees - 1] if degrees <= len(T_975) else 1.96
    half = t * spread / math.sqrt(len(gains))
    low, high = (scale * (mean + side * half) for side in (-1, 1))
    verdict = "it paid" if low > 0 else "it did harm" if high < 0 else "whether it paid is open"
    span = f"95 % interval over sites {low:+.{digits}f} to {high:+.{digits}f}"
    return f"{told} on the mean of {sites} ({span}): {verdict}."
