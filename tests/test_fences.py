"""Heavy libraries stay behind their fences, and importing has no effects."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.source import ALLOWED, ROOT, floor_files, imports_of

FENCES: dict[str, tuple[str, ...]] = {
    "flwr": (
        "core/wire.py",
        "strategies/flower.py",
        "strategies/flower_named.py",
        "client/",
        "server/",
        "simulations/",
    ),
    "torch": ("models/", "privacy/"),
    "transformers": ("models/",),
    "peft": ("models/",),
    "opacus": ("privacy/",),
    "dp_accounting": ("privacy/",),
    "ray": ("simulations/",),
}
"""Where a library may be imported, at the top of a file or inside a function."""


@pytest.mark.parametrize("library", FENCES)
def test_a_library_is_imported_only_behind_its_fence(library: str) -> None:
    outside = [
        f"{path.relative_to(ROOT)}:{one.line}"
        for floor in ALLOWED
        for path in floor_files(floor)
        for one in imports_of(path.read_text())
        if one.module.split(".")[0] == library
        and not str(path.relative_to(ROOT)).startswith(FENCES[library])
    ]
    assert outside == []


def loaded_by(module: str, *, folder: Path) -> list[str]:
    """Import a module in a fresh process; return the heavy libraries that came with it."""
    script = (
        f"import json, sys\nimport {module}\n"
        f"print(json.dumps([m for m in {sorted(FENCES)!r} if m in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    names: list[str] = json.loads(done.stdout.splitlines()[-1])
    return names


@pytest.mark.parametrize("module", ["intramural.server.app", "intramural.client.app"])
def test_flowers_entry_points_load_no_torch_and_no_transformers(
    module: str, tmp_path: Path
) -> None:
    loaded = loaded_by(module, folder=tmp_path)
    assert "flwr" in loaded  # the probe sees what is there
    assert not {"torch", "transformers", "peft", "opacus", "dp_accounting", "ray"} & set(loaded)


@pytest.mark.parametrize(
    "module", ["intramural", "intramural.core.config", "intramural.data.split"]
)
def test_what_needs_no_flower_loads_none(module: str, tmp_path: Path) -> None:
    assert loaded_by(module, folder=tmp_path) == []


def test_a_simulation_without_privacy_does_not_wait_for_accounting(tmp_path: Path) -> None:
    loaded = loaded_by("intramural.simulations.simulate", folder=tmp_path)
    assert "torch" in loaded
    assert not {"dp_accounting", "opacus"} & set(loaded)


def test_importing_every_light_module_writes_no_file_and_no_environment(tmp_path: Path) -> None:
    light = ("core", "data", "strategies", "trust", "server", "client")
    modules = [
        f"intramural.{floor}.{path.stem}"
        for floor in light
        for path in floor_files(floor)
        if "torch" not in path.read_text() and path.stem not in {"__init__", "agent"}
    ]
    assert len(modules) > 20
    script = (
        "import importlib, logging, os, signal, sys\n"
        "import flwr.serverapp, flwr.clientapp\n"  # Flower's own effects are not ours
        "before = dict(os.environ), logging.getLogger().handlers[:]\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "assert (dict(os.environ), logging.getLogger().handlers[:]) == before\n"
    )
    subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        check=True,
        env={**os.environ, "HOME": str(tmp_path), "MPLCONFIGDIR": str(tmp_path / "matplotlib")},
    )
    ours = [path for path in tmp_path.rglob("*") if "flwr" not in str(path)]
    assert [path for path in ours if "matplotlib" not in str(path)] == []
