"""The doorway is light, its names lead somewhere, and what is public is documented."""

import ast
import json
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import intramural

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
FLOORS = sorted(folder for package, folder in PACKAGES.items() if package != "intramural")
FILES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]
HEAVY = ("torch", "transformers", "flwr", "ray", "sklearn", "numpy")


def loaded_after(code: str) -> set[str]:
    """Return the modules that a fresh interpreter holds after `code`."""
    show = "import json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout))


def test_import_loads_nothing_heavy() -> None:
    assert not set(HEAVY) & loaded_after("import intramural")


def test_configuration_needs_neither_torch_nor_flower() -> None:
    loaded = loaded_after("from intramural import FederationConfig, SiteConfig, load_site")
    assert not {"torch", "flwr"} & loaded


def test_names_are_listed_once_and_sorted() -> None:
    assert intramural.__all__ == sorted(set(intramural.__all__))
    assert dir(intramural) == intramural.__all__


@pytest.mark.parametrize("name", [n for n in intramural.__all__ if n != "__version__"])
def test_each_name_leads_to_its_own_object(name: str) -> None:
    found = getattr(intramural, name)
    assert found.__name__ == name
    assert found is getattr(import_module(found.__module__), name)
    assert found.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'simulat'"):
        intramural.simulat  # noqa: B018


def test_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert intramural.__version__ == project["version"]


@pytest.mark.parametrize("floor", FLOORS)
def test_each_floor_says_what_it_holds(floor: str) -> None:
    text = ast.get_docstring(ast.parse((ROOT / floor / "__init__.py").read_text()))
    assert text
    assert text.endswith(".")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_public_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the file says nothing of itself"
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    bare = [
        node.name
        for node in tree.body
        if isinstance(node, kinds) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert not bare
