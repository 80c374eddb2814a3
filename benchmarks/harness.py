"""What every benchmark shares: rows, the facts of the machine, a table, a JSON file."""

import dataclasses
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from intramural.core.files import write_json

PACKAGES = ("intramural", "flwr", "numpy", "torch", "transformers", "opacus")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One result, with what it was meant to be."""

    name: str
    value: float | None
    """None: not run; `target` then says why."""
    unit: str
    target: str = ""
    ok: bool | None = None
    """Whether the target was met; None where there is none."""
    peer: str = ""
    """What it was compared with, and how that did."""
    samples: Sequence[float] = ()
    """The single measurements; `value` is their median."""


def machine_facts() -> dict[str, Any]:
    """Return what a reader needs to compare these numbers with others."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": {name: version(name) for name in PACKAGES},
    }


def _processor() -> str:
    """Return the processor's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def publish(title: str, rows: Sequence[Row], *, machine: dict[str, Any], path: Path | None) -> None:
    """Print the rows as a table and, with a path, write them as JSON."""
    table = Table("result", "value", "unit", "target", "met", "peer", title=title)
    words = {True: "yes", False: "NO", None: ""}
    for row in rows:
        value = "not run" if row.value is None else f"{row.value:.3g}"
        table.add_row(row.name, value, row.unit, row.target, words[row.ok], row.peer)
    Console().print(table)
    if path is not None:
        write_json(path, {"machine": machine, "rows": [dataclasses.asdict(row) for row in rows]})
