"""The epsilon of steps by dp-accounting's own accountant: events in, one number out."""

from functools import lru_cache
from typing import Any

from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation

NEIGHBOURS = {
    "add-remove": NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace-one": NeighboringRelation.REPLACE_ONE,
}
Part = tuple[float, float, int]
"""Sample rate, noise multiplier and steps of one mechanism."""


def pld_epsilon(*parts: Part, delta: float, relation: str = "add-remove") -> float:
    """Return epsilon at `delta` of all the parts together."""
    return float(_accountant(parts, relation).get_epsilon(delta))


@lru_cache(maxsize=16)
def _accountant(parts: tuple[Part, ...], relation: str) -> Any:
    accountant = PLDAccountant(NEIGHBOURS[relation])
    for rate, noise, steps in parts:
        one: Any = GaussianDpEvent(noise)
        accountant.compose(PoissonSampledDpEvent(rate, one) if rate < 1 else one, steps)
    return accountant
