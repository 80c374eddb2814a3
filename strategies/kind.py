"""Kind: a rule that federations can name, with what it declares and how it is made."""

from collections.abc import Callable
from dataclasses import dataclass

from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout
from intramural.strategies.rule import Rule, Traits

Option = float | int | str | bool


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One entry of the catalogue."""

    title: str
    """As the literature calls it."""
    paper: str
    """Where it is from: authors, year, address."""
    traits: Traits
    make: Callable[[FederationConfig, Layout], Rule]
    """Takes the federation and the coordinator's layout; the registry puts server optimizer, norm
    bound and the travelling part around what it makes."""
    options: tuple[str, ...] = ()
    """Names that strategy.options may hold."""
    needs_lora: bool = False
    """It acts on LoRA factors, and is refused where there are none."""
    routed: bool = True
    """It acts on the part that the sites train; False: on the whole of the coordinator's vector."""


def number_option(
    federation: FederationConfig,
    name: str,
    default: float,
    *,
    above: float = 0.0,
    at_most: float = float("inf"),
) -> float:
    """Return one of strategy.options as a number in `(above, at_most]`.

    Raises:
        ConfigError: It is no such number.
    """
    value = federation.strategy.options.get(name, default)
    if isinstance(value, bool | str) or not above < value <= at_most:
        raise ConfigError(
            f"strategy.options.{name} must be a number above {above:g}"
            + (f" and at most {at_most:g}" if at_most < float("inf") else "")
            + f", got {value!r}"
        )
    return float(value)


def whole_option(federation: FederationConfig, name: str, default: int, *, least: int = 1) -> int:
    """Return one of strategy.options as a whole number, at least `least`.

    Raises:
        ConfigError: It is no such number.
    """
    value = federation.strategy.options.get(name, default)
    if type(value) is not int or value < least:
        raise ConfigError(
            f"strategy.options.{name} must be a whole number of at least {least}, got {value!r}"
        )
    return value
