"""Approval: no crash, no hand-made file and no other process approves anything."""

import json
import multiprocessing
from pathlib import Path

import pytest

from intramural.client.approval import WAITING_MAX, Approvals
from intramural.client.audit import AuditLog
from intramural.core.errors import AwaitsApproval, JournalError, Refused, TrustError
from intramural.core.files import exclusive
from intramural.core.journal import Journal
from intramural.core.site import SitePolicy
from tests.client.approvals import NOW, ask, kinds, made, place_of, proposed, store
from tests.client.envelopes import envelope_of


def test_an_envelope_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    approvals, config = store(tmp_path), made()
    other = envelope_of(made(federation={"seed": 8}))
    with pytest.raises(Refused, match="not what its envelope holds"):
        approvals.admit(other, config)
    for text in ("", "{}", '{"payload": 3}', "[]", '{"payload": "?"}'):
        with pytest.raises(TrustError):
            approvals.admit(text, config)
    with pytest.raises(Refused, match="too long"):
        approvals.admit(envelope_of(config) + " " * (1 << 20), config)
    assert list(tmp_path.iterdir()) == []


def test_a_file_put_into_approved_by_hand_approves_nothing(tmp_path: Path) -> None:
    approvals, config = store(tmp_path), made()
    digest = proposed(approvals, config)
    pending = tmp_path / "pending" / f"{digest[7:]}.json"
    by_hand = tmp_path / "approved" / pending.name
    by_hand.parent.mkdir()
    by_hand.write_bytes(pending.read_bytes())
    proposed(approvals, config)
    assert place_of(tmp_path, digest) == ["pending"]


def test_an_approved_file_that_was_changed_is_refused(tmp_path: Path) -> None:
    approvals, config, other = store(tmp_path), made(), made(training={"batch_size": 9})
    digest = proposed(approvals, config)
    approvals.approve(digest, by="Ada")
    path = tmp_path / "approved" / f"{digest[7:]}.json"
    whole = json.loads(path.read_text())
    ask(approvals, config)
    path.write_text(json.dumps(whole | {"envelope": envelope_of(other)}))
    with pytest.raises(Refused, match=r"approved/[0-9a-f]{64}\.json holds another manifest"):
        ask(approvals, config)
    for broken in ("", "[]", "{}", json.dumps(whole | {"envelope": "x"})):
        path.write_text(broken)
        with pytest.raises(Refused, match="changed by hand"):
            ask(approvals, config)
    path.write_text(json.dumps(whole))
    ask(approvals, config)


def test_a_changed_file_that_waits_cannot_be_approved(tmp_path: Path) -> None:
    approvals, other = store(tmp_path), made(training={"batch_size": 9})
    digest = proposed(approvals, made())
    path = tmp_path / "pending" / f"{digest[7:]}.json"
    content = json.loads(path.read_text()) | {"envelope": envelope_of(other)}
    path.write_text(json.dumps(content))
    with pytest.raises(Refused, match="holds another manifest"):
        approvals.approve(digest, by="Ada")
    assert kinds(tmp_path) == ["proposed"]


def test_an_approved_file_that_was_taken_away_is_no_longer_approved(tmp_path: Path) -> None:
    approvals, config = store(tmp_path), made()
    digest = proposed(approvals, config)
    approvals.approve(digest, by="Ada")
    (tmp_path / "approved" / f"{digest[7:]}.json").unlink()
    proposed(approvals, config)
    proposed(approvals, config)
    assert kinds(tmp_path) == ["proposed", "approved", "proposed"]


def test_a_decision_whose_move_a_crash_cut_off_holds(tmp_path: Path) -> None:
    approvals, config = store(tmp_path), made()
    digest = proposed(approvals, config)
    # what `approve` leaves when it dies after the journal and before the move
    journal = Journal(tmp_path / "journal.jsonl", now=NOW)
    journal.append("approved", manifest=digest, run="tiny", by=["Ada"], why="people")
    journal.close()
    assert place_of(tmp_path, digest) == ["pending"]
    ask(store(tmp_path), config)
    assert place_of(tmp_path, digest) == ["approved"]
    journal = Journal(tmp_path / "journal.jsonl", now=NOW)
    journal.append("refused-by-people", manifest=digest, run="tiny", by=["Ada"])
    journal.close()
    with pytest.raises(Refused, match="the site's people refused"):
        ask(approvals, config)


def test_a_proposal_that_a_crash_left_without_its_file_gets_it(tmp_path: Path) -> None:
    approvals, config = store(tmp_path), made()
    journal = Journal(tmp_path / "journal.jsonl", now=NOW)
    journal.append("proposed", manifest=config.digest, run="tiny")
    journal.close()
    digest = proposed(approvals, config)
    assert kinds(tmp_path) == ["proposed"]
    assert approvals.approve(digest, by="Ada")


def test_without_its_journal_nothing_is_approved(tmp_path: Path) -> None:
    approvals, config = store(tmp_path), made()
    approvals.approve(proposed(approvals, config), by="Ada")
    ask(approvals, config)
    path = tmp_path / "journal.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"Ada"', b'"Eve"'))
    with pytest.raises(JournalError, match="entry 1 was altered"):
        ask(approvals, config)
    path.unlink()
    proposed(approvals, config)


def test_manifests_do_not_fill_the_disk(tmp_path: Path) -> None:
    approvals = store(tmp_path)
    for seed in range(WAITING_MAX):
        proposed(approvals, made(federation={"seed": seed}))
    with pytest.raises(Refused, match=f"{WAITING_MAX} manifests wait") as caught:
        ask(approvals, made(federation={"seed": WAITING_MAX}))
    assert not isinstance(caught.value, AwaitsApproval)
    proposed(approvals, made(federation={"seed": 0}))  # one that waits already goes on waiting
    approvals.refuse(made(federation={"seed": 0}).digest, by="Ada")
    proposed(approvals, made(federation={"seed": WAITING_MAX}))


def test_a_store_that_another_process_holds_is_told_as_such(tmp_path: Path) -> None:
    approvals = store(tmp_path)
    proposed(approvals, made())
    with (
        exclusive(tmp_path / "journal.jsonl.lock"),
        pytest.raises(JournalError, match="another process held it"),
    ):
        Approvals(
            tmp_path,
            policy=SitePolicy(),
            journal=tmp_path / "journal.jsonl",
            lock_wait_s=0.05,
        ).proposals()


def propose_many(folder: Path, first: int) -> None:
    """Run in a process of its own: propose ten manifests."""
    approvals = store(folder)
    for seed in range(first, first + 10):
        proposed(approvals, made(federation={"seed": seed}))


def test_processes_take_turns_at_one_journal_with_the_audit_log(tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "journal.jsonl")
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=propose_many, args=(tmp_path, 10 * n)) for n in range(2)]
    for process in others:
        process.start()
    for _ in range(20):
        audit.append("sent", bytes=1)
    for process in others:
        process.join(60)
        assert process.exitcode == 0
    audit.close()
    assert sorted(kinds(tmp_path)) == ["proposed"] * 20 + ["sent"] * 20
    assert len(store(tmp_path).proposals("pending")) == 20
