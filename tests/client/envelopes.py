"""Envelopes of manifests for tests, signed by a key that nobody keeps."""

import json
from typing import Any

from intramural.core.federation import FederationConfig
from intramural.trust.envelope import MANIFEST_TYPE, sign
from intramural.trust.keys import new_signing_key

PRIVACY: dict[str, Any] = {
    "unit": "record",
    "noise_multiplier": 1.0,
    "delta": 1e-5,
    "clip_norm": 1.0,
    "nominal_records": 2000,
}
"""[privacy] whose noise need not be computed."""


def envelope_of(federation: FederationConfig) -> str:
    """Return a federation's manifest in an envelope."""
    payload = federation.manifest().encode()
    return json.dumps(sign(MANIFEST_TYPE, payload, new_signing_key()))
