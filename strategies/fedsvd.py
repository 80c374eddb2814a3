"""FedSVD: sites train B alone; the coordinator turns A towards what was learnt, every round."""

import numpy as np

from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout, Vector, written
from intramural.strategies.lora import Pairs, moved, orthonormal, view
from intramural.strategies.routed import Routed
from intramural.strategies.rule import Fold, Rule, State


class FedSVD(Routed):
    """B <- mean of the sites' B; then `B A = U S V^T`, A <- V^T, B <- U S, for every layer.

    A is the same at every site, so the mean of B times A is the mean of the products: exact. That
    the product is kept when A is exchanged for its right singular vectors is arithmetic. The rows
    of A are orthonormal, which bounds the gradient of B, and so what clipping cuts. Only the sum of
    B is needed. While B is zero, A stays as it is.

    Source: Lee et al. 2025, https://arxiv.org/abs/2505.12805.
    """

    def __init__(self, inner: Rule, federation: FederationConfig, layout: Layout) -> None:
        """Redistribute what `inner` makes of the trained part."""
        super().__init__(inner, federation, layout)
        self._pairs = Pairs(federation, layout)

    def finish(self, fold: Fold) -> tuple[Vector, State]:
        """Return the next arrays, whose products are those of the mean."""
        averaged, state = super().finish(fold)

        def write(out: Vector) -> None:
            out[:] = averaged
            for pair in self._pairs:
                b = moved(averaged, pair.b, None)
                if b.any():
                    new_b, new_a = orthonormal(b, moved(averaged, pair.a, None))
                    view(out, pair.b)[:] = new_b.astype(np.float32)
                    view(out, pair.a)[:] = new_a.astype(np.float32)

        return written(averaged.size, write), state
