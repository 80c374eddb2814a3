"""Rules that need each site's product B A: FLoRA, FlexLoRA, FedEx-LoRA."""

from abc import ABC, abstractmethod
from dataclasses import replace

import numpy as np

from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout, Vector, written
from intramural.core.messages import Update
from intramural.core.route import Part, uplink
from intramural.core.seeds import generator
from intramural.strategies.fedavg import FedAvg
from intramural.strategies.lora import Pairs, fresh, moved, truncated, view
from intramural.strategies.rule import Fold, State, Traits


class ProductRule(ABC):
    """Averages what the sites send, and beside it the products of each site's factors.

    Both are one exact sum, so the order of updates changes no bit. It holds two models of memory,
    and as much again for the products, which are as large as the adapted layers themselves.
    """

    traits = Traits(
        sums_only=False,
        exact_for_lora=True,
        mixed_ranks=False,
        byzantine=False,
        optimizer=False,
    )

    def __init__(self, mean: FedAvg, federation: FederationConfig, layout: Layout) -> None:
        """Average by `mean`, whose server step must be plain; `layout` is the coordinator's."""
        self.name = federation.strategy.rule
        self.pairs = Pairs(federation, layout)
        self.seed = federation.federation.seed
        self._mean = mean
        self._up = uplink(federation, layout, round=1)
        self._part = Part(layout, self._up)

    def begin(self, state: State, current: Vector, *, round: int) -> Fold:
        """Open a round."""
        nothing = np.zeros(self.pairs.products_layout.size, dtype=np.float32)
        start = np.concatenate([self._part.gather(current), nothing])
        inner = self._mean.begin({}, start, round=round)
        return Fold.around(inner, current=current, state=state)

    def add(self, fold: Fold, update: Update) -> None:
        """Fold an update and its products in.

        Raises:
            AggregationError: As `FedAvg.add`; the fold is as before.
        """
        with np.errstate(over="ignore", invalid="ignore"):  # the sum refuses what is not finite
            products = self.pairs.products(fold.current, self._up.unflatten(update.delta))
        self._mean.add(fold.work, replace(update, delta=np.concatenate([update.delta, products])))
        fold.weight = fold.work.weight

    def finish(self, fold: Fold) -> tuple[Vector, State]:
        """Return the next arrays.

        Raises:
            AggregationError: No update was added.
        """
        whole, _ = self._mean.finish(fold.work)
        averaged, products = whole[: self._up.size], whole[self._up.size :]

        def write(out: Vector) -> None:
            out[:] = fold.current
            self._part.scatter(averaged, out)
            self.settle(fold.round, products, out)

        return written(fold.current.size, write), {}

    @abstractmethod
    def settle(self, round: int, products: Vector, out: Vector) -> None:
        """Change `out`, which holds the averaged factors, so that it stands for `products`.

        Args:
            round: From 1.
            products: Weighted mean of the sites' products, scale included.
            out: The coordinator's next vector.
        """


class FLoRA(ProductRule):
    """R <- R + sum_k p_k s B_k A_k; A <- fresh random rows; B <- 0. R joins the frozen weight.

    What stacking the sites' factors amounts to: their product is the sum of the products, exactly,
    whatever rank each site has. The sites get R as a whole matrix, for after a few rounds the stack
    would be larger. Every round starts from new factors, which slows learning where rounds are few.
    The final model is the base model's weights plus R.

    Source: Wang et al. 2024 (stacking), https://arxiv.org/abs/2409.05976.
    """

    traits = replace(ProductRule.traits, mixed_ranks=True)

    def settle(self, round: int, products: Vector, out: Vector) -> None:
        """Merge the products; draw A as PEFT does: uniform within 1 / sqrt(inputs)."""
        for pair in self.pairs:
            assert pair.residual is not None, "the layout of this rule has residuals"
            residual = moved(out, pair.residual, view(products, pair.product))
            view(out, pair.residual)[:] = residual.astype(np.float32)
            rng = generator(self.seed, "flora", round, pair.layer)
            view(out, pair.a)[:] = fresh(pair.a.shape, rng)
            view(out, pair.b)[:] = 0.0


class FlexLoRA(ProductRule):
    """B A <- the best approximation of `sum_k p_k B_k A_k` whose rank is exchange.rank.

    Not exact where the sum's rank is larger; what is lost are its smallest singular values. The
    components come in falling order: a site of a smaller rank takes the first ones, which are the
    best approximation of its own rank. Where the sum is zero, A is the mean of the sites' and B
    zero, as at the start: two factors of zeros would have no gradient, ever. Where the sum has a
    smaller rank, as after a round of small sites, the rows of A that are left over are drawn anew.

    Source: Bai et al. 2024, https://arxiv.org/abs/2402.11505.
    """

    traits = replace(ProductRule.traits, exact_for_lora=False, mixed_ranks=True)

    def settle(self, round: int, products: Vector, out: Vector) -> None:
        """Split every layer's product into factors again."""
        for pair in self.pairs:
            wanted = moved(products, pair.product, None) / self.pairs.scale
            if not wanted.any():
                view(out, pair.b)[:] = 0.0
                continue
            b, a = truncated(wanted, pair.a.shape[0])
            view(out, pair.b)[:] = b.astype(np.float32)
            view(out, pair.a)[:] = a.astype(np.float32)
            spare = ~a.any(axis=1)
            rng = generator(self.seed, "flexlora", round, pair.layer)
            view(out, pair.a)[spare] = fresh(pair.a.shape, rng)[spare]


class FedExLora(ProductRule):
    """A, B <- means; R <- R + s (sum_k p_k B_k A_k - B A). R joins the frozen weight.

    The residual is what averaging the factors apart leaves out, so the sum is exact. The final
    model is the base model's weights plus R, with the adapter.

    Source: Singhal et al. 2025, https://arxiv.org/abs/2410.09432.
    """

    def settle(self, round: int, products: Vector, out: Vector) -> None:
        """Add to the residual what the averaged factors lack."""
        for pair in self.pairs:
            assert pair.residual is not None, "the layout of this rule has residuals"
            residual = moved(out, pair.residual, view(products, pair.product))
            residual -= self.pairs.scale * (moved(out, pair.b, None) @ moved(out, pair.a, None))
            view(out, pair.residual)[:] = residual.astype(np.float32)
