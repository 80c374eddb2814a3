"""Leak hunt: what a site's records hold is found nowhere but in the site's records."""

import hashlib
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from transformers import AutoTokenizer

from intramural.core.journal import Entry, scan
from intramural.server.orders import Order
from intramural.simulations.loopback import await_end, await_true
from tests.rounds.leak_canaries import OVERLAP_BYTES, PIECE_BYTES, Canaries, new_canaries, told
from tests.rounds.leak_hunt import CANARIES, FIRST, RECORDS, SITES, SPOILT, Hunt, Json, hunting

RUN_S, REFUSAL_S = 300.0, 120.0
DONE = {"error": None, "exit_code": 0}
PRIVATE: dict[str, Json] = {
    "privacy": {
        "unit": "person",
        "noise_multiplier": 1.0,
        "delta": 1e-5,
        "clip_norm": 1.0,
        "nominal_records": 60,
        "nominal_persons": 60,
        "records_per_person": 1,
    },
    "strategy": {"weights": "equal"},
}


@pytest.fixture(scope="module")
def canaries(bert: Path) -> Canaries:
    return new_canaries(CANARIES, AutoTokenizer.from_pretrained(bert))


def test_the_search_finds_a_canary_in_every_form(canaries: Canaries, tmp_path: Path) -> None:
    assert len(set(canaries.words)) == CANARIES
    file = tmp_path / "planted"
    for word in canaries.words:
        forms, stems = canaries.forms(word), canaries.forms(canaries.stem)
        assert [form for form in forms if stems[form] not in forms[form]] == []
    planted = canaries.forms(canaries.words[7])
    planted["SHA-256"] = hashlib.sha256(canaries.words[7].encode()).hexdigest().encode()
    for form, needle in planted.items():
        file.write_bytes(b"x" * 1001 + needle + b"x" * 77)
        assert form in [hit.form for hit in canaries.search_file(file)], form
    file.write_bytes(b"x" * (PIECE_BYTES - 5) + canaries.words[7].encode())
    assert len(canaries.words[7].encode()) < OVERLAP_BYTES
    assert [hit.form for hit in canaries.search_file(file)] != []  # across two pieces
    file.write_bytes(os.urandom(1 << 22) + json.dumps(list(range(3000))).encode())
    assert canaries.search_file(file) == []
    named = tmp_path / canaries.words[0].partition("/")[0]
    assert canaries.search(str(named).encode(), where="") == []  # half a stem is no stem


def entries(order: Order) -> list[Entry]:
    return list(scan(order.folder / "journal.jsonl").entries)


def site_entries(hunt: Hunt, kind: str) -> list[Entry]:
    journal = hunt.records.parent / "state" / "journal.jsonl"
    return [entry for entry in scan(journal).entries if entry.kind == kind]


def assert_captured(hunt: Hunt) -> None:
    """Check that the captures hold what passed: else that nothing is in them says nothing."""
    for name, tap in hunt.net.taps.items():
        up, down = tap.said("up"), tap.said("down")
        asked, answered = (up, down) if name.endswith("-worker") else (down, up)
        if name == "superlink":  # dialled by the coordinator's gate, for both sites
            assert b"POST /v1/fleet/push-object" in up
        assert re.search(rb'"kind\\?":\\?"TrainRequest', asked), name  # JSON, or JSON in JSON
        assert re.search(rb'"kind\\?":\\?"Update', answered), name


def assert_clean(hunt: Hunt) -> None:
    hits = hunt.search()
    assert not hits, told(hits)
    print(f"\n{len(hunt.searched)} files, {sum(hunt.searched.values())} bytes, no canary")


