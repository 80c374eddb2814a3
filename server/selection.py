"""Selection: which of the eligible sites make a round's cohort."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from intramural.core.federation_rounds import Sites


def draw(
    sites: Sites,
    eligible: Sequence[str],
    size: int,
    *,
    history: Sequence[Mapping[str, Any]],
    rng: np.random.Generator,
) -> list[str]:
    """Return a cohort of `size` of the eligible sites, in order of their names.

    Args:
        sites: Says how.
        eligible: In order of their names.
        size: At most as many as there are.
        history: Records of the rounds committed; round-robin goes by who took part in them, so
            that a resumed run draws as the first one did.
        rng: The round's own.
    """
    match sites.selection:
        case "uniform":
            return draw_uniform(eligible, size, rng=rng)
        case "weighted":
            return draw_weighted(eligible, size, weights=sites.weights, rng=rng)
        case "round-robin":
            return draw_in_turn(eligible, size, history=history, rng=rng)


def draw_uniform(eligible: Sequence[str], size: int, *, rng: np.random.Generator) -> list[str]:
    """Return `size` of the sites, each subset as likely as any other."""
    places = rng.choice(len(eligible), size=size, replace=False)
    return sorted(eligible[place] for place in places.tolist())


def draw_weighted(
    eligible: Sequence[str],
    size: int,
    *,
    weights: Mapping[str, float],
    rng: np.random.Generator,
) -> list[str]:
    """Return `size` of the sites, drawn one after the other in proportion to their weights.

    Each site's key is `u ** (1 / w)` for a uniform u, and the largest keys win; that is drawing
    without replacement.

    Source: Efraimidis and Spirakis 2006, https://doi.org/10.1016/j.ipl.2005.11.003.
    """
    keys = np.log1p(-rng.random(len(eligible)))  # of 1 - u, which is uniform too, and never 0
    keys /= [weights.get(site, 1.0) for site in eligible]
    best = np.argsort(-keys, kind="stable")[:size]
    return sorted(eligible[place] for place in best.tolist())


def draw_in_turn(
    eligible: Sequence[str],
    size: int,
    *,
    history: Sequence[Mapping[str, Any]],
    rng: np.random.Generator,
) -> list[str]:
    """Return the `size` sites that took part least often; among equals the draw decides."""
    taken = Counter(site for record in history for site in record["sites"])
    order = rng.permutation(len(eligible)).tolist()
    order.sort(key=lambda place: taken[eligible[place]])  # stable: equals stay in drawn order
    return sorted(eligible[place] for place in order[:size])
