"""Compositions of privacy-loss distributions, counted; and a process that has composed nothing."""

from typing import Any

import pytest
from dp_accounting.pld import privacy_loss_distribution as pld

from intramural.privacy import accountant

Distribution = pld.PrivacyLossDistribution


class Count:
    """What was built and composed since it was last `taken`, each with the width of its bins."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._found: list[tuple[str, float]] = []
        build = pld.from_gaussian_mechanism
        repeat, compose = Distribution.self_compose, Distribution.compose

        def built(*words: Any, value_discretization_interval: float, **more: Any) -> Any:
            self._found.append(("step", value_discretization_interval))
            return build(
                *words, value_discretization_interval=value_discretization_interval, **more
            )

        def repeated(one: Any, *words: Any) -> Any:
            self._found.append(("repeated", one._pmf_remove._discretization))
            return repeat(one, *words)

        def composed(one: Any, *words: Any) -> Any:
            self._found.append(("composed", one._pmf_remove._discretization))
            return compose(one, *words)

        patch.setattr(pld, "from_gaussian_mechanism", built)
        patch.setattr(Distribution, "self_compose", repeated)
        patch.setattr(Distribution, "compose", composed)

    def taken(self, interval: float | None = None) -> dict[str, int]:
        """Return how often each was done, in bins of that width or of any; then count anew."""
        kinds = [kind for kind, width in self._found if interval in (None, width)]
        self._found.clear()
        return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def forget_all() -> None:
    """Forget all compositions of this process, as if it had just begun."""
    for cached in vars(accountant).values():
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()
