"""FedProx's local steps and Ditto's own ones a second time, as the papers write their objectives.

Li et al. 2020, https://arxiv.org/abs/1812.06127: a site descends h(w) = F(w) + mu/2 |w - w_0|^2,
where w_0 is what the coordinator sent. Li et al. 2021, https://arxiv.org/abs/2012.04221: a site's
own model v descends F(v) + lambda/2 |v - w|^2, where w is what the coordinator sent.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Point = NDArray[np.float64]
Gradient = Callable[[Point], Point]


def pulled_steps(
    gradients: Sequence[Gradient],
    start: Point,
    *,
    centre: Point,
    strength: float,
    rate: float,
    longest: float = float("inf"),
) -> Point:
    """Return where gradient descent ends, one step for each batch's gradient of F.

    `longest`: norm to which a batch's gradient of F is cut.
    """
    point = start.copy()
    for gradient in gradients:
        slope = gradient(point)
        slope = slope * min(1.0, longest / float(np.linalg.norm(slope)))
        point = point - rate * (slope + strength * (point - centre))
    return point
