"""The fault list: which test covers which fault of the reliability plan, and what none covers.

Numbers and faults are those of the plan's tests 1 to 34, 41 and 42. Tests named here that are not
found fail this file; a fault that loses its test is to say so in `LACKS`.
"""

import ast
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intramural.client.audit import AuditLog
from intramural.core.config import check_config, load_config
from intramural.core.errors import ConfigError, JournalError
from intramural.core.federation import FederationConfig
from intramural.core.files import write_json
from intramural.core.journal import Journal, scan
from intramural.core.site import SiteConfig
from intramural.server.checkpoint import save_checkpoint
from intramural.server.orders import MANIFEST, Order
from intramural.server.standing import verify_run
from intramural.strategies.fedavg import FedAvg
from intramural.trust.envelope import MANIFEST_TYPE, sign
from intramural.trust.keys import public_bytes
from tests.rounds import faults_of_runs, faults_of_trust
from tests.rounds.faults_of_runs import Fault
from tests.server.fakes import small, start
from tests.source import ROOT
from tests.strategies.updates import run_round, update
from tests.tiny import table
from tests.trust.members import signing_key

FAULTS: dict[int, Fault] = {**faults_of_runs.FAULTS, **faults_of_trust.FAULTS}
LACKS: dict[int, str] = {**faults_of_runs.LACKS, **faults_of_trust.LACKS}


@cache
def names_in(file: str) -> frozenset[str]:
    """Return the test functions that a file defines."""
    tree = ast.parse((ROOT / file).read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def test_every_fault_of_the_plan_is_on_the_list() -> None:
    assert set(FAULTS) == {*range(1, 35), 41, 42}
    assert set(LACKS) <= set(FAULTS)
    assert all(LACKS.get(number) for number, (_, tests) in FAULTS.items() if not tests)


@pytest.mark.parametrize("number", FAULTS)
def test_the_tests_on_the_list_exist(number: int) -> None:
    for node in FAULTS[number][1]:
        file, name = node.split("::")
        assert name in names_in(file), node


def refuses(*_: Any) -> None:
    raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("open_", [Journal, AuditLog])
def test_a_disk_that_neither_syncs_nor_takes_back_spoils_no_journal(
    tmp_path: Path, open_: Callable[[Path], Journal | AuditLog]
) -> None:
    path = tmp_path / "journal.jsonl"
    journal = open_(path)
    journal.append("first")
    file = journal if isinstance(journal, Journal) else journal._journal
    assert file is not None
    whole, raw = path.read_bytes(), file._file

    class Stuck:
        """A file that can be written to, and not cut."""

        truncate = refuses

        def __getattr__(self, name: str) -> Any:
            return getattr(raw, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", refuses)
        patch.setattr(file, "_file", Stuck())
        with pytest.raises(JournalError, match="cannot write: Input/output error"):
            journal.append("second")
    assert path.read_bytes() != whole  # what was written of it is still there
    journal.append("third")
    journal.close()
    assert [entry.kind for entry in scan(path).entries] == ["first", "third"]


def test_a_run_that_fell_back_to_the_generation_before_can_be_verified(tmp_path: Path) -> None:
    config = small()
    manifest = config.manifest().encode()
    write_json(tmp_path / MANIFEST, sign(MANIFEST_TYPE, manifest, signing_key("coordinator")))
    journal = Journal(tmp_path / "journal.jsonl")
    for kind, round_ in (("committed", 1), ("committed", 2), ("resumed", 1), ("committed", 2)):
        journal.append(kind, round=round_, sites=["site-1"])
    journal.close()
    save_checkpoint(tmp_path / "checkpoints", replace(start(config), round=2))
    key = public_bytes(signing_key("coordinator"))
    found = verify_run(Order(folder=tmp_path), key=key)
    assert (found["rounds"], found["repeated"]) == (2, [2])


def test_zeros_with_a_sign_and_denormals_are_numbers() -> None:
    tiny = float(np.float32(1e-45))  # the smallest denormal
    updates = [update([-0.0, tiny, 1.0], site="a"), update([0.0, -tiny, 2.0], site="b")]
    for order in (updates, updates[::-1]):
        vector, _ = run_round(FedAvg(), {}, np.zeros(3, dtype=np.float32), order)
        assert vector.tolist() == [0.0, 0.0, 1.5]


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
@pytest.mark.parametrize("model", [FederationConfig, SiteConfig])
def test_any_bytes_are_a_configuration_or_a_typed_error(
    tmp_path_factory: pytest.TempPathFactory, model: Any, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError):  # no such table was ever guessed
        load_config(path, model)


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_any_value_in_a_manifest_is_taken_or_a_typed_error(data: st.DataObject) -> None:
    content = json.loads(check_config(table(Path("base")), FederationConfig, source="t").manifest())
    section = data.draw(st.sampled_from(sorted(content)))
    keys = sorted(content[section]) if isinstance(content[section], dict) else []
    value, within = data.draw(ANYTHING), data.draw(st.sampled_from([*keys, None]))
    if within is None:
        content[section] = value
    else:
        content[section][within] = value
    with suppress(ConfigError):
        federation = check_config(content, FederationConfig, source="manifest")
        assert json.loads(federation.manifest())


@settings(max_examples=300, deadline=None)
@given(tail=st.binary(max_size=200) | ANYTHING.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_journal_or_a_typed_error(
    tmp_path_factory: pytest.TempPathFactory, tail: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.unlink(missing_ok=True)
    journal = Journal(path)
    journal.append("first")
    journal.close()
    with open(path, "ab") as file:
        file.write(tail)
    try:
        kinds = [entry.kind for entry in scan(path).entries]
    except JournalError as error:
        kinds = ["first"] if "entry 1" in str(error) else []
    assert kinds == ["first"]


WORK = """
import json, sys
calls = []

def hear(event, args):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        calls.append([event, str(args[:1])])
    if event == "socket.connect" and isinstance(args[1], tuple):
        calls.append([event, str(args[1])])

sys.addaudithook(hear)
from pathlib import Path
from intramural.client.desk import open_desk
from tests.client.member import PRIVATE, member
from tests.tiny_models import save_bert

home = Path(sys.argv[1])
of = member(home, save_bert(home), **PRIVATE)
of.approve()
desk = open_desk(of.site_file)
asked = of.hello(), of.train()
replies = [type(of.read(desk.answer(of.envelope, one), one)).__name__ for one in asked]
desk.close()
print(json.dumps([replies, calls]))
"""


def test_a_site_at_work_calls_nobody(tmp_path: Path) -> None:
    """Greeted, approved and trained under privacy, in the environment that `client up` sets."""
    from intramural.client.up import ENVIRONMENT

    done = subprocess.run(
        [sys.executable, "-c", WORK, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    replies, calls = json.loads(done.stdout.splitlines()[-1])
    assert replies == ["Welcome", "Update"]
    assert calls == []
