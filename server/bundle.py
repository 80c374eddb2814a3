"""The bundle that Flower ships: one pyproject.toml with configuration, no code.

Flower puts a bundle's folder first on `sys.path` at every site, so a bundle with code could run
code next to the records. Ours names entry points of the package each site has installed.
"""

from pathlib import Path
from typing import Any

import tomli_w

from intramural.core.files import write_atomic

SERVER_APP = "intramural.server.app:app"
CLIENT_APP = "intramural.client.app:app"


def write_bundle(folder: Path, run_config: dict[str, Any]) -> None:
    """Write a Flower app of configuration alone; equal configuration gives equal bytes."""
    table = {
        "project": {
            "name": "intramural-run",
            "version": "1.0.0",
            "description": "Configuration of one Intramural run; holds no code.",
            "license": "Apache-2.0",
            "dependencies": [],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "intramural",
                    "components": {"serverapp": SERVER_APP, "clientapp": CLIENT_APP},
                    "config": run_config,
                }
            }
        },
    }
    write_atomic(folder / "pyproject.toml", tomli_w.dumps(table).encode())
