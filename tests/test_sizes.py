"""Sizes: 350 lines a file, 60 a function, 100 columns; and every floor says what it is."""

import ast
import re

import pytest

from tests.source import ALLOWED, ROOT, tracked_files

LINES_MAX, FUNCTION_LINES_MAX, COLUMNS_MAX = 350, 60, 100


def function_lengths(source: str) -> dict[str, int]:
    """Return the lines of each function's body: a command's options are its table, not its code."""
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, functions)]
    return {f"{n.name}:{n.lineno}": (n.end_lineno or 0) - n.body[0].lineno + 1 for n in nodes}


def columns(line: str) -> int:
    """Return a line's width without what it says to linters at its end, as ruff counts."""
    return len(re.sub(r"\s*# (noqa|type: ignore|pragma)\b.*$", "", line))


def test_the_source_is_found() -> None:
    names = {str(path.relative_to(ROOT)) for path in tracked_files()}
    assert {"core/wire.py", "strategies/fedavg.py", "tests/test_sizes.py"} <= names
    assert not [name for name in names if name.startswith((".venv", "build"))]


def test_no_file_is_longer_than_350_lines() -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in tracked_files()}
    assert {name: n for name, n in lengths.items() if n > LINES_MAX} == {}


def test_no_function_is_longer_than_60_lines() -> None:
    long = {
        f"{path.relative_to(ROOT)}:{name}": lines
        for path in tracked_files()
        for name, lines in function_lengths(path.read_text()).items()
        if lines > FUNCTION_LINES_MAX
    }
    assert long == {}


def test_no_line_is_wider_than_100_columns() -> None:
    wide = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked_files()
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if columns(line) > COLUMNS_MAX
    ]
    assert wide == []


def test_a_functions_length_is_that_of_its_body() -> None:
    source = "@d\ndef f(\n x,\n):\n a = 1\n def g():\n  return 2\n return (\n  a)\n"
    assert function_lengths(source) == {"f:2": 5, "g:6": 1}


def test_a_lines_width_counts_comments_but_not_words_to_linters() -> None:
    assert columns("x = 1  # type: ignore[misc]  # why") == columns("x = 1  # noqa: E1") == 5
    assert columns("x = 1  # why") == 12


@pytest.mark.parametrize("floor", [*ALLOWED, "src/intramural", "benchmarks"])
def test_every_floor_says_what_it_is(floor: str) -> None:
    module = ast.parse((ROOT / floor / "__init__.py").read_text())
    docstring = ast.get_docstring(module)
    assert docstring is not None
    assert len(docstring) > 20


def test_every_file_that_holds_anything_says_what_it_owns() -> None:
    sources = {path: path.read_text() for path in tracked_files()}
    silent = [
        str(path.relative_to(ROOT))
        for path, source in sources.items()
        if source.strip() and not ast.get_docstring(ast.parse(source))
    ]
    assert silent == []


@pytest.mark.parametrize("floor", ALLOWED)
def test_type_checkers_follow_a_relative_link_to_each_floor(floor: str) -> None:
    link = ROOT / "src" / "intramural" / floor
    if not link.is_symlink():
        pytest.skip("checkout without symlinks: the package runs, type checkers do not follow it")
    assert str(link.readlink()) == f"../../{floor}"
    assert link.resolve() == ROOT / floor
