"""docs/operations.md: its transcripts are what the commands print, line by line."""

import csv
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tomli_w
from typer.testing import CliRunner

from intramural.__main__ import app
from intramural.client.approve_cli import approvals_of
from intramural.client.enrol import examine_kit, init_site, join
from intramural.core.config import load_config
from intramural.core.errors import AwaitsApproval
from intramural.core.federation import FederationConfig
from intramural.core.journal import utc_now
from intramural.core.site import load_site
from intramural.server.enrol import enrol_site, write_kit
from intramural.server.folder import CoordinatorFolder
from intramural.server.founding import init_coordinator
from intramural.server.settings import Coordinator
from intramural.trust.envelope import MANIFEST_TYPE, sign
from intramural.trust.keys import PASSPHRASE, read_signing_key
from tests.tiny import LABELS, Json, Row, rows

PAGE = Path(__file__).resolve().parent.parent / "docs" / "operations.md"
HOME = "/srv/fl"
"""Where the page says that its transcripts were made."""
MEMBER, NEWCOMER = "st-elsewhere", "clinic-b"
FREE_BYTES = 100 * 1024**3

FEDERATION: Json = {
    "federation": {"name": "chapters", "rounds": 10, "seed": 7},
    "model": {"base": "minilm", "max_length": 32},
    "task": {"kind": "classification", "labels": list(LABELS)},
    "exchange": {"kind": "head"},
    "training": {"optimizer": "sgd", "learning_rate": 1.0, "batch_size": 16, "local_steps": 5},
    "strategy": {"weights": "equal"},
    "sites": {"min": 3},
    "privacy": {
        "unit": "record",
        "epsilon": 3.0,
        "delta": 1e-5,
        "clip_norm": 1.0,
        "nominal_records": 100,
    },
}
GREEDY: Json = {
    name: keys
    for name, keys in (FEDERATION | {"exchange": {"kind": "full"}, "sites": {"min": 2}}).items()
    if name != "privacy"
}
POLICY: Json = {
    "epsilon_run": 8.0,
    "epsilon_lifetime": 10.0,
    "exchange": ["head"],
    "cohort_min": 3,
    "records_min": 100,
}

PLAIN = [
    (re.compile(r"sha256:[0-9a-f]{6,64}(\.\.\.)?"), "sha256:DIGEST"),
    (re.compile(r"\b[0-9a-f]{12}\b"), "DIGITS"),
    (re.compile(r"\d{4}-\d\d-\d\d(T[\d:.]+\+00:00)?"), "DATE"),
    (re.compile(r"\b\d+ days\b"), "DAYS"),
    (re.compile(r"\d+\.\d GiB"), "SIZE"),
]
"""What differs from one machine or day to the next."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of a transcript, and the lines below it."""

    command: str
    lines: tuple[str, ...]


def steps_of(text: str) -> list[Step]:
    """Return the commands of a page's console blocks, in order."""
    found: list[Step] = []
    for block in re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append(Step(command=line[2:], lines=()))
            else:
                found[-1] = replace(found[-1], lines=(*found[-1].lines, line))
    return found


def played(steps: Sequence[Step], folder: Path) -> list[Step]:
    """Run the commands in a folder, and return each with what it really printed."""
    found, code = [], 0
    for step in steps:
        program, *words = shlex.split(step.command)
        if step.command == "echo $?":
            printed = f"{code}\n"
        else:
            assert program == "intramural", step.command
            done = CliRunner().invoke(app, words)
            printed, code = done.output, done.exit_code
        lines = printed.replace(str(folder), HOME).splitlines()
        found.append(Step(command=step.command, lines=tuple(lines)))
    return found


def differences(told: Sequence[Step], real: Sequence[Step]) -> list[str]:
    """Return where a transcript is not what was printed, but for digests, dates and sizes."""
    found = []
    for ours, theirs in zip(told, real, strict=True):
        pair = [[plain(line) for line in step.lines] for step in (ours, theirs)]
        if (ours.command, pair[0]) != (theirs.command, pair[1]):
            found.append(f"$ {theirs.command}\n" + "\n".join(theirs.lines))
    return found


def plain(line: str) -> str:
    for pattern, word in PLAIN:
        line = pattern.sub(word, line)
    return line


