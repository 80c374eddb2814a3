"""What the documents say exists: commands, options, targets, files, keys."""

import re
import runpy
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import pytest
import typer

from intramural.__main__ import app
from intramural.core.config import check_config
from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout
from intramural.core.metrics import Sums
from intramural.server.export import Beginning
from intramural.server.report import result_of, run_report
from intramural.server.setting import Outcome

ROOT = Path(__file__).resolve().parent.parent
TOP = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
DOCS = [
    *(ROOT / name for name in TOP),
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("examples/*/*.md")),
]
CLI = cast(click.Group, typer.main.get_command(app))
GROUPS = {name for name, command in CLI.commands.items() if isinstance(command, click.Group)}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
SUFFIXES = r"\.(?:py|md|toml|csv|txt|j2|css)"
MADE_BY_A_RUN = {
    "site.toml",
    "federation.toml",
    "coordinator.toml",
    "pyproject.toml",
    "notes.csv",
}
"""Names that stand for a file of the reader's, or one that a command writes."""


def blocks(text: str) -> Iterator[str]:
    """Yield the content of code blocks, fenced or indented."""
    yield from re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    yield from re.findall(r"^    (\S.*)$", text, re.MULTILINE)


def inline(text: str) -> list[str]:
    """Return the pieces of inline code outside code blocks, each on one line."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def lines(text: str) -> Iterator[list[str]]:
    """Yield the words of each command line in code blocks, without comments."""
    for block in blocks(text):
        for line in block.replace("\\\n", " ").splitlines():
            command = line.removeprefix("$ ")
            if command.startswith(("intramural ", "make ")):
                yield shlex.split(command, comments=True)


def found(words: Sequence[str]) -> tuple[click.Command, list[str]]:
    """Return the command that words begin with, however deep in groups, and what follows it."""
    command, rest = cast(click.Command, CLI), list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        command = command.commands[rest.pop(0)]
    return command, rest


def leaves(group: click.Group, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield each command that is no group, with the words that call it."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, *path, name)
        else:
            yield (*path, name), command


LEAVES = dict(leaves(CLI))


def known_options(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts} | {"--help"}


def by_path() -> list[Any]:
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in DOCS]


@pytest.mark.parametrize("path", by_path())
def test_command_lines_are_ones_that_parse(path: Path) -> None:
    for program, name, *words in lines(path.read_text()):
        if program == "make":
            assert {name, *words} <= TARGETS
        else:
            command, rest = found([name, *words])
            command.make_context(command.name, rest)


@pytest.mark.parametrize("path", by_path())
def test_commands_and_options_named_in_prose_exist(path: Path) -> None:
    for code in inline(path.read_text()):
        words = code.split()
        if words[0] == "make" and len(words) > 1:
            assert words[1] in TARGETS, code
        if words[0] in GROUPS and len(words) > 1:
            words = ["intramural", *words]
        if words[0] == "intramural" and len(words) > 1:
            command, _ = found(words[1:])
            assert {w for w in words if w.startswith("--")} <= known_options(command), code


def test_lone_options_in_the_readme_belong_to_a_command() -> None:
    known = set().union(*(known_options(command) for command in LEAVES.values()))
    named = {c.split()[0] for c in inline((ROOT / "README.md").read_text()) if c.startswith("--")}
    assert named
    assert named <= known


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_each_command_has_help_and_is_in_the_readme(path: tuple[str, ...]) -> None:
    command = LEAVES[path]
    assert command.help
    assert "Example: intramural " + " ".join(path) in " ".join(command.help.split())
    assert all(p.help for p in command.params if isinstance(p, click.Option))
    rows = (ROOT / "README.md").read_text().splitlines()
    (row,) = [row for row in rows if row.startswith(f"| `intramural {path[0]}` |")]
    assert len(path) == 1 or f"`{' '.join(path[1:])}`" in row


def test_the_readmes_row_of_a_group_names_commands_that_exist() -> None:
    rows = (ROOT / "README.md").read_text().splitlines()
    for group in GROUPS:
        (row,) = [row for row in rows if row.startswith(f"| `intramural {group}` |")]
        named = {tuple(code.split()) for code in inline(row)[1:]}
        assert named == {path[1:] for path in LEAVES if path[0] == group}


def anchors(text: str) -> set[str]:
    """Return the anchors that a page's headings get."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", by_path())
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not target.startswith(("https://", "mailto:")):
            name, _, anchor = target.partition("#")
            page = path.parent / name if name else path
            assert page.exists(), target
            assert not anchor or anchor in anchors(page.read_text()), target


