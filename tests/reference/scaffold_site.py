"""SCAFFOLD at a site a second time: Karimireddy et al. 2020, Algorithm 1, lines 7 to 13."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Point = NDArray[np.float64]
Gradient = Callable[[Point], Point]


def scaffold_site(
    x: Point, c: Point, own: Point, gradients: Sequence[Gradient], *, rate: float
) -> tuple[Point, Point]:
    """Return y after a step for each gradient, and the site's next control variate, option II."""
    y = x.copy()
    for gradient in gradients:
        y = y - rate * (gradient(y) - own + c)
    return y, own - c + (x - y) / (len(gradients) * rate)
