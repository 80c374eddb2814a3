"""hardware.toml: the machines and links that a plan is made for."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from intramural.core.config import Section, load_config
from intramural.core.values import Name, Positive

MEGABIT = 1e6
GB = 1e9


class Machine(Section):
    """The table [default]: a site's machine and its link."""

    device: Literal["cpu", "gpu"] = "cpu"
    """'cpu' or 'gpu': what trains"""
    memory_gb: Positive
    """memory of what trains, in GB of 1e9 bytes: main memory, or the GPU's own"""
    relative_speed: Positive = 1.0
    """how many times as fast it trains as the machine of the probe"""
    up_mbit: Positive | None = None
    """megabits a second from the site; absent: sending takes no time"""
    down_mbit: Positive | None = None
    """megabits a second to the site; absent: receiving takes no time"""
    latency_ms: Annotated[float, Field(ge=0, strict=True)] = 0.0
    """milliseconds of a round trip; a request and its answer take one"""


class NamedMachine(Machine):
    """The table [[site]]."""

    name: Name
    """the site's name"""


class Hub(Section):
    """The table [coordinator]."""

    memory_gb: Positive | None = None
    """main memory in GB of 1e9 bytes; absent: not held against the plan"""
    up_mbit: Positive | None = None
    """megabits a second from the coordinator, shared by all sites; absent: no limit"""
    down_mbit: Positive | None = None
    """megabits a second to the coordinator, shared by all sites; absent: no limit"""


class Hardware(Section):
    """The machines of a federation."""

    default: Machine | None = None
    """every site that has no [[site]]; as many as the probe has sites"""
    site: tuple[NamedMachine, ...] = ()
    """one table a site"""
    coordinator: Hub = Hub()
    """the coordinator"""

    @model_validator(mode="after")
    def _names_are_sites(self) -> "Hardware":
        names = [site.name for site in self.site]
        if not names and self.default is None:
            raise ValueError("names no machine; add [default], or [[site]] for each site")
        if len(set(names)) < len(names):
            raise ValueError("names a site twice; give each its own name")
        return self

    def machines(self, sites: int) -> dict[str, Machine]:
        """Return each site's machine by name; [default] fills up to so many sites."""
        found: dict[str, Machine] = {site.name: site for site in self.site}
        if self.default is not None:
            for number in range(len(found) + 1, sites + 1):
                found[f"default-{number}"] = self.default
        return found


def load_hardware(path: Path) -> Hardware:
    """Read hardware.toml.

    Raises:
        ConfigError: As `load_config`.
    """
    return load_config(path, Hardware)


def this_machine() -> Hardware:
    """Return sites that are all like this machine, on links that take no time."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware(default=Machine(memory_gb=memory / GB))
