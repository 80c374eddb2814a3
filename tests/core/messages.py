"""Builders of messages and of raw Flower records, for the tests of the wire."""

import json
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from intramural.core.layout import Layout, Vector
from intramural.core.wire import encode_vector

LAYOUT = Layout((("a", (2, 2)), ("b", (3,))))
VECTOR: Vector = np.array([0, 0.25, 0.5, 0.75, 1, -2, 3e-39], dtype=np.float32)

BODIES: dict[str, dict[str, Any]] = {
    "Hello": {"manifest": "sha256:ab", "run": "sha256:cd"},
    "TrainRequest": {"manifest": "m", "run": "r", "round": 3, "layout": LAYOUT.digest},
    "EvaluateRequest": {
        "manifest": "m",
        "run": "r",
        "round": 0,
        "layout": LAYOUT.digest,
        "split": "test",
    },
    "Welcome": {
        "site": "a",
        "layout": "l",
        "base": "b",
        "version": "0.1",
        "ledger_entries": 3,
        "ledger_head": "sha256:ef",
    },
    "Update": {
        "site": "a",
        "round": 1,
        "layout": LAYOUT.digest,
        "weight": 5,
        "loss": 0.5,
        "seconds": 1,
        "steps": 2,
        "ledger_entries": None,
        "ledger_head": None,
        "seeded": False,
    },
    "Evaluated": {
        "site": "a",
        "round": 1,
        "split": "validation",
        "sums": {"examples": [3]},
        "ledger_entries": None,
        "ledger_head": None,
    },
    "Refusal": {"site": "a", "reason": "wire", "detail": "no"},
}
"""A good body of each kind, in plain JSON: the test's own reading of the protocol."""
WITH_VECTOR = {"TrainRequest", "EvaluateRequest", "Update"}
REQUESTS = {"Hello", "TrainRequest", "EvaluateRequest"}


def raw(text: str, *, vector: ArrayRecord | None = None) -> RecordDict:
    """Return records with this text as their header."""
    records = RecordDict({"intramural": ConfigRecord({"header": text})})
    if vector is not None:
        records["vector"] = vector
    return records


def good(kind: str, **changes: Any) -> RecordDict:
    """Return a good message with parts of its body changed."""
    header = {"version": 5, "kind": kind, "answers": None, "body": BODIES[kind] | changes}
    vector = encode_vector(VECTOR) if kind in WITH_VECTOR else None
    return raw(json.dumps(header), vector=vector)


def array(**changes: Any) -> Array:
    """Return the encoded vector with parts of it changed."""
    fields: dict[str, Any] = {
        "dtype": "float32",
        "shape": (7,),
        "stype": "intramural.f4",
        "data": VECTOR.tobytes(),
    }
    return Array(**(fields | changes))


def with_array(changed: Array, name: str = "flat") -> RecordDict:
    """Return an Update whose vector is `changed`."""
    records = good("Update")
    record = ArrayRecord()
    record[name] = changed
    records["vector"] = record
    return records
