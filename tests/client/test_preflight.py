"""Preflight: each thing that would keep a site out, found and named, and its positive twin."""

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import typer
from click.testing import Result
from typer.testing import CliRunner

from intramural.client.check_cli import client_check_command
from intramural.core.site import load_site
from intramural.privacy.ledger import Ledger
from tests.client.envelopes import PRIVACY
from tests.client.preflights import DAY, NOW, SECRET, checks, only, own, states
from tests.privacy.ledgers import charge, clock
from tests.tiny import Json, federation, rows, table

APP = typer.Typer()
APP.command()(client_check_command)


def test_a_site_that_fits_fails_no_check(tmp_path: Path, bert: Path) -> None:
    found = states(checks(own(tmp_path), federation(bert)))
    assert found.pop("keys") == found.pop("kit") == "warn"  # not joined yet
    assert found == dict.fromkeys(
        ("data file", "columns", "rows", "labels", "splits", "model", "memory", "ledger", "policy",
         "disk"), "ok"
    )  # fmt: skip


def test_without_a_federation_what_depends_on_none_is_checked(tmp_path: Path, bert: Path) -> None:
    found = checks(own(tmp_path, model={"tiny": str(bert)}))
    assert {"data file", "columns", "rows", "model", "ledger", "disk"} <= set(found)
    assert not {"labels", "splits", "policy", "memory", "cost"} & set(found)
    assert only(checks(own(tmp_path / "none")), "model").told == "no base model is named"


@pytest.mark.parametrize(
    ("data", "name", "words"),
    [
        ({"path": "none.jsonl"}, "data file", "no such file"),
        ({"path": "."}, "data file", "is a folder"),
        ({"path": "site.toml"}, "data file", "is of no known format"),
        ({"text": "note"}, "columns", "column 'note' is missing"),
        ({"label": "nothing"}, "columns", "column 'nothing' is missing"),
    ],
)
def test_records_that_cannot_be_read(tmp_path: Path, data: Json, name: str, words: str) -> None:
    found = only(checks(own(tmp_path, data=data), federation(Path("base"))), name)
    assert found.state == "fail"
    assert words in found.told
    assert found.remedy


def test_a_column_to_learn_must_be_named(tmp_path: Path) -> None:
    place = own(tmp_path)
    generation = federation(Path("base"), task={"kind": "generation", "labels": []})
    assert only(checks(place, generation), "columns").told == "no column to learn is named"
    assert only(checks(place, federation(Path("base"))), "columns").state == "ok"


def test_bad_rows_are_counted_by_reason_and_never_shown(tmp_path: Path) -> None:
    bad = [{"title": SECRET, "chapter": ""}, {"title": "", "chapter": SECRET}]
    place = own(tmp_path, [*rows()[:40], *bad])
    found = only(checks(place, federation(Path("base"))), "rows")
    assert found.state == "warn"
    assert found.told.startswith("40 of 42 rows can be used; left out: 1 with column ")
    assert found.remedy == "fill it in"
    strict = own(tmp_path / "strict", [*rows()[:40], *bad], data={"strict": True})
    assert only(checks(strict, federation(Path("base"))), "rows").state == "fail"


def test_unknown_labels_are_counted_and_never_named(tmp_path: Path) -> None:
    odd = [{"title": f"{SECRET} {n}", "chapter": f"{SECRET} {n % 2}"} for n in range(4)]
    place = own(tmp_path, [*rows()[:40], *odd])
    found = only(checks(place, federation(Path("base"))), "labels")
    assert found.state == "warn"
    assert "4 of the federation's 4 labels occur; 4 rows have one of 2 unknown labels" in found.told
    alone = own(tmp_path / "alone", odd)
    assert only(checks(alone, federation(Path("base"))), "labels").state == "fail"
    strict = own(tmp_path / "strict", [*rows()[:40], *odd], data={"strict": True})
    assert only(checks(strict, federation(Path("base"))), "labels").state == "fail"


def test_splits_and_sizes_are_told_to_the_site(tmp_path: Path) -> None:
    config = federation(Path("base"))
    counts = only(checks(own(tmp_path), config), "splits").told
    parts = {word.split()[0]: int(word.split()[1]) for word in counts.split(", ")}
    assert sum(parts.values()) == 40
    one = own(tmp_path / "one", rows()[:1])
    assert only(checks(one, config), "splits").state == "fail"
    least: dict[str, Any] = {"policy": {"records_min": parts["train"]}}
    assert "records" not in checks(own(tmp_path / "enough", **least), config)
    least["policy"]["records_min"] += 1
    found = only(checks(own(tmp_path / "few", **least), config), "records")
    assert (found.state, f"{parts['train']} training records" in found.told) == ("fail", True)


def test_a_public_count_far_above_the_sites_own_is_told(tmp_path: Path) -> None:
    place = own(tmp_path)
    equal = {"weights": "equal"}
    far, near = (
        federation(Path("base"), strategy=equal, privacy=PRIVACY | {"nominal_records": count})
        for count in (2000, 20)
    )
    assert "far above" in only(checks(place, far), "records").told
    assert "records" not in checks(place, near)


