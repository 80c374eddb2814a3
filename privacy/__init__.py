"""Sampler, clipper, noise, accountant, plan, ledger, egress, secure aggregation, audit."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from intramural.privacy.private_optimizer import PrivateOptimizer, make_private

__all__ = ["PrivateOptimizer", "make_private"]


def __getattr__(name: str) -> object:
    """Return a public name; loading it loads torch and Opacus (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from intramural.privacy import private_optimizer

    return getattr(private_optimizer, name)
