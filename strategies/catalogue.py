"""The catalogue: every rule that a federation can name, by that name."""

from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout
from intramural.strategies import fednova, lora_kinds, robust, scaffold
from intramural.strategies.fedavg import FedAvg
from intramural.strategies.kind import Kind
from intramural.strategies.rule import Rule


def fedavg_of(federation: FederationConfig, layout: Layout) -> Rule:
    """Return federated averaging as the federation sets it, the server's step left to others."""
    del layout
    return FedAvg.of(federation)


KINDS: dict[str, Kind] = {
    "fedavg": Kind(
        title="FedAvg; FedIT where the exchange is 'lora'",
        paper="McMahan et al. 2017, https://arxiv.org/abs/1602.05629; "
        "Zhang et al. 2023, https://arxiv.org/abs/2305.05644",
        traits=FedAvg.traits,
        make=fedavg_of,
    ),
    **lora_kinds.KINDS,
    **fednova.KINDS,
    **scaffold.KINDS,
    **robust.KINDS,
}
