"""Approval: what the site's people let in, and what needs no asking."""

from pathlib import Path

import pytest

from intramural.core.errors import AwaitsApproval, ConfigError, Refused
from intramural.core.journal import scan
from tests.client.approvals import ask, kinds, made, place_of, proposed, store


def test_a_new_manifest_waits_and_is_journalled_once(tmp_path: Path) -> None:
    approvals, config = store(tmp_path), made()
    for _ in range(3):
        with pytest.raises(AwaitsApproval, match="intramural client approve tiny") as caught:
            ask(approvals, config)
    assert (caught.value.exit_code, caught.value.reason) == (3, "awaits-approval")
    assert kinds(tmp_path) == ["proposed"]
    assert place_of(tmp_path, config.digest) == ["pending"]
    (waiting,) = approvals.proposals("pending")
    assert (waiting.federation, waiting.by) == (config, ())
    assert waiting.first_seen.startswith("2026-11-22T")


def test_what_a_person_approved_is_admitted_by_every_process(tmp_path: Path) -> None:
    approvals, config = store(tmp_path), made()
    digest = proposed(approvals, config)
    assert store(tmp_path).approve(digest, by="Ada")  # the command line, another object
    ask(approvals, config)
    ask(store(tmp_path), config)
    assert kinds(tmp_path) == ["proposed", "approved"]
    body = scan(tmp_path / "journal.jsonl").entries[-1].body
    assert body == {"manifest": digest, "run": "tiny", "by": ["Ada"], "why": "people"}
    assert place_of(tmp_path, digest) == ["approved"]
    assert approvals.proposals("pending") == ()


def test_an_approval_is_of_one_manifest(tmp_path: Path) -> None:
    approvals = store(tmp_path)
    approvals.approve(proposed(approvals, made()), by="Ada")
    proposed(approvals, made(federation={"seed": 8}))


def test_what_people_refused_is_refused_until_they_think_again(tmp_path: Path) -> None:
    approvals, config = store(tmp_path), made()
    digest = proposed(approvals, config)
    approvals.refuse(digest, by="Ada")
    for _ in range(2):
        with pytest.raises(Refused, match="the site's people refused") as caught:
            ask(approvals, config)
        assert not isinstance(caught.value, AwaitsApproval)
    assert kinds(tmp_path) == ["proposed", "refused-by-people"]
    assert place_of(tmp_path, digest) == ["refused"]
    assert approvals.approve(digest, by="Ada")
    ask(approvals, config)


def test_an_approval_can_be_withdrawn(tmp_path: Path) -> None:
    approvals, config = store(tmp_path), made()
    digest = proposed(approvals, config)
    approvals.approve(digest, by="Ada")
    ask(approvals, config)
    approvals.refuse(digest, by="Grace")
    with pytest.raises(Refused, match="the site's people refused"):
        ask(approvals, config)
    assert approvals.last_approved("tiny") is None


def test_two_approvers_are_two_people(tmp_path: Path) -> None:
    approvals, config = store(tmp_path, approvers=2), made()
    digest = proposed(approvals, config)
    assert not approvals.approve(digest, by="Ada")
    with pytest.raises(AwaitsApproval, match="waits for a second approval"):
        ask(approvals, config)
    assert place_of(tmp_path, digest) == ["pending"]
    for same in ("Ada", "ada", " ADA ", "\uff21\uff44\uff41"):  # the last full-width
        with pytest.raises(Refused, match="the second approver is somebody else"):
            approvals.approve(digest, by=same)
    assert approvals.approve(digest, by="Grace")
    ask(approvals, config)
    assert kinds(tmp_path) == ["proposed", "approval", "approved"]
    assert scan(tmp_path / "journal.jsonl").entries[-1].body["by"] == ["Ada", "Grace"]


def test_a_second_approver_asked_for_later_is_needed_for_old_approvals_too(tmp_path: Path) -> None:
    config = made()
    digest = proposed(store(tmp_path), config)
    store(tmp_path).approve(digest, by="Ada")
    stricter = store(tmp_path, approvers=2)
    proposed(stricter, config)
    assert place_of(tmp_path, digest) == ["pending"]
    assert not stricter.approve(digest, by="Ada")
    assert stricter.approve(digest, by="Grace")
    ask(stricter, config)


def test_one_who_approved_under_two_can_approve_alone_once_one_suffices(tmp_path: Path) -> None:
    config = made()
    digest = proposed(store(tmp_path, approvers=2), config)
    assert not store(tmp_path, approvers=2).approve(digest, by="Ada")
    looser = store(tmp_path)
    proposed(looser, config)  # not by itself
    assert looser.approve(digest, by="Ada")
    ask(looser, config)


