"""Sites that fail, refuse or lag: a quorum goes on without them."""

from pathlib import Path

import pytest
from flwr.app import Message

from intramural.core.errors import RoundError
from intramural.core.journal import scan
from tests.rounds.runs import run
from tests.tiny import federation, rows, site, sites


def fail_at(node: int, kind: str = "train") -> object:
    """Return a fault: this node's app raises, as a killed process looks to Flower."""

    def before(message: Message) -> None:
        if message.metadata.dst_node_id == node and message.metadata.message_type == kind:
            raise ConnectionError("gone")

    return before


def test_a_site_that_fails_is_left_out_and_told(tmp_path: Path, bert: Path) -> None:
    config = federation(bert, sites={"min": 3, "quorum": 0.6})
    folder = sites(tmp_path / "sites", 3)
    report = run(tmp_path / "run", config, folder, before=fail_at(2))  # type: ignore[arg-type]
    for record in report["rounds"]:
        assert record["sites"] == ["site-1", "site-3"]
        assert record["refusals"] == {"flower-2": 1}
    assert set(report["final"]["own_test"]) == {"site-1", "site-2", "site-3"}


def test_a_site_that_cannot_evaluate_costs_its_numbers_alone(tmp_path: Path, bert: Path) -> None:
    config = federation(bert, sites={"min": 3})
    folder = sites(tmp_path / "sites", 3)
    report = run(tmp_path / "run", config, folder, before=fail_at(2, "evaluate"))  # type: ignore[arg-type]
    assert [record["sites"] for record in report["rounds"]] == [["site-1", "site-2", "site-3"]] * 2
    assert set(report["final"]["own_test"]) == {"site-1", "site-3"}


def test_a_slow_site_misses_rounds_and_its_late_updates_are_stale(
    tmp_path: Path, bert: Path
) -> None:
    config = federation(
        bert, sites={"min": 3, "quorum": 0.6, "deadline_s": 0.05}, federation={"rounds": 4}
    )
    folder = sites(tmp_path / "sites", 3)
    report = run(tmp_path / "run", config, folder, slow={2: 5})
    assert [record["sites"] for record in report["rounds"]] == [["site-1", "site-3"]] * 4
    late = [e.body for e in scan(tmp_path / "run" / "journal.jsonl").entries if e.kind == "refused"]
    assert {(body["site"], body["reason"]) for body in late} == {("site-2", "stale")}


def test_a_site_with_bad_records_refuses_with_the_line_and_not_the_record(
    tmp_path: Path, bert: Path
) -> None:
    folder = sites(tmp_path / "sites", 2)
    bad = [*rows()[:40], {"title": "CANARY-7f3a9c", "chapter": "CANARY-7f3a9c"}]
    site(folder, "site-3", bad, data={"strict": True})
    config = federation(bert, sites={"min": 3, "quorum": 0.6})
    with pytest.raises(RoundError, match=r"2 of 3 .*line 41, column 'chapter': unknown label") as e:
        run(tmp_path / "run", config, folder)
    assert e.value.exit_code == 1
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or b"CANARY-7f3a9c" not in path.read_bytes()


def test_sites_that_all_refuse_fail_the_run_and_leave_no_result(tmp_path: Path, bert: Path) -> None:
    folder = tmp_path / "sites"
    for number in (1, 2):
        site(folder, f"site-{number}", rows()[:40], policy={"records_min": 1000})
    with pytest.raises(RoundError, match=r"0 of 2 sites can take part .*records_min") as error:
        run(tmp_path / "run", federation(bert, sites={"min": 2}), folder)
    assert error.value.exit_code == 3  # rules said no, and nothing else was wrong
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"journal.jsonl", "run.lock"}


def test_a_policy_that_forbids_the_federation_is_named(tmp_path: Path, bert: Path) -> None:
    folder = sites(tmp_path / "sites", 1)
    site(folder, "site-2", rows()[:40], policy={"require_privacy": True})
    with pytest.raises(RoundError, match=r"1 of 2 sites can take part .*require_privacy is true"):
        run(tmp_path / "run", federation(bert, sites={"min": 2}), folder)
