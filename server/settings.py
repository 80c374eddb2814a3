"""coordinator.toml: where the coordinator listens, and under which name the sites find it."""

import ipaddress
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from intramural.core.config import Section, load_config
from intramural.core.values import Name

COORDINATOR_FILE = "coordinator.toml"
PORT_DEFAULT, SUPERLINK_PORT_DEFAULT = 8443, 9092
_LABEL = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)")


def _is_address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise ValueError("must be an IP address, such as 0.0.0.0") from None


def _is_host(text: str) -> str:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        labels = text.split(".")
        is_name = len(text) <= 253 and all(_LABEL.fullmatch(label) for label in labels)
        if not is_name or labels[-1].isdigit():  # 10.0.0.300 is no name either
            raise ValueError(
                "must be a lower-case DNS name or an IP address, without port"
            ) from None
        return text
    if address.is_unspecified or getattr(address, "scope_id", None):
        raise ValueError("must be an address that the sites can dial")
    return str(address)


Host = Annotated[str, AfterValidator(_is_host)]
Address = Annotated[str, AfterValidator(_is_address)]
Port = Annotated[int, Field(ge=1, le=65535, strict=True)]


class Coordinator(Section):
    """The table [coordinator]."""

    name: Name
    """name of the federation, as in the sites' kits; fixed once there is a roster"""
    host: Host
    """what the sites dial: a DNS name or an IP address; it stands in the certificate and the
    kits, so that a new one takes `intramural server renew` and new kits"""
    listen: Address = "0.0.0.0"
    """address at which the gate listens; '::' for both families"""
    port: Port = PORT_DEFAULT
    """port of the gate, the only one to open to the sites"""
    superlink_port: Port = SUPERLINK_PORT_DEFAULT
    """port of Flower's SuperLink, on loopback alone"""

    @model_validator(mode="after")
    def _ports_differ(self) -> "Coordinator":
        if self.port == self.superlink_port:
            raise ValueError("coordinator.port and coordinator.superlink_port must differ")
        return self


class CoordinatorConfig(Section):
    """The coordinator's own settings."""

    coordinator: Coordinator
    """name and addresses"""


def load_coordinator(folder: Path) -> Coordinator:
    """Read the coordinator.toml of a coordinator's folder.

    Raises:
        ConfigError: As `load_config`.
    """
    return load_config(folder / COORDINATOR_FILE, CoordinatorConfig).coordinator
