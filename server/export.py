"""The coordinator's use of the model: the arrays to start from, and the files to end with.

These functions import torch when called; the coordinator's modules do not.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout, Vector


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What a run starts from; every site derives the same layout."""

    layout: Layout
    vector: Vector = field(repr=False)
    base: str
    """Digest of the base model."""
    parameters: int
    """Parameters of the whole model."""

    def without_vector(self) -> "Beginning":
        """Return what is still of use when rounds have begun; the vector's memory is let go."""
        return replace(self, vector=np.empty(0, dtype=np.float32))


def beginning(federation: FederationConfig, places: dict[str, str]) -> Beginning:
    """Build the model from the federation's seed and read its travelling parameters.

    Raises:
        ModelError: As `resident_model`.
    """
    resident = _resident(federation, places, fresh=True)
    exchange = resident.loaded.exchange
    return Beginning(
        layout=exchange.layout,
        vector=exchange.read(),
        base=resident.base.digest,
        parameters=sum(p.numel() for p in resident.loaded.model.parameters()),
    )


def save_final(
    federation: FederationConfig, places: dict[str, str], vector: Vector, folder: Path
) -> None:
    """Write the final model to `folder`, whole or not at all, for transformers or PEFT to load."""
    from intramural.models.resident import save_model

    resident = _resident(federation, places)
    resident.loaded.exchange.write(vector)
    save_model(resident, folder)


def _resident(federation: FederationConfig, places: dict[str, str], *, fresh: bool = False) -> Any:
    from intramural.models.resident import resident_model

    return resident_model(federation, places=places, device="auto", fresh=fresh)
