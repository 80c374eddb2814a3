"""Attacks on updates: what hostile sites send instead, as pure functions of what they know.

`known` are honest updates of one round, at least one, each float32 of shape `(size,)`: all of them
where the attacker sees everything, or those that the hostile sites trained themselves. Results are
float32 of shape `(size,)`; of what is made of `known`, all hostile sites send the same. Beside the
updates nothing but a few float64 vectors is in memory.
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from math import sqrt
from statistics import NormalDist
from typing import Literal, assert_never

import numpy as np
from numpy.typing import NDArray

from intramural.core.layout import Vector

Known = Sequence[Vector] | Vector
"""Updates one by one, or as a matrix of shape `(updates, size)`."""
Wide = NDArray[np.float64]
Direction = Literal["deviation", "mean", "sign"]

FACTORS = tuple(float(f) for f in np.geomspace(0.1, 100.0, 16))
"""Factors that `tuned` tries."""


def mean_of(known: Known) -> Wide:
    """Return the mean of the updates, float64."""
    total = np.zeros(known[0].shape)
    for row in known:
        total += row
    return total / len(known)


def deviation_of(known: Known) -> Wide:
    """Return each element's standard deviation over the updates, float64; of one update zeros.

    The sum of squares is divided by their number less 1, as byzfl does.
    """
    mean, squares = mean_of(known), np.zeros(known[0].shape)
    for row in known:
        squares += np.square(row - mean)
    return np.sqrt(squares / max(1, len(known) - 1))


def sign_flip(delta: Vector, *, strength: float) -> Vector:
    """Return -strength * delta: the site's own update, turned around.

    Source: Li et al. 2019 (RSA), https://arxiv.org/abs/1811.03761, where it is one of the attacks
    of the experiments.
    """
    return delta * np.float32(-strength)


def gaussian(delta: Vector, *, strength: float, rng: np.random.Generator) -> Vector:
    """Return noise whose deviation is `strength` times the update's root mean square.

    Source: Blanchard et al. 2017, the Gaussian attack of their experiments,
    https://arxiv.org/abs/1703.02757.
    """
    noise = _root_mean_square(delta) * strength * rng.standard_normal(delta.shape)
    return noise.astype("<f4")


def constant(delta: Vector, *, strength: float) -> Vector:
    """Return `strength` times the update's root mean square, everywhere."""
    return np.full(delta.shape, strength * _root_mean_square(delta), dtype="<f4")


def _root_mean_square(delta: Vector) -> float:
    return float(np.sqrt(np.square(delta, dtype=np.float64).mean())) if delta.size else 0.0


def alie(known: Known, *, z: float) -> Vector:
    """Return mean - z * deviation: A Little Is Enough, a bias that hides within the spread.

    With one known update there is no spread, and it is sent as it is.

    Source: Baruch et al. 2019, the attack that prevents convergence,
    https://arxiv.org/abs/1902.06156.
    """
    return (mean_of(known) - z * deviation_of(known)).astype("<f4")


def alie_z(sites: int, *, hostile: int) -> float:
    """Return the largest z with which enough honest sites lie farther out to cover the hostile.

    phi(z) = (n - f - s) / (n - f), with s = floor(n / 2 + 1) - f honest supporters needed for a
    majority. It is 0 or below in small federations: 0 for 2 of 10. There the bias of `alie` is no
    bias, and benchmarks take 1.5, as byzfl does, or `tuned`.

    Source: Baruch et al. 2019, z_max of the same attack, https://arxiv.org/abs/1902.06156; the
    share is taken of the honest sites, as Karimireddy et al. 2022 compute it.
    """
    assert 0 < 2 * hostile < sites, "the hostile are a minority"
    supporters = sites // 2 + 1 - hostile
    return NormalDist().inv_cdf((sites - hostile - supporters) / (sites - hostile))


def ipm(known: Known, *, epsilon: float) -> Vector:
    """Return -epsilon * mean, so that the aggregate's inner product with the mean falls.

    Under plain averaging the step turns around where f * epsilon > n - f; a small epsilon is for
    rules that choose among near updates.

    Source: Xie et al. 2020 (Fall of Empires), https://arxiv.org/abs/1903.03936.
    """
    return (-epsilon * mean_of(known)).astype("<f4")


