"""The bundle that Flower ships: one pyproject.toml, the same for every run, no code.

Flower puts a bundle's folder first on `sys.path` at every site, so a bundle with code could run
code next to the records. Ours names entry points of the package each site has installed, and
what differs between runs travels beside it, as Flower's run configuration. So a site knows the one
bundle it lets in: the one its own installed version would build.
"""

from pathlib import Path
from typing import Any

import tomli_w

from intramural.core.files import write_atomic
from intramural.core.package import VERSION

SERVER_APP = "intramural.server.app:app"
CLIENT_APP = "intramural.client.app:app"
ENDLESS = -1.0
"""Patience of a round that waits for sites as long as it takes; Flower knows no infinity here."""
SETTINGS: dict[str, str | bool | float] = {
    "manifest": "",
    "out": "",
    "models": "{}",
    "holdout": "",
    "resume": True,
    "engine": "flower",
    "patience-s": ENDLESS,
    "durable": True,
    "simulation-sites": "",
    "coordinator": "",
}
"""Keys of a run's configuration, with their defaults; Flower lets a run override no others."""


def bundle_files() -> dict[str, bytes]:
    """Return the bundle's files by name; equal versions give equal bytes."""
    table: dict[str, Any] = {
        "project": {
            "name": "intramural-run",
            "version": VERSION,
            "description": "Names the entry points of the installed package; holds no code.",
            "license": "Apache-2.0",
            "dependencies": [],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "intramural",
                    "components": {"serverapp": SERVER_APP, "clientapp": CLIENT_APP},
                    "config": SETTINGS,
                }
            }
        },
    }
    return {"pyproject.toml": tomli_w.dumps(table).encode()}


def write_bundle(folder: Path, run_config: dict[str, Any]) -> tuple[Path, Path]:
    """Write a bundle and one run's configuration; return the paths for `flwr run`.

    Args:
        folder: Gets `app/`, the bundle, and `run.toml`, the configuration.
        run_config: Values of some of `SETTINGS`.
    """
    unknown = set(run_config) - set(SETTINGS)
    assert not unknown, unknown
    app, settings = folder / "app", folder / "run.toml"
    for name, content in bundle_files().items():
        write_atomic(app / name, content)
    write_atomic(settings, tomli_w.dumps(run_config).encode())
    return app, settings
