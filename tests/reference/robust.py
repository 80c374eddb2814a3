"""Robust rules as the papers write them, on a whole float64 matrix of one row a site."""

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


def median(rows: F64) -> F64:
    """Yin et al. 2018, Definition 1."""
    result: F64 = np.median(rows, axis=0)
    return result


def trimmed_mean(rows: F64, hostile: int) -> F64:
    """Yin et al. 2018, Definition 2."""
    result: F64 = np.sort(rows, axis=0)[hostile : len(rows) - hostile].mean(axis=0)
    return result


def krum_order(rows: F64, hostile: int, *, left_out: int = 2) -> list[int]:
    """Row numbers from the least score up. Blanchard et al. 2017, Section 4."""
    scores = []
    for i, row in enumerate(rows):
        squares = sorted(float(np.sum((row - o) ** 2)) for j, o in enumerate(rows) if j != i)
        scores.append(sum(squares[: len(rows) - hostile - left_out]))
    return sorted(range(len(rows)), key=lambda i: scores[i])


def krum(rows: F64, hostile: int) -> F64:
    """Blanchard et al. 2017, Section 4."""
    result: F64 = rows[krum_order(rows, hostile)[0]]
    return result


def multi_krum(rows: F64, hostile: int) -> F64:
    """Mean of the n - f best rows."""
    result: F64 = rows[krum_order(rows, hostile)[: len(rows) - hostile]].mean(axis=0)
    return result


def geometric_median(rows: F64, *, smoothing: float = 1e-6, iterations: int = 32) -> F64:
    """Pillutla et al. 2022, Algorithm 2, from zero."""
    middle = np.zeros(rows.shape[1])
    for _ in range(iterations):
        weights = [1 / max(smoothing, float(np.linalg.norm(row - middle))) for row in rows]
        middle = np.average(rows, axis=0, weights=weights)
    return middle


def centred_clipping(
    rows: F64, centre: F64, *, radius: float | None = None, iterations: int = 3
) -> F64:
    """Karimireddy et al. 2021, equation CC; without a radius, the lower median distance."""
    for _ in range(iterations):
        lengths = [float(np.linalg.norm(row - centre)) for row in rows]
        bound = sorted(lengths)[(len(rows) - 1) // 2] if radius is None else radius
        steps = [
            (row - centre) * (1.0 if length <= bound else bound / length)
            for row, length in zip(rows, lengths, strict=True)
        ]
        centre = centre + np.mean(steps, axis=0)
    return centre


def nnm(rows: F64, hostile: int) -> F64:
    """Allouah et al. 2023, Algorithm 2: each row becomes the mean of its n - f nearest."""
    mixed = []
    for row in rows:
        nearest = np.argsort(np.linalg.norm(rows - row, axis=1))[: len(rows) - hostile]
        mixed.append(rows[nearest].mean(axis=0))
    return np.array(mixed)


def buckets(rows: F64, order: NDArray[np.int64], size: int) -> F64:
    """Karimireddy et al. 2022, Algorithm 1."""
    groups = [order[at : at + size] for at in range(0, len(rows), size)]
    return np.array([rows[group].mean(axis=0) for group in groups])
