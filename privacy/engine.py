"""Engine: per-unit gradients, clipped, summed, noised. Three of them stand behind one interface."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class NoiseSource(Protocol):
    """Where an engine's Gaussian noise comes from."""

    def normal(self, size: int, *, std: float) -> NDArray[np.float32]:
        """Return `size` independent draws from N(0, std**2)."""
        ...


class Engine(Protocol):
    """Turns per-record losses into one noised gradient a logical batch.

    A logical batch is any number of `open`, forward pass, `fold`, and then one `release`. An empty
    batch is a `release` alone: pure noise. A unit (record or person) must lie whole in one part.

    Guarantees:
        Between two releases each unit adds a vector of L2 norm at most `clip_norm` to the sum,
        over all trainable parameters together; a unit whose gradient is not finite adds zero.
        The noise is drawn once a release, with standard deviation noise_multiplier * clip_norm.
    """

    name: str
    optimizer: Any
    """The Opacus `DPOptimizer` around the caller's optimizer; step hooks attach to it."""

    def open(self, owners: Sequence[int]) -> None:
        """Announce the next forward pass: row i belongs to unit `owners[i]`.

        Units are numbered from 0 without gaps, and the rows of one unit stand together, in order.
        For records that is `range(rows)`.
        """
        ...

    def fold(self, losses: Tensor) -> None:
        """Run backward on the sum of `losses`, shape `(rows,)`; add each unit's clipped gradient.

        `losses[i]` must depend on row i alone.
        """
        ...

    def release(self) -> None:
        """Write (sum + noise) / divisor into each parameter's `.grad` and start the next sum.

        The divisor is a public constant. The step hook of `optimizer` is called; the caller steps
        the original optimizer.
        """
        ...

    def __enter__(self) -> Self:
        """Attach to the model."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the model as it was."""
        ...
