"""The learning rate over the whole federation; rounds do not restart it."""

import math

from intramural.core.federation import Training


def learning_rate(training: Training, progress: float) -> float:
    """Return the learning rate at `progress`, the share of the federation done, in [0, 1].

    With warm-up share w and peak p: p * progress / w below w; then, with x running from 0 to 1 over
    the rest, p (constant), p * (1 - x) (linear) or p * (1 + cos(pi x)) / 2 (cosine; Loshchilov and
    Hutter 2017, equation 5 without restarts).
    """
    peak, warmup = training.learning_rate, training.warmup
    if progress < warmup:
        return peak * progress / warmup
    x = (progress - warmup) / (1 - warmup)
    if training.schedule == "linear":
        return peak * (1 - x)
    if training.schedule == "cosine":
        return peak * (1 + math.cos(math.pi * x)) / 2
    return peak
