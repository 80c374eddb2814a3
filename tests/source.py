"""Reading this repository's own source: files, floors and imports."""

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "data": {"core"},
    "privacy": {"core"},
    "strategies": {"core"},
    "trust": {"core"},
    "models": {"core", "privacy"},
    "client": {"core", "data", "privacy", "models", "trust"},
    "server": {"core", "data", "privacy", "strategies", "models", "trust"},
    "simulations": {
        "core",
        "data",
        "privacy",
        "strategies",
        "models",
        "trust",
        "client",
        "server",
    },
}
"""The house's direction: what each floor may import, besides itself."""


@dataclass(frozen=True, kw_only=True)
class Import:
    """One imported module, wherever in the file it stands."""

    module: str
    line: int


def imports_of(source: str) -> Iterator[Import]:
    """Yield every import, also those inside functions and those made by name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module=alias.name, line=node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield Import(module=base, line=node.lineno)
            for alias in node.names:  # `from intramural import server` imports a floor too
                yield Import(module=f"{base}.{alias.name}", line=node.lineno)
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            first = node.args[0] if node.args else None
            if name in {"import_module", "__import__"} and isinstance(first, ast.Constant):
                yield Import(module=str(first.value), line=node.lineno)


def floor_files(floor: str) -> list[Path]:
    """Return the floor's source files."""
    return sorted((ROOT / floor).rglob("*.py"))


def tracked_files() -> list[Path]:
    """Return every source file of the project that git tracks or would."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:  # an unpacked archive: no git, but also nothing besides the project
        return sorted(p for floor in [*ALLOWED, "tests", "benchmarks"] for p in floor_files(floor))
    paths = {ROOT / line for line in done.stdout.splitlines()}
    return sorted(path for path in paths if path.is_file())