def put_site(folder: Path, name: str, records: Sequence[Row], bert: Path) -> None:
    """Write a site's folder as its people would: records, base model, site.toml."""
    home = folder / name
    home.mkdir()
    with open(home / "notes.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["title", "chapter"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(records)
    table = {
        "site": {"name": name},
        "data": {"path": "notes.csv", "text": "title", "label": "chapter"},
        "model": {"minilm": "models/minilm"},
        "policy": POLICY,
        "compute": {"device": "cpu"},
    }
    (home / "site.toml").write_text(tomli_w.dumps(table))
    shutil.copytree(bert, home / "models" / "minilm")


def put_federation(folder: Path) -> None:
    """Write two federations, make a coordinator, and enrol the one member."""
    for name, table in {"federation": FEDERATION, "greedy": GREEDY}.items():
        (folder / f"{name}.toml").write_text(tomli_w.dumps(table))
    init_coordinator(folder / "coordinator", Coordinator(name="chapters", host="fl.example.org"))
    request = init_site(folder / MEMBER, name=MEMBER)
    kit = folder / "kit.json"
    write_kit(kit, enrol_site(folder / "coordinator", request).kit)
    join(folder / MEMBER, examine_kit(folder / MEMBER, kit, now=utc_now()))


def propose(folder: Path) -> None:
    """Have the coordinator's signed manifest wait at the member, as its first message does."""
    config = load_config(folder / "federation.toml", FederationConfig)
    key = read_signing_key(CoordinatorFolder(root=folder / "coordinator").signing_key)
    site_file = folder / MEMBER / "site.toml"
    envelope = json.dumps(sign(MANIFEST_TYPE, config.manifest().encode(), key))
    with pytest.raises(AwaitsApproval):
        approvals_of(site_file, load_site(site_file)).admit(envelope, config)


@pytest.fixture(scope="module")
def told() -> list[Step]:
    return steps_of(PAGE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def real(
    told: list[Step], bert: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Step]]:
    """Return what the page's commands print in a folder like the page's."""
    folder = tmp_path_factory.mktemp("operations").resolve()
    put_site(folder, MEMBER, rows(), bert)
    few = rows()[:60]
    for place, label in {3: "other", 4: "other", 7: ""}.items():
        few[place] = few[place] | {"chapter": label}
    put_site(folder, NEWCOMER, few, bert)
    put_federation(folder)
    propose(folder)
    usage = shutil.disk_usage(folder)._replace(free=FREE_BYTES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        patch.delenv(PASSPHRASE, raising=False)
        patch.chdir(folder)
        yield played(told, folder)


def test_the_transcripts_are_what_the_commands_print(told: list[Step], real: list[Step]) -> None:
    assert differences(told, real) == []


@pytest.mark.parametrize(
    "words", ["client check", "client policy explain", "client approve", "client log"]
)
def test_the_page_shows(told: list[Step], words: str) -> None:
    assert any(step.command.startswith(f"intramural {words}") for step in told)


def test_a_refusal_and_a_failed_check_are_shown_with_their_exit_codes(told: list[Step]) -> None:
    assert {step.lines[0] for step in told if step.command == "echo $?"} == {"0", "1", "3"}


def mutants(step: Step) -> Iterator[Step]:
    """Yield a step with a line too many, and each of its lines lost or changed in one word."""
    yield replace(step, lines=(*step.lines, "ok    and so on"))
    for place, line in enumerate(step.lines):
        before, after = step.lines[:place], step.lines[place + 1 :]
        yield replace(step, lines=(*before, *after))
        for found in re.finditer(r"[\w.]+", line):
            if plain(line) != plain(changed := _changed(line, *found.span())):
                yield replace(step, lines=(*before, changed, *after))


def _changed(line: str, begin: int, end: int) -> str:
    word = line[begin:end]
    other = str(int(word) + 1) if word.isdigit() else word.swapcase() + "x"
    return line[:begin] + other + line[end:]


def test_a_transcript_that_was_changed_anywhere_fails(told: list[Step], real: list[Step]) -> None:
    count = 0
    for place, step in enumerate(told):
        for mutant in mutants(step):
            count += 1
            assert differences([*told[:place], mutant, *told[place + 1 :]], real) != []
    assert count > 300


def test_what_differs_from_day_to_day_may_differ() -> None:
    one = "ok  kit  sha256:3a177cb891fb... until 2027-11-26, 364 days, 76.7 GiB free"
    assert plain(one) == plain(one.replace("3a17", "ffff").replace("364", "12").replace("76", "5"))
    assert plain("2 rows") != plain("3 rows")
    assert plain("epsilon 2.9999") != plain("epsilon 3.9999")


def test_a_command_that_is_not_ours_is_not_run(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="rm"):
        played([Step(command="rm -r /srv/fl", lines=())], tmp_path)
    assert os.listdir(tmp_path) == []
