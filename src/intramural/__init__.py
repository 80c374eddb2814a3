"""Intramural: fine-tune a language model together; every record stays within its own walls.

The public names below are looked up when they are first used, so that `import intramural` loads
neither torch nor Flower.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from intramural.core.package import VERSION as __version__

if TYPE_CHECKING:
    from intramural.client.agent import SiteAgent
    from intramural.core.config import load_config
    from intramural.core.errors import IntramuralError
    from intramural.core.federation import FederationConfig
    from intramural.core.site import SiteConfig, load_site
    from intramural.server.watcher import Watcher
    from intramural.simulations.simulate import Simulation, simulate
    from intramural.simulations.sites import Deal

__all__ = [
    "Deal",
    "FederationConfig",
    "IntramuralError",
    "Simulation",
    "SiteAgent",
    "SiteConfig",
    "Watcher",
    "__version__",
    "load_config",
    "load_site",
    "simulate",
]

_HOMES = {
    "Deal": "intramural.simulations.sites",
    "FederationConfig": "intramural.core.federation",
    "IntramuralError": "intramural.core.errors",
    "Simulation": "intramural.simulations.simulate",
    "SiteAgent": "intramural.client.agent",
    "SiteConfig": "intramural.core.site",
    "Watcher": "intramural.server.watcher",
    "load_config": "intramural.core.config",
    "load_site": "intramural.core.site",
    "simulate": "intramural.simulations.simulate",
}
"""Module of each public name."""


def __getattr__(name: str) -> object:
    """Return a public name from its module (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
