"""Selection: which of the eligible sites make a round's cohort."""

from collections.abc import Sequence

import numpy as np


def draw_uniform(eligible: Sequence[str], size: int, *, rng: np.random.Generator) -> list[str]:
    """Return `size` of the sites, each subset as likely as any other, in order of their names."""
    places = rng.choice(len(eligible), size=size, replace=False)
    return sorted(eligible[place] for place in places.tolist())