def min_max(known: Known, *, share: float = 1.0, direction: Direction = "deviation") -> Vector:
    """Return mean + gamma * p, no farther from any known update than two of these from each other.

    gamma is `share` of the largest such number, in closed form: for each update x it is the
    positive root of |mean - x + gamma p|^2 = max_{i,j} |x_i - x_j|^2, and the smallest root counts.
    p is minus the elements' deviation, minus the mean at length 1, or minus the mean's signs.

    Source: Shejwalkar and Houmansadr 2021 (NDSS), the attack Min-Max, which finds gamma by search,
    https://www.ndss-symposium.org/wp-content/uploads/ndss2021_6C-3_24498_paper.pdf.
    """
    mean, away = mean_of(known), _direction(known, direction)
    bound = max((_square(a, b) for a, b in combinations(known, 2)), default=0.0)
    steep = float(away @ away)
    if steep == 0.0 or bound == 0.0:
        return mean.astype("<f4")
    roots = []
    for row in known:
        offset = mean - row
        half, rest = float(away @ offset), min(0.0, float(offset @ offset) - bound)
        roots.append((-half + sqrt(half * half - steep * rest)) / steep)
    return (mean + share * min(roots) * away).astype("<f4")


def min_sum(known: Known, *, share: float = 1.0, direction: Direction = "deviation") -> Vector:
    """Return mean + gamma * p, its squared distances no more in sum than any known update's.

    gamma is `share` of the largest such number. As the offsets from the mean add up to zero,
    k gamma^2 |p|^2 = max_i sum_j |x_i - x_j|^2 - sum_j |mean - x_j|^2 of k known updates.

    Source: Shejwalkar and Houmansadr 2021 (NDSS), the attack Min-Sum; see `min_max`.
    """
    mean, away = mean_of(known), _direction(known, direction)
    spread = sum(_square(mean, row) for row in known)
    bound = max(sum(_square(one, other) for other in known) for one in known)
    steep = len(known) * float(away @ away)
    if steep == 0.0:
        return mean.astype("<f4")
    gamma = share * sqrt(max(0.0, bound - spread) / steep)
    return (mean + gamma * away).astype("<f4")


def _direction(known: Known, direction: Direction) -> Wide:
    match direction:
        case "deviation":
            return -deviation_of(known)
        case "mean":
            mean = mean_of(known)
            return -mean / (float(np.sqrt(mean @ mean)) or 1.0)
        case "sign":
            return -np.sign(mean_of(known))
        case _:
            assert_never(direction)


def _square(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    offset = np.subtract(a, b, dtype=np.float64)
    return float(offset @ offset)


def mimic_victim(known: Known) -> int:
    """Return the place of the update that Mimic copies: the farthest along the main direction.

    With z the direction in which the updates vary most, it is argmax_i |z . (x_i - mean)|. Found
    from the updates' products, so z itself is never written out. All hostile sites copy that site:
    what it has is over-represented, and nothing that is sent looks odd.

    Source: Karimireddy et al. 2022, the mimic attack, which finds z over some first rounds and then
    keeps to one site; whoever calls this each round has a weaker attack,
    https://arxiv.org/abs/2006.09365.
    """
    mean = mean_of(known)
    offsets = np.array([[float((a - mean) @ (b - mean)) for b in known] for a in known])
    # (x_i - mean) . z is the i-th element of the products' first eigenvector, to a factor
    _, vectors = np.linalg.eigh(offsets)
    along = np.abs(vectors[:, -1])
    return int(np.argmax(along > along.max() * (1 - 1e-9)))  # of equal ones the first


def free_rider(last_change: Vector, *, size: float, rng: np.random.Generator) -> Vector:
    """Return the arrays' last change and noise, of `size` times its root mean square.

    A site that has no records, or spends nothing on them, looks as if it trained. With a change of
    zeros it sends zeros, the plainest free ride.

    Source: Lin et al. 2019, delta weights attack, https://arxiv.org/abs/1911.12560; with noise,
    Fraboni et al. 2021, disguised free-riders, https://arxiv.org/abs/2006.11901.
    """
    return last_change + gaussian(last_change, strength=size, rng=rng)


def model_replacement(delta: Vector, *, sites: int, hostile: int) -> Vector:
    """Return delta * n / f: after averaging, the f hostile sites' model takes the place of all.

    Source: Bagdasaryan et al. 2020, equation 3 with gamma = n / eta and server step 1,
    https://arxiv.org/abs/1807.00459.
    """
    return delta * np.float32(sites / hostile)


def tuned(
    craft: Callable[[float], Vector],
    harm: Callable[[Vector], float],
    *,
    factors: Sequence[float] = FACTORS,
) -> tuple[Vector, float]:
    """Return the update that harms most, and its factor: the attacker tries the rule itself.

    Args:
        craft: Makes an update of a factor, such as `alie` of z or `ipm` of epsilon.
        harm: Tells how far the round's aggregate would lie from the honest mean.
        factors: Those to try; of equal harm the first wins.

    Source: Allouah et al. 2023, the optimised ALIE and FOE of their experiments, by line search,
    https://arxiv.org/abs/2302.01772.
    """
    found = [(harm(craft(factor)), factor) for factor in factors]
    factor = max(found, key=lambda pair: pair[0])[1]
    return craft(factor), factor
