"""The sites of a simulation, as a node's process finds them: folders, or one population."""

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from intramural.client.agent import SiteAgent
from intramural.client.source import PopulationSource
from intramural.core.federation import FederationConfig
from intramural.core.site import SiteConfig, load_site, simulated_name
from intramural.data.population import FACTS, Population

LEDGERS = "ledgers"
"""Folder of a population's privacy ledgers, one file for each site that was charged."""
TEMPLATE = "site.toml"
"""What all sites of a population share, in its folder."""


def as_it_is(site: SiteConfig) -> SiteConfig:
    """Return a site's configuration unchanged."""
    return site


def simulated_agent(
    folder: Path,
    number: int,
    sites: int,
    federation: FederationConfig,
    *,
    change: Callable[[SiteConfig], SiteConfig] = as_it_is,
) -> SiteAgent:
    """Return the agent of one simulated site.

    Args:
        folder: Holds a folder with a site.toml for each site, or a population.
        number: Which site, from 0.
        sites: How many there are.
        federation: What it takes part in.
        change: Makes the site's configuration what it is for this agent.

    Raises:
        ConfigError, DataError: The site's folder, or the population, is not whole.
    """
    if not os.path.isfile(f"{folder}/{FACTS}"):  # a Path takes thrice as long, for each site
        file = folder / simulated_name(number, sites) / "site.toml"
        return SiteAgent(change(load_site(file)), federation, durable=False)
    source = PopulationSource(_population(folder), number, federation)
    site = change(population_site(folder, simulated_name(number, sites)))
    return SiteAgent(site, federation, source=source, durable=False)


def population_site(folder: Path, name: str) -> SiteConfig:
    """Return one site of a population: the template, with a name and a ledger of its own."""
    template = _template(folder)
    data = template.data.model_copy(update={"ledger": folder / LEDGERS / f"{name}.jsonl"})
    identity = template.site.model_copy(update={"name": name})
    return template.model_copy(update={"site": identity, "data": data})


@lru_cache(maxsize=2)
def _population(folder: Path) -> Population:
    return Population(folder)


@lru_cache(maxsize=2)
def _template(folder: Path) -> SiteConfig:
    return load_site(folder / TEMPLATE)
