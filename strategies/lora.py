"""LoRA pairs: the two factors of each adapted layer in a flat vector, and their products."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout, Slot, Vector
from intramural.core.route import RESIDUAL, pairs_of

Matrix = NDArray[np.float64]
NOTHING = 1e-6
"""Share of the largest singular value below which another is rounding of float32."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One adapted layer: it gains `scale * B A`, and its residual where there is one."""

    layer: str
    a: Slot
    """Factor A, shape `(rank, inputs)`."""
    b: Slot
    """Factor B, shape `(outputs, rank)`."""
    residual: Slot | None
    """Shape `(outputs, inputs)`; None: the rule adds nothing to the frozen weight."""
    product: Slot
    """Where the pair's product lies in a vector of all products, shape `(outputs, inputs)`."""


class Pairs:
    """The pairs of a layout, and what their factors multiply to, in float64."""

    def __init__(self, federation: FederationConfig, layout: Layout) -> None:
        """Find the pairs of the coordinator's layout."""
        slots = {slot.name: slot for slot in layout.slots()}
        found = pairs_of(tuple(slots))
        self.products_layout = Layout(
            tuple((layer, (slots[b].shape[0], slots[a].shape[1])) for layer, a, b in found)
        )
        """Of the layers' products, one after the other."""
        self.scale = federation.exchange.alpha / federation.exchange.rank
        """Of every product, whatever rank a site trains."""
        self._pairs = tuple(
            Pair(
                layer=layer,
                a=slots[a],
                b=slots[b],
                residual=slots.get(RESIDUAL + layer),
                product=product,
            )
            for (layer, a, b), product in zip(found, self.products_layout.slots(), strict=True)
        )

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def products(self, current: Vector, deltas: Mapping[str, NDArray[np.float32]]) -> Vector:
        """Return `scale * (B + dB) (A + dA)` of every pair, shape `(products_layout.size,)`.

        Args:
            current: The coordinator's vector.
            deltas: What a site changed, by parameter; what is not there, it left as it was.
        """
        out = np.empty(self.products_layout.size, dtype=np.float32)
        for pair in self._pairs:
            a, b = (moved(current, slot, deltas.get(slot.name)) for slot in (pair.a, pair.b))
            np.multiply(b @ a, self.scale, out=view(out, pair.product), casting="same_kind")
        return out


def view(vector: Vector, slot: Slot) -> NDArray[np.float32]:
    """Return a slot's part of a vector, shaped; nothing is copied."""
    return vector[slot.start : slot.stop].reshape(slot.shape)


def moved(current: Vector, slot: Slot, delta: NDArray[np.float32] | None) -> Matrix:
    """Return a parameter plus a change of it, in float64."""
    values: Matrix = view(current, slot).astype(np.float64)
    if delta is not None:
        values += delta
    return values


def truncated(matrix: Matrix, rank: int) -> tuple[Matrix, Matrix]:
    """Return B, A of the best approximation of that rank: `B A`, by singular values in order.

    Each takes the root of a singular value; the first r columns of B and rows of A are the best
    approximation of rank r, for every r. Signs are fixed by `_signs`. What is smaller than the
    rounding of float32 is left out: its column and row are zeros.

    Source: Eckart and Young 1936, https://doi.org/10.1007/BF02288367.
    """
    left, sizes, right = np.linalg.svd(matrix, full_matrices=False)
    rank_here = min(rank, int(np.count_nonzero(sizes > NOTHING * sizes[0])))
    signs = _signs(right[:rank_here])
    root = np.sqrt(sizes[:rank_here])
    a, b = np.zeros((rank, matrix.shape[1])), np.zeros((matrix.shape[0], rank))
    a[:rank_here] = (root * signs)[:, None] * right[:rank_here]
    b[:, :rank_here] = left[:, :rank_here] * (root * signs)
    return b, a


def fresh(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float32]:
    """Return rows of A as PEFT draws them: uniform within 1 / sqrt(inputs), float32."""
    bound = 1 / sqrt(shape[1])
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def orthonormal(b: Matrix, a: Matrix) -> tuple[Matrix, Matrix]:
    """Return B', A' with `B' A' = B A` and `A' A'^T = I`; shapes as given, rank <= inputs.

    By the singular values of the product, found from those of an `r x r` matrix: with `B = Q R` and
    `A^T = P S`, `B A = Q (R S^T) P^T`. Where the product has fewer than r of them, the rows left
    over are orthonormal too, and their columns of B' are zero.
    """
    q, r = np.linalg.qr(b)
    p, s = np.linalg.qr(a.T)
    left, sizes, right = np.linalg.svd(r @ s.T)
    rows = right @ p.T
    signs = _signs(rows)
    new_b = np.zeros_like(b)
    new_b[:, : len(sizes)] = (q @ left) * sizes  # fewer than r, where B has fewer outputs
    return new_b * signs, signs[:, None] * rows


def _signs(rows: Matrix) -> Matrix:
    """Return 1 or -1 for each row: its largest entry is then positive, on every machine."""
    largest = np.abs(rows).argmax(axis=1)
    picked: Matrix = np.take_along_axis(rows, largest[:, None], axis=1)[:, 0]
    return np.where(picked < 0, -1.0, 1.0)