def test_the_model_is_found_and_its_digest_compared(tmp_path: Path, bert: Path) -> None:
    place = own(tmp_path, model={"tiny": str(bert)})
    config = federation(Path("tiny"))
    found = only(checks(place, config), "model")
    assert "the federation names no digest" in found.told
    digest = found.told.split("digest ")[1].split()[0]
    same, other = (
        federation(Path("tiny"), model={"digest": one}) for one in (digest, "sha256:" + "0" * 64)
    )
    assert "as wanted" in only(checks(place, same), "model").told
    assert only(checks(place, other), "model").state == "fail"
    nowhere = only(checks(place, federation(Path("hub/name"))), "model")
    assert nowhere.state == "warn"
    assert "the Hugging Face hub would be asked" in nowhere.told
    (tmp_path / "empty").mkdir()
    empty = own(tmp_path / "b", model={"tiny": str(tmp_path / "empty")})
    assert "no config.json" in only(checks(empty, config), "model").told


def test_a_device_that_is_not_here_fails_and_the_other_checks_go_on(
    tmp_path: Path, bert: Path
) -> None:
    found = checks(own(tmp_path, compute={"device": "cuda:9"}), federation(bert))
    assert [check.state for check in found["model"]] == ["ok", "fail"]
    assert "is not on this machine" in found["model"][1].told
    assert only(found, "policy").state == "ok"


def test_memory_that_does_not_suffice_is_told(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import intramural.models.footprint as footprint

    table_ = tmp_path / "meminfo"
    monkeypatch.setattr(footprint, "MEMORY_FILE", table_)
    place = own(tmp_path)
    for available, state in ((1, "fail"), (1 << 20, "ok")):
        table_.write_text(f"MemAvailable: {available} kB\n")
        assert only(checks(place, federation(bert)), "memory").state == state
    table_.unlink()
    assert "free: unknown" in only(checks(place, federation(bert)), "memory").told


def ledger_of(place: Path, **changes: Any) -> Ledger:
    config = load_site(place)
    names = {"site": config.site.name, "data": config.data_name}
    ledger = Ledger(config.ledger_file, now=clock(), **names | changes)
    ledger.charge(charge(steps=2000), epsilon_lifetime=None, delta=1e-5)
    return ledger


def test_the_ledger_is_read_and_what_is_left_told(tmp_path: Path) -> None:
    place = own(tmp_path, policy={"epsilon_lifetime": 8.0})
    assert "none yet for data set 'records'" in only(checks(place), "ledger").told
    before = ledger_of(place).path.read_bytes()
    found = only(checks(place), "ledger")
    assert found.state == "ok"
    assert "1 charges, epsilon 2.58" in found.told  # 2.584 (dp-accounting)
    assert "of 8, for one record (add-remove)" in found.told
    assert load_site(place).ledger_file.read_bytes() == before
    spent = own(tmp_path / "spent", policy={"epsilon_lifetime": 2.0})
    ledger_of(spent)
    assert only(checks(spent), "ledger").state == "fail"
    unlimited = own(tmp_path / "unlimited")
    ledger_of(unlimited)
    assert only(checks(unlimited), "ledger").state == "warn"


def test_a_ledger_that_is_gone_broken_or_anothers_fails(tmp_path: Path) -> None:
    other = own(tmp_path / "other")
    ledger_of(other, data="notes")
    assert "is of data set 'notes'" in only(checks(other), "ledger").told
    place = own(tmp_path)
    path = ledger_of(place).path
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"steps":2000', b'"steps":1'))
    assert "entry 1 was altered" in checks(place)["ledger"][0].told
    path.unlink()
    assert "knows that there was one" in only(checks(place), "ledger").told
    path.write_bytes(whole)
    assert only(checks(place), "ledger").state == "warn"  # whole, and no limit is set


def test_a_clock_behind_the_ledger_fails(tmp_path: Path) -> None:
    place = own(tmp_path)
    ledger_of(place)  # of 2026-11-22
    assert "clock" not in checks(place)
    found = only(checks(place, now=NOW - 30 * DAY), "clock")
    assert (found.state, found.remedy) == ("fail", "set this machine's clock")


def test_the_policy_is_held_against_the_federation(tmp_path: Path) -> None:
    place = own(tmp_path, policy={"cohort_min": 3, "tasks": ["generation"]})
    found = checks(place, federation(Path("base")))["policy"]
    assert [check.state for check in found] == ["fail", "fail"]
    assert "policy.cohort_min" in found[1].told
    private = federation(Path("base"), strategy={"weights": "equal"}, privacy=PRIVACY)
    cost = only(checks(own(tmp_path / "private"), private), "cost")
    assert "at delta 1e-05 for one record (add-remove, Poisson sampling)" in cost.told


def call(*words: object) -> Result:
    return CliRunner().invoke(APP, [str(word) for word in words], catch_exceptions=False)


def test_the_command_prints_a_line_a_check_and_ends_with_1_when_one_failed(
    tmp_path: Path, bert: Path
) -> None:
    place = own(tmp_path)
    shared = tmp_path / "federation.toml"
    shared.write_text(tomli_w.dumps(table(bert)))
    found = call(place, "--federation", shared)
    assert found.exit_code == 0
    assert "ok    data file" in found.output
    assert "WARN  keys" in found.output
    printed = json.loads(call(place, "--federation", shared, "--json").output)
    assert (printed["site"], printed["ok"]) == ("st-elsewhere", True)
    assert {"name", "state", "told", "remedy"} == set(printed["checks"][0])
    load_site(place).data.path.unlink()
    found = call(place, "--federation", shared)
    assert found.exit_code == 1
    assert "FAIL  data file" in found.output
    assert json.loads(call(place, "--json").output)["ok"] is False


def test_nothing_is_written(tmp_path: Path, bert: Path) -> None:
    place = own(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    private = federation(bert, strategy={"weights": "equal"}, privacy=PRIVACY)
    checks(place, private)
    assert sorted(tmp_path.rglob("*")) == before
