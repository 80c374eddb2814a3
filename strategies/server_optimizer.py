"""ServerOptimizer: what a rule makes of a round as a step of an optimizer at the coordinator."""

from math import sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from intramural.core.layout import Vector, written_to_send
from intramural.core.messages import Update
from intramural.strategies.rule import Fold, Rule, State
from intramural.strategies.threads import CHUNK

Optimizer = Literal["sgd", "adam", "yogi", "adagrad"]

Chunk = NDArray[np.float64]

MOMENTS = {"sgd": ("velocity",), "adam": ("m", "v"), "yogi": ("m", "v"), "adagrad": ("m", "v")}
PREFIX = "optimizer/"
"""Of the moments in a state; the rest of it is the inner rule's."""


class ServerOptimizer:
    """next = current + a step along d, where d = inner rule's next arrays - current.

    - sgd: `u <- momentum u + d`; step `lr u`.
    - others: `m <- beta_1 m + (1 - beta_1) d`; step `lr m / (sqrt(v) + tau)`, with
      adagrad `v <- v + d**2`, adam `v <- beta_2 v + (1 - beta_2) d**2`,
      yogi `v <- v - (1 - beta_2) d**2 sign(v - d**2)`.

    m and v begin at zero. For adam lr is multiplied by `sqrt(1 - beta_2**t) / (1 - beta_1**t)`,
    t one more than the round, as Flower's FedAdam has it; the paper begins v at tau**2 or more
    instead, and corrects nothing.

    Source: Reddi et al. 2021, Algorithm 2, https://arxiv.org/abs/2003.00295; momentum: Hsu et al.
    2019, https://arxiv.org/abs/1909.06335.
    """

    def __init__(
        self,
        inner: Rule,
        kind: Optimizer,
        *,
        learning_rate: float,
        momentum: float,
        beta_1: float,
        beta_2: float,
        tau: float,
    ) -> None:
        """Step along what `inner` makes of a round."""
        assert inner.traits.optimizer, f"{inner.name} sets arrays anew, and makes no step"
        self.name, self.traits = inner.name, inner.traits
        self.kind = kind
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.beta_1, self.beta_2, self.tau = beta_1, beta_2, tau
        self._inner = inner

    def begin(self, state: State, current: Vector, *, round: int) -> Fold:
        """Open a round of the inner rule."""
        own = {n: a for n, a in state.items() if not n.startswith(PREFIX)}
        inner = self._inner.begin(own, current, round=round)
        return Fold.around(inner, current=current, state=state)

    def add(self, fold: Fold, update: Update) -> None:
        """Hand an update to the inner rule."""
        self._inner.add(fold.work, update)
        fold.weight = fold.work.weight

    def finish(self, fold: Fold) -> tuple[Vector, State]:
        """Return the arrays after the step, and the moments beside the inner rule's state.

        Raises:
            AggregationError: As the inner rule.
        """
        wanted, state = self._inner.finish(fold.work)
        moments = []
        for name in MOMENTS[self.kind]:
            before = fold.state.get(PREFIX + name)
            moments.append(np.zeros_like(wanted) if before is None else before.copy())
            state[PREFIX + name] = moments[-1]
        rate = self._rate(fold.round)

        def write(out: Vector) -> None:
            for lo in range(0, out.size, CHUNK):
                part = slice(lo, lo + CHUNK)
                current = fold.current[part].astype(np.float64)
                delta = wanted[part] - current
                out[part] = current + rate * self._direction(delta, [m[part] for m in moments])

        return written_to_send(wanted.size, write), state

    def _rate(self, round: int) -> float:
        if self.kind != "adam":
            return self.learning_rate
        t = round + 1.0
        return self.learning_rate * sqrt(1 - self.beta_2**t) / float(1 - self.beta_1**t)

    def _direction(self, delta: Chunk, moments: list[Vector]) -> Chunk:
        """Bring a chunk's moments up to date, in place, and return its direction, in float64."""
        if self.kind == "sgd":
            (velocity,) = moments
            velocity[:] = self.momentum * velocity + delta
            return velocity.astype(np.float64)
        first, second = moments
        squares = delta**2
        mean = self.beta_1 * first + (1 - self.beta_1) * delta
        old = second.astype(np.float64)
        if self.kind == "adagrad":
            new = old + squares
        elif self.kind == "adam":
            new = self.beta_2 * old + (1 - self.beta_2) * squares
        else:
            new = old - (1 - self.beta_2) * squares * np.sign(old - squares)
        first[:], second[:] = mean, new
        found: Chunk = mean / (np.sqrt(new) + self.tau)
        return found