@pytest.mark.parametrize("path", by_path())
def test_files_named_in_code_exist(path: Path) -> None:
    for code in inline(path.read_text()):
        if re.fullmatch(rf"[\w./-]+{SUFFIXES}", code) and code not in MADE_BY_A_RUN:
            assert (ROOT / code).is_file() or (path.parent / code).is_file(), code


@pytest.mark.parametrize("path", by_path())
def test_no_figure_is_missing(path: Path) -> None:
    assert "TODO-ARCHITECT" not in path.read_text()


def test_configuration_is_what_the_models_say() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))["render"]()
    committed = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert committed == made, "run `python docs/make_configuration.py`"


def config(kind: str) -> FederationConfig:
    labels = ["a", "b"] if kind == "classification" else []
    table = {
        "federation": {"name": "tiny", "rounds": 1},
        "model": {"base": "tiny"},
        "task": {"kind": kind, "labels": labels},
        "exchange": {"kind": "lora"},
        "training": {"learning_rate": 0.1, "local_steps": 1},
        "sites": {"min": 1},
    }
    return check_config(table, FederationConfig, source="test")


def sums(kind: str) -> Sums:
    """Return an evaluation of four examples."""
    counts = {"loss": [0], "examples": [4]}
    if kind == "classification":
        counts |= {"confusion": [1, 1, 1, 1]}
    else:
        counts |= {"token_loss": [0], "tokens": [8], "correct_tokens": [4], "hit_shares": [0]}
    return Sums(counts={name: np.array(n, dtype=np.int64) for name, n in counts.items()})


def report() -> dict[str, Any]:
    """Return what a coordinator reports of one round at one site."""
    layout = Layout((("weight", (2,)),))
    vector = np.zeros(2, dtype=np.float32)
    first = Beginning(layout=layout, vector=vector, base="sha256:0", parameters=3)
    record = {
        "round": 1,
        "sites": ["<site>"],
        "metrics": {},
        "train_loss": 0.5,
        "bytes_up": 1,
        "bytes_down": 2,
        "seconds": 0.1,
        "refusals": {"<reason>": 1},
        "ledgers": {},
    }
    outcome = Outcome(vector=vector, history=[record], test={"<site>": sums("classification")})
    return run_report(
        config("classification"), first, outcome, digest="sha256:1", engine="inprocess"
    )


def keys(value: Any, path: str = "") -> Iterator[str]:
    """Yield the paths of a report's leaves; a table of metrics is one leaf."""
    is_metrics = isinstance(value, dict) and "macro_f1" in value
    if isinstance(value, dict) and value and not is_metrics:
        for name, inner in value.items():
            placed = "<package>" if path == "versions" else name
            yield from keys(inner, f"{path}.{placed}".lstrip("."))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield from keys(value[0], f"{path}[]")
    else:
        yield path


def listed(heading: str) -> list[str]:
    """Return the first column of the table under a heading of docs/report.md."""
    text = (ROOT / "docs" / "report.md").read_text()
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)`", section, re.MULTILINE)


def test_report_keys_are_the_listed_ones() -> None:
    assert sorted(listed("Keys")) == sorted(set(keys(report())))


def test_metrics_are_the_listed_ones() -> None:
    found = [result_of(config(kind), sums(kind)) for kind in ("classification", "generation")]
    assert sorted(listed("Metrics")) == sorted({name for result in found for name in result})


def test_a_simulation_fills_keys_that_a_report_has() -> None:
    roots = {re.split(r"[.\[]", key)[0] for key in listed("Keys that a simulation fills")}
    assert roots == {"sites", "initial", "final", "samples"}
    assert roots <= set(report())


def test_the_matrix_is_what_the_rules_declare() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_strategies.py"))["render"]()
    committed = (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8")
    assert committed == made, "run `python docs/make_strategies.py`"