@pytest.mark.parametrize("name", ["", "   ", "a" * 65, "Ada\x1b[2J", "\u202eAda"])
def test_a_name_that_is_none_approves_nothing(tmp_path: Path, name: str) -> None:
    approvals = store(tmp_path)
    digest = proposed(approvals, made())
    for decide in (approvals.approve, approvals.refuse):
        with pytest.raises(ConfigError, match="--by"):
            decide(digest, by=name)
    assert kinds(tmp_path) == ["proposed"]


def test_what_does_not_wait_cannot_be_approved(tmp_path: Path) -> None:
    approvals = store(tmp_path)
    with pytest.raises(Refused, match="waits for no approval"):
        approvals.approve(made().digest, by="Ada")
    with pytest.raises(Refused, match="was never proposed"):
        approvals.refuse(made().digest, by="Ada")
    digest = proposed(approvals, made())
    approvals.approve(digest, by="Ada")
    with pytest.raises(Refused, match="waits for no approval"):
        approvals.approve(digest, by="Grace")


def test_same_shape_lets_in_beside_an_approved_manifest(tmp_path: Path) -> None:
    approvals = store(tmp_path, approve="same-shape")
    first, second = made(), made(federation={"seed": 8}, training={"learning_rate": 0.3})
    digest = proposed(approvals, first)  # nothing to compare it with: people decide
    approvals.approve(digest, by="Ada")
    ask(approvals, second)
    assert kinds(tmp_path) == ["proposed", "approved", "proposed", "approved"]
    body = scan(tmp_path / "journal.jsonl").entries[-1].body
    assert (body["why"], body["by"], body["like"]) == ("same-shape", [], digest)
    third = made(federation={"seed": 9})
    ask(approvals, third)  # beside the second, which nobody was asked about
    proposed(approvals, made(training={"batch_size": 9}))
    proposed(approvals, made(federation={"name": "other"}))


def test_ask_asks_even_for_a_harmless_change_and_of_what_same_shape_let_in(tmp_path: Path) -> None:
    loose, strict = store(tmp_path, approve="same-shape"), store(tmp_path)
    first, second = made(), made(federation={"seed": 8})
    loose.approve(proposed(loose, first), by="Ada")
    ask(loose, second)
    proposed(strict, second)
    ask(strict, first)
    last = strict.last_approved("tiny")
    assert last is not None
    assert last.digest == first.digest


def test_same_shape_never_lets_in_what_the_policy_refuses(tmp_path: Path) -> None:
    first, second = made(), made(federation={"seed": 8})
    loose = store(tmp_path, approve="same-shape")
    loose.approve(proposed(loose, first), by="Ada")
    proposed(store(tmp_path, approve="same-shape", cohort_min=2), second)
    ask(store(tmp_path, approve="same-shape", cohort_min=1), second)


def test_same_shape_does_not_follow_a_withdrawn_manifest(tmp_path: Path) -> None:
    approvals, first = store(tmp_path, approve="same-shape"), made()
    digest = proposed(approvals, first)
    approvals.approve(digest, by="Ada")
    approvals.refuse(digest, by="Ada")
    proposed(approvals, made(federation={"seed": 8}))


def test_a_manifest_is_found_by_its_name_or_its_digest(tmp_path: Path) -> None:
    approvals = store(tmp_path)
    first, second = made(), made(federation={"seed": 8})
    digest = proposed(approvals, first)
    assert approvals.find("tiny").digest == digest
    for prefix in (digest, digest[7:], digest[7:15]):
        assert approvals.find(prefix).digest == digest
    proposed(approvals, second)
    with pytest.raises(ConfigError, match=rf"'tiny' is the name of 2: .*{digest[7:19]}"):
        approvals.find("tiny")
    for none in ("other", digest[7:14], "0" * 64, ""):
        with pytest.raises(ConfigError, match="no such manifest waits"):
            approvals.find(none)
    approvals.approve(digest, by="Ada")
    assert approvals.find("tiny").digest == second.digest
    assert approvals.find(digest).status == "approved"


def test_the_last_approved_manifest_is_that_of_the_same_name(tmp_path: Path) -> None:
    approvals = store(tmp_path)
    assert approvals.last_approved("tiny") is None
    for config in (made(), made(federation={"seed": 8}), made(federation={"name": "other"})):
        approvals.approve(proposed(approvals, config), by="Ada")
    last = approvals.last_approved("tiny")
    assert last is not None
    assert last.federation.federation.seed == 8


def test_looking_leaves_no_file(tmp_path: Path) -> None:
    assert store(tmp_path).proposals() == ()
    assert list(tmp_path.iterdir()) == []
