"""Rank: which rank of adapter a site trains, and whether the federation lets it."""

from intramural.client.policy import Violation
from intramural.core.errors import Refused
from intramural.core.federation import FederationConfig
from intramural.core.site import SiteConfig


def rank_of(site: SiteConfig, federation: FederationConfig) -> int | None:
    """Return the rank of a site's adapter where it is another than the federation's, or None.

    Raises:
        Refused: The federation does not take it.
    """
    found = rank_violation(site, federation)
    if found is not None:
        raise Refused(str(found))
    rank, exchange = site.compute.rank, federation.exchange
    return None if exchange.kind != "lora" or rank == exchange.rank else rank


def rank_violation(site: SiteConfig, federation: FederationConfig) -> Violation | None:
    """Return why compute.rank does not fit a federation, or None: it does."""
    rank, exchange = site.compute.rank, federation.exchange
    if rank is None or exchange.kind != "lora" or rank == exchange.rank:
        return None
    least = exchange.rank_min
    if least is not None and least <= rank <= exchange.rank:
        return None
    if least is None:
        asked = f"rank {exchange.rank} of every site, for exchange.rank_min is absent"
        remedy = "remove compute.rank in site.toml, or set exchange.rank_min in federation.toml"
    else:
        asked = f"ranks from exchange.rank_min = {least} to exchange.rank = {exchange.rank}"
        remedy = "change compute.rank in site.toml, or remove it"
    return Violation(key="compute.rank", allowed=f"rank {rank}", asked=asked, remedy=remedy)