def test_no_canary_leaves_its_site(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> None:
    with hunting(tmp_path_factory.mktemp("leak"), bert) as hunt:
        order = hunt.run(bert, name="plain", evaluation={"every": 0})
        assert await_end(order, RUN_S) == DONE
    assert_captured(hunt)
    assert_clean(hunt)


@contextmanager
def strict(hunt: Hunt) -> Iterator[None]:
    """Have the first site up, within the block, with a site.toml that takes no bad row."""
    file = hunt.net.site_file(FIRST)
    before = file.read_text()
    hunt.net.stop(FIRST)
    file.write_text(before.replace("[data]\n", "[data]\nstrict = true\n"))
    hunt.net.start(FIRST)
    try:
        yield
    finally:
        hunt.net.stop(FIRST)
        file.write_text(before)
        hunt.net.start(FIRST)


@pytest.mark.slow
def test_no_canary_leaves_its_site_whatever_goes_wrong(
    tmp_path_factory: pytest.TempPathFactory, bert: Path
) -> None:
    before = set(Path.cwd().iterdir())
    with hunting(tmp_path_factory.mktemp("leak"), bert) as hunt:
        check_crashes(hunt, bert)
        assert await_end(hunt.run(bert, name="private", **PRIVATE), RUN_S) == DONE
        check_overflow(hunt, bert)
        with strict(hunt):
            check_strict(hunt, bert)
        check_commands(hunt)
        assert_captured(hunt)
        assert_clean(hunt)
        assert list(hunt.folder.rglob("core*")) == []
        assert {path.name for path in set(Path.cwd().iterdir()) - before} == set()
        check_hunt_finds(hunt, bert)


def check_crashes(hunt: Hunt, bert: Path) -> None:
    """Have an exception quote a record, and then the worker end itself with all in memory."""
    pid = hunt.net.pid(FIRST, "worker")
    assert pid is not None
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    assert psutil.Process(hunt.net.running[FIRST].pid).rlimit(psutil.RLIMIT_CORE) == (hard, hard)
    assert psutil.Process(pid).rlimit(psutil.RLIMIT_CORE) == (0, 0)
    hunt.fault("raise", "abort")
    order = hunt.run(bert, name="crashes", federation={"name": "crashes", "rounds": 2})
    assert await_end(order, RUN_S) == DONE
    refused = [entry.body for entry in entries(order) if entry.kind == "refused"]
    assert [body["reason"] for body in refused] == ["internal"]
    assert refused[0]["detail"] == "ValueError; see the site's own log"
    children = json.loads((hunt.records.parent / "state" / "children.json").read_text())
    assert next(row for row in children["children"] if row["name"] == "worker")["deaths"] == 1


def check_overflow(hunt: Hunt, bert: Path) -> None:
    """Have training run into numbers that are none."""
    order = hunt.run(bert, name="overflow", training={"learning_rate": 1e30, "local_steps": 4})
    outcome = await_end(order, RUN_S)
    assert outcome["exit_code"] == 1
    reasons = {entry.body["reason"] for entry in entries(order) if entry.kind == "refused"}
    assert reasons == {"training"}


def check_strict(hunt: Hunt, bert: Path) -> None:
    """Have the site refuse its own bad rows, with a reason that travels."""
    order = hunt.run(bert, name="strict")

    def is_told() -> bool:
        return any(entry.body["reason"] == "data" for entry in site_entries(hunt, "refused"))

    await_true(is_told, REFUSAL_S, what="a refusal for a bad row")
    now = order.folder / "now.json"

    def is_noted() -> bool:
        return now.is_file() and f"line {RECORDS + 1}" in now.read_text()

    await_true(is_noted, REFUSAL_S, what="the row's place at the coordinator")
    order.want(wanted=False)


def check_commands(hunt: Hunt) -> None:
    """Keep what the site's own commands say of its records."""
    site = str(hunt.net.site_file(FIRST))
    for words in (("check", site), ("check", site, "--json"), ("log", site), ("verify", site)):
        with open(hunt.folder / f"{words[0]}-{len(words)}.txt", "wb") as file:
            command = [sys.executable, "-m", "intramural", "client", *words]
            env = {**os.environ, **hunt.net.environment}
            subprocess.run(command, stdout=file, stderr=file, env=env, check=False, timeout=120)
    assert f"{SPOILT}" in (hunt.folder / "check-2.txt").read_text()


def check_hunt_finds(hunt: Hunt, bert: Path) -> None:
    """Have a record told in a refusal, then logged: each is found at every place it came to."""
    hunt.fault("tell", "log")
    order = hunt.run(bert, name="told", evaluation={"every": 0})
    assert await_end(order, RUN_S) == DONE
    found = told(hunt.search())
    places = {str(Path(place).relative_to(hunt.folder)) for place in found}
    state = f"net/{FIRST}/state"
    for expected in (f"{state}/logs/worker.log", "net/coordinator/runs/told/journal.jsonl"):
        assert expected in places
    for begin in (f"captures/{FIRST}/", f"captures/{FIRST}-worker/", "captures/superlink/"):
        assert [place for place in places if place.startswith(begin)], begin
    assert not [place for place in places if place.startswith(f"captures/{SITES[1]}")]
