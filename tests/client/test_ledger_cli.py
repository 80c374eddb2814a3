"""`intramural client ledger`: what it prints, and its exit codes."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from intramural.client.ledger_cli import ledger_app
from intramural.core.errors import ConfigError, LedgerError
from intramural.core.site import load_site
from intramural.privacy.accountant import ACCOUNTANT, BOUND, RECORD_INTERVAL, SECOND_OPINION
from intramural.privacy.charges import Charge
from intramural.privacy.kept import kept_beside
from intramural.privacy.ledger import Ledger
from tests.privacy.compositions import Count, forget_all
from tests.privacy.ledgers import charge, clock
from tests.tiny import rows, site

HEADINGS = ["run", "manifest", "rounds", "charges", "done", "failed", "steps"]


def call(*words: object) -> str:
    # `main` turns the errors raised here into a line and an exit code
    found = CliRunner().invoke(ledger_app, [str(word) for word in words], catch_exceptions=False)
    assert found.exit_code == 0
    return found.output


def written(place: Path, *charges: Charge) -> Ledger:
    """Write the ledger of a site.toml: each charge settled as done but the last."""
    own = load_site(place)
    ledger = Ledger(own.ledger_file, site=own.site.name, data=own.data_name, now=clock())
    for one in charges:
        seq = ledger.charge(one, epsilon_lifetime=None, delta=1e-5)
        if one is not charges[-1]:
            ledger.settle(seq, outcome="done")
    return ledger


@pytest.fixture
def place(tmp_path: Path) -> Path:
    policy = {"epsilon_lifetime": 8.0, "delta_lifetime": 1e-6}
    return site(tmp_path, "st-elsewhere", rows()[:2], policy=policy)


def two_runs() -> list[Charge]:
    other = charge(run="other", manifest="sha256:" + "2" * 64, noise_multiplier=2.0, steps=5)
    return [charge(steps=1000), charge(steps=1000, round=2), other]


def test_show_prints_charges_a_run_and_epsilon_with_its_meaning(place: Path) -> None:
    written(place, *two_runs())
    text = call("show", place, "--delta", "1e-5")
    lines = text.splitlines()
    assert "site 'st-elsewhere', data set 'records'" in lines[0]
    assert lines[1].split()[:7] == HEADINGS
    first, second = lines[2].split(), lines[3].split()
    assert first[:7] == ["icd-chapters", "sha256:111111111111", "2", "2", "2", "0", "2000"]
    assert first[7:] == ["0.01", "1", "1", "record", "add-remove", "aes-256-ctr"]
    assert second[:7] == ["other", "sha256:222222222222", "1", "1", "0", "0", "5"]
    # 2000 steps at rate 0.01, noise 1 are 2.584 (dp-accounting); five quiet steps add little
    assert "epsilon 2.58" in lines[4]
    meaning = "of 8 at delta 1e-05, all charges composed: unit record, relation add-remove, "
    assert f"{meaning}sampler poisson, accountant {ACCOUNTANT}" in lines[4]
    assert lines[5].startswith("claim: (2.58")


def test_show_reads_delta_from_the_site_and_prints_json(place: Path) -> None:
    ledger = written(place, *two_runs())
    found: dict[str, Any] = json.loads(call("show", place, "--json"))
    assert (found["site"], found["data"], found["entries"]) == ("st-elsewhere", "records", 6)
    assert (found["head"], found["epsilon_lifetime"]) == (ledger.head, 8.0)
    assert found["spent"]["delta"] == 1e-6
    assert found["spent"]["epsilon"] == ledger.epsilon(1e-6)
    assert [run["charges"] for run in found["runs"]] == [2, 1]
    bare = json.loads(call("show", ledger.path, "--json"))
    assert (bare["spent"]["delta"], bare["epsilon_lifetime"]) == (1e-5, None)


def test_a_cross_check_prints_two_more_accountants_by_name(place: Path) -> None:
    written(place, *two_runs())
    text = call("show", place, "--delta", "1e-5", "--cross-check")
    lines = [line for line in text.splitlines() if line.startswith("cross-check: ")]
    # 2000 steps at rate 0.01, noise 1: PRV 2.594, RDP 2.867 (shared/facts/dp.md, table 3.1)
    assert "cross-check: epsilon 2.59" in lines[0]
    assert f" by {SECOND_OPINION}, composed as add-remove" in lines[0]
    assert "cross-check: epsilon 2.86" in lines[1]
    assert f" by {BOUND}, composed as add-remove" in lines[1]
    found = json.loads(call("show", place, "--delta", "1e-5", "--cross-check", "--json"))
    prv, rdp = found["cross_check"]
    assert found["spent"]["epsilon"] < prv["epsilon"] < rdp["epsilon"]
    assert (prv["accountant"], rdp["accountant"]) == (SECOND_OPINION, BOUND)
    assert "cross_check" not in json.loads(call("show", place, "--json"))
    assert "cross-check" not in call("show", place)


def test_a_cross_check_without_an_answer_says_so(place: Path) -> None:
    written(place, charge(relation="replace-one"))
    text = call("show", place, "--cross-check")
    assert f"cross-check: no answer by {SECOND_OPINION}, composed as replace-one" in text
    found = json.loads(call("show", place, "--cross-check", "--json"))["cross_check"]
    assert [check["epsilon"] is None for check in found] == [True, False]


def test_a_cross_check_of_nothing_is_nothing(place: Path) -> None:
    written(place)
    assert "cross-check" not in call("show", place, "--cross-check")
    assert json.loads(call("show", place, "--cross-check", "--json"))["cross_check"] == []


def test_show_goes_by_what_is_kept_and_export_by_the_events(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = written(place, *two_runs())
    written(place)  # loaded again: what it composes is kept
    kept = kept_beside(ledger.path).read_bytes()
    forget_all()
    count = Count(monkeypatch)
    call("show", place)
    assert "repeated" not in count.taken(RECORD_INTERVAL)
    call("export", place)
    assert count.taken(RECORD_INTERVAL)["repeated"] == 2
    assert kept_beside(ledger.path).read_bytes() == kept


def test_show_of_a_seeded_charge_claims_nothing(place: Path) -> None:
    kind = "aes-256-ctr from a seed: NOT PRIVATE"
    written(place, charge(is_private=False, random=kind))
    text = call("show", place)
    assert "claim: none: seeded randomness" in text
    assert kind in text


def test_show_of_a_ledger_without_charges(place: Path) -> None:
    written(place)
    assert "nothing was charged: epsilon 0" in call("show", place)
    assert json.loads(call("show", place, "--json"))["runs"] == []


def test_verify_prints_entries_and_head(place: Path) -> None:
    ledger = written(place, charge())
    line = f"2 entries, 1 charges, whole; head {ledger.head}"
    assert call("verify", place).strip() == call("verify", ledger.path).strip() == line
    found = json.loads(call("verify", place, "--json", "--head", ledger.head))
    assert (found["entries"], found["head"]) == (2, ledger.head)


def test_verify_ends_with_1_when_the_ledger_is_broken_or_rolled_back(place: Path) -> None:
    ledger = written(place, *two_runs())
    whole = ledger.path.read_text()
    ledger.path.write_text(whole.replace('"steps":1000', '"steps":1', 1))
    with pytest.raises(LedgerError, match="entry 1 was altered") as broken:
        call("verify", place)
    ledger.path.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    assert "5 entries" in call("verify", place)
    with pytest.raises(LedgerError, match="not in its chain of 5 entries") as rolled_back:
        call("verify", place, "--head", ledger.head)
    assert broken.value.exit_code == rolled_back.value.exit_code == 1


def test_export_holds_every_charge(place: Path, tmp_path: Path) -> None:
    charges = two_runs()
    ledger = written(place, *charges)
    printed = json.loads(call("export", place))
    out = tmp_path / "out" / "ledger.json"
    assert call("export", place, "--out", out).strip() == str(out)
    assert json.loads(out.read_text()) == printed
    assert printed["head"] == ledger.head
    fields = charges[0].model_dump(mode="json")
    assert printed["events"][0] == fields | {
        "seq": 1,
        "time": "2026-11-22T09:01:00.000+00:00",
        "outcome": "done",
    }
    assert [event["outcome"] for event in printed["events"]] == ["done", "done", None]
    assert datetime.fromisoformat(printed["events"][-1]["time"]).tzinfo == UTC


@pytest.mark.parametrize("command", ["show", "verify", "export"])
def test_a_missing_ledger_is_wrong_use(place: Path, tmp_path: Path, command: str) -> None:
    for none in (place, tmp_path / "none.jsonl"):
        with pytest.raises(ConfigError, match="no such ledger") as found:
            call(command, none)
    assert found.value.exit_code == 2
    assert not load_site(place).ledger_file.exists()


def test_a_delta_that_is_none_is_wrong_use(place: Path) -> None:
    written(place, charge())
    for delta in ("0", "1", "nan"):
        with pytest.raises(ConfigError, match="--delta must be above 0 and below 1"):
            call("show", place, "--delta", delta)


def test_reading_takes_no_lock_and_changes_nothing(place: Path) -> None:
    ledger = written(place, charge())
    torn = ledger.path.read_bytes() + b'{"body":{"torn'
    ledger.path.write_bytes(torn)
    lock = ledger.path.with_name(f"{ledger.path.name}.lock")
    lock.unlink()
    for command in ("show", "verify", "export"):
        call(command, place)
    assert ledger.path.read_bytes() == torn
    assert not lock.exists()
    assert not kept_beside(ledger.path).exists()
