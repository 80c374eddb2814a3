"""The house's direction: a floor imports only what stands left of it."""

import tomllib

import pytest

from tests.source import ALLOWED, ROOT, floor_files, imports_of


def floors_imported(source: str) -> dict[str, int]:
    """Return the floors of ours that a source imports, with a line each."""
    found: dict[str, int] = {}
    for one in imports_of(source):
        head, _, rest = one.module.partition(".")
        if head == "intramural" and rest:
            found[rest.split(".")[0]] = one.line
        elif head in ALLOWED:  # `import server` works in the checkout, and copies every class
            found[head] = one.line
        elif one.module.startswith("."):
            found["(relative)"] = one.line
    return found


@pytest.mark.parametrize("floor", ALLOWED)
def test_a_floor_imports_only_what_stands_left_of_it(floor: str) -> None:
    files = floor_files(floor)
    assert files
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {other}"
        for path in files
        for other, line in floors_imported(path.read_text()).items()
        if other not in ALLOWED[floor] | {floor}
    ]
    assert wrong == []


def test_client_and_server_never_meet_and_no_two_floors_import_each_other() -> None:
    assert "server" not in ALLOWED["client"]
    assert "client" not in ALLOWED["server"]
    assert "strategies" not in ALLOWED["client"]
    assert not [(a, b) for a in ALLOWED for b in ALLOWED[a] if a in ALLOWED[b]]


def test_every_floor_is_in_the_map_of_directions() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = table["tool"]["setuptools"]["packages"]
    floors = {name.split(".")[1] for name in packages if "." in name}
    assert floors == set(ALLOWED)


@pytest.mark.parametrize(
    ("source", "floor"),
    [
        ("import intramural.server.run", "server"),
        ("from intramural.server import run", "server"),
        ("from intramural import server", "server"),
        ("import server.run", "server"),
        ("from server import run", "server"),
        ("def f():\n    from intramural.server.run import plan", "server"),
        ("if True:\n    import intramural.server as s", "server"),
        ("importlib.import_module('intramural.server')", "server"),
        ("from . import run", "(relative)"),
    ],
)
def test_the_reader_of_imports_misses_none(source: str, floor: str) -> None:
    assert floor in floors_imported(source)


def test_the_reader_of_imports_sees_no_ghosts() -> None:
    source = "import serverless\nfrom intramural_x import server_y\n'import server'\n"
    assert floors_imported(source) == {}
