"""Desk: verified, admitted, answered once, journalled, sealed; and nothing of a record is told."""

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from intramural.client.agent import SiteAgent
from intramural.client.approval import Approvals
from intramural.client.audit import AuditLog
from intramural.client.desk import Desk, open_desk
from intramural.client.replies import ReplyStore
from intramural.core.canonical import canonical_json, digest_bytes
from intramural.core.errors import TrustError
from intramural.core.files import exclusive
from intramural.core.letter import Letter, write_letter
from intramural.core.messages import Evaluated, Hello, Refusal, Reply, Update, Welcome
from intramural.core.site import load_site
from intramural.privacy.book import read_book
from intramural.trust.envelope import MANIFEST_TYPE, sign
from intramural.trust.keys import new_signing_key
from intramural.trust.seal import sealer
from tests.client.member import PRIVATE, RUN, Member, member
from tests.tiny import Json, federation, rows

CANARY = "CANARY-7f3a9c"
MEASURED = PRIVATE | {"privacy": PRIVATE["privacy"] | {"metrics_noise": 4.0}}

_open: list[Desk] = []


@pytest.fixture(autouse=True)
def _desks_are_closed() -> Iterator[None]:
    yield
    while _open:
        _open.pop().close()


def opened(of: Member) -> Desk:
    _open.append(open_desk(of.site_file))
    return _open[-1]


def approved(folder: Path, base: Path, **sections: Any) -> tuple[Member, Desk]:
    of = member(folder, base, **sections)
    of.approve()
    return of, opened(of)


def asked(of: Member, desk: Desk, question: Letter) -> Reply:
    return of.read(desk.answer(of.envelope, question), question)


def refusal(of: Member, desk: Desk, question: Letter, *, envelope: str | None = None) -> Refusal:
    answer = desk.answer(of.envelope if envelope is None else envelope, question)
    reply = of.read(answer, question)
    assert isinstance(reply, Refusal), reply
    return reply


def charges(of: Member) -> int:
    return len(read_book(load_site(of.site_file).ledger_file).charges)


def test_every_answer_is_sealed_and_names_its_question(tmp_path: Path, bert: Path) -> None:
    of, desk = approved(tmp_path, bert)
    questions = [of.hello(), of.train(), of.evaluation()]
    replies = [asked(of, desk, question) for question in questions]
    assert [type(reply) for reply in replies] == [Welcome, Update, Evaluated]
    assert of.kinds() == ["sent", "trained", "sent", "evaluated", "sent"]


def test_the_journal_holds_what_left_by_digests_and_sizes(tmp_path: Path, bert: Path) -> None:
    of, desk = approved(tmp_path, bert)
    question = of.train()
    answer = desk.answer(of.envelope, question)
    assert answer.vector is not None
    (_, trained), (_, sent) = of.journal()[-2:]
    common = {"run": "tiny", "run_id": RUN, "round": 1, "manifest": of.config.digest}
    assert trained == common | {"letter": question.digest, "private": False}
    assert sent == common | {
        "asked": "TrainRequest",
        "letter": question.digest,
        "answer": digest_bytes(answer.header.encode()),
        "vector": digest_bytes(answer.vector),
        "bytes": len(answer.header) + 4 * of.layout.size,
    }


def test_the_same_letter_gets_the_same_bytes_and_no_second_training(
    tmp_path: Path, bert: Path
) -> None:
    of, desk = approved(tmp_path, bert)
    question = of.train()
    answer = desk.answer(of.envelope, question)
    assert desk.answer(of.envelope, question) == answer
    # a coordinator that seals anew, having lost its own, asks the same
    assert desk.answer(of.envelope, of.sealed(replace(question, seal=None))) == answer
    assert opened(of).answer(of.envelope, question) == answer
    assert of.kinds() == ["trained", "sent", "resent", "resent", "resent"]
    first, again = of.journal()[-4][1], of.journal()[-1][1]
    assert {k: first[k] for k in again} == again  # the same answer, of the same size


def test_answers_that_cost_privacy_are_charged_once(tmp_path: Path, bert: Path) -> None:
    of, desk = approved(tmp_path, bert, **MEASURED)
    questions = [of.train(), of.evaluation()]
    answers = [desk.answer(of.envelope, question) for question in questions]
    assert [type(of.read(answer)) for answer in answers] == [Update, Evaluated]
    assert charges(of) == 2
    again = opened(of)
    assert [again.answer(of.envelope, question) for question in questions] == answers
    assert charges(of) == 2


def test_another_vector_of_the_same_round_is_another_charge(tmp_path: Path, bert: Path) -> None:
    of, desk = approved(tmp_path, bert, **MEASURED)
    assert isinstance(asked(of, desk, of.train()), Update)
    assert isinstance(asked(of, desk, of.train(fill=0.5)), Update)
    assert charges(of) == 2


def sealed_by(role: str, key: Ed25519PrivateKey, letter: Letter) -> Letter:
    return replace(letter, seal=sealer(role, key)(letter.header.encode(), letter.vector))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _, letter: replace(letter, seal=None),
        lambda _, letter: replace(letter, seal="{}"),
        lambda _, letter: replace(letter, seal=CANARY * 1000),
        lambda _, letter: replace(letter, header=letter.header.replace(RUN, "run-2")),
        lambda _, letter: replace(letter, vector=b"\x01" + letter.vector[1:]),
        lambda _, letter: replace(letter, vector=None),
        lambda _, letter: sealed_by("coordinator", new_signing_key(), letter),
        lambda of, letter: sealed_by("site:mine", of.coordinator, letter),
    ],
)
def test_a_letter_without_its_coordinators_seal_is_refused_before_anything(
    tmp_path: Path, bert: Path, spoil: Any
) -> None:
    of = member(tmp_path, bert)
    question = spoil(of, of.train())
    (of.site_file.parent / "records.jsonl").unlink()
    assert refusal(of, opened(of), question).reason == "trust"
    ((kind, body),) = of.journal()  # so nothing was proposed to the site's people either
    assert (kind, body) == ("refused", {"reason": "trust", "letter": question.digest})


def signed_by(key: Ed25519PrivateKey, payload: bytes, kind: str) -> str:
    return canonical_json(sign(kind, payload, key)).decode()


@pytest.mark.parametrize("how", ["", "{", "null", "[]", "unsigned", "stranger", "other type"])
def test_a_manifest_that_its_coordinator_did_not_sign_is_refused(
    tmp_path: Path, bert: Path, how: str
) -> None:
    of = member(tmp_path, bert)
    text, payload = of.config.manifest(), of.config.manifest().encode()
    envelopes = {
        "unsigned": text,
        "stranger": signed_by(new_signing_key(), payload, MANIFEST_TYPE),
        "other type": signed_by(of.coordinator, payload, "text/plain"),
    }
    envelope = envelopes.get(how, how)
    assert refusal(of, opened(of), of.hello(), envelope=envelope).reason == "trust"
    assert of.kinds() == ["refused"]


@pytest.mark.parametrize(
    ("payload", "reason"), [(b"{", "refused"), (b"[]", "config"), (b"{}", "config")]
)
def test_a_signed_manifest_that_is_none_is_refused(
    tmp_path: Path, bert: Path, payload: bytes, reason: str
) -> None:
    of = member(tmp_path, bert)
    envelope = signed_by(of.coordinator, payload, MANIFEST_TYPE)
    found = refusal(of, opened(of), of.hello(), envelope=envelope)
    assert found.reason == reason


def test_an_unapproved_manifest_waits_for_the_sites_people(tmp_path: Path, bert: Path) -> None:
    of = member(tmp_path, bert)
    desk, question = opened(of), of.train()
    (of.site_file.parent / "records.jsonl").rename(tmp_path / "elsewhere")
    assert "approv" in refusal(of, desk, question).reason
    assert of.kinds() == ["refused"]
    (tmp_path / "elsewhere").rename(of.site_file.parent / "records.jsonl")
    of.approve()
    assert isinstance(asked(of, desk, question), Update)  # the worker need not be started anew


def test_an_answer_is_not_sent_again_once_the_approval_is_withdrawn(
    tmp_path: Path, bert: Path
) -> None:
    of, desk = approved(tmp_path, bert)
    question = of.train()
    assert isinstance(asked(of, desk, question), Update)
    policy, journal = load_site(of.site_file).policy, of.state / "journal.jsonl"
    Approvals(of.state, policy=policy, journal=journal).refuse(of.config.digest, by="a. person")
    assert isinstance(asked(of, desk, question), Refusal)
    assert of.kinds() == ["trained", "sent", "refused"]


def test_a_letter_that_goes_by_another_manifest_is_refused(tmp_path: Path, bert: Path) -> None:
    of, desk = approved(tmp_path, bert)
    question = of.train()
    assert isinstance(asked(of, desk, question), Update)
    other = replace(of, config=federation(bert, federation={"name": "other"}))
    other.approve()
    # both are approved; the stored answer belongs to the first alone
    found = refusal(of, desk, question, envelope=other.envelope)
    assert (found.reason, "another manifest" in found.detail) == ("refused", True)


def test_a_round_that_was_passed_is_refused_unless_it_is_the_very_letter(
    tmp_path: Path, bert: Path
) -> None:
    of, desk = approved(tmp_path, bert)
    first, second = of.train(1), of.train(2)
    answers = [desk.answer(of.envelope, question) for question in (first, second)]
    for again in (desk, opened(of)):
        found = refusal(of, again, of.train(1, fill=0.5))
        assert (found.reason, "round 2" in found.detail) == ("stale", True)
        assert again.answer(of.envelope, first) == answers[0]
    assert isinstance(asked(of, desk, of.evaluation(1)), Evaluated)
    assert isinstance(asked(of, desk, of.train(1, run="run-2")), Update)
    stale = next(body for _, body in of.journal() if body.get("reason") == "stale")
    assert (stale["round"], stale["run_id"], stale["asked"]) == (1, RUN, "TrainRequest")


def test_a_damaged_answer_is_computed_anew_and_journalled(tmp_path: Path, bert: Path) -> None:
    of, desk = approved(tmp_path, bert)
    question = of.train()
    answer = desk.answer(of.envelope, question)
    (stored,) = (of.state / "replies").glob("*.letter")
    content = bytearray(stored.read_bytes())
    content[-1] ^= 1
    stored.write_bytes(content)
    again = desk.answer(of.envelope, question)
    assert again.vector == answer.vector  # the same training, for there is no noise
    assert of.kinds() == ["trained", "sent", "reply-damaged", "trained", "sent"]
    assert of.journal()[-3][1]["file"] == stored.name


def test_records_are_read_and_the_agent_is_made_once(tmp_path: Path, bert: Path) -> None:
    of, desk = approved(tmp_path, bert)
    assert isinstance(asked(of, desk, of.train(1)), Update)
    (of.site_file.parent / "records.jsonl").unlink()
    assert isinstance(asked(of, desk, of.train(2)), Update)


def test_nothing_but_a_refusal_leaves_while_the_journal_cannot_be_written(
    tmp_path: Path, bert: Path
) -> None:
    of = member(tmp_path, bert)
    of.approve()
    whole = opened(of)
    journal = of.state / "journal.jsonl"
    desk = Desk(
        whole.site,
        seals=whole._seals,
        approvals=_Everything(),
        replies=ReplyStore(of.state / "replies"),
        audit=AuditLog(journal, lock_wait_s=0.0),
    )
    _open.append(desk)
    with exclusive(journal.with_name("journal.jsonl.lock")):
        assert refusal(of, desk, of.train()).reason == "journal"
    assert not list((of.state / "replies").iterdir())
    assert isinstance(asked(of, desk, of.train()), Update)


class _Everything:
    def admit(self, envelope: str, federation: Any) -> None:
        """Let everything in."""


def test_a_reply_that_cannot_be_stored_is_not_sent(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, desk = approved(tmp_path, bert)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        found = refusal(of, desk, of.train())
    assert re.fullmatch("journal replies: .*free space", f"{found.reason} {found.detail}")
    assert of.kinds() == ["trained", "refused"]


def test_without_seals_a_plain_manifest_is_enough(tmp_path: Path, bert: Path) -> None:
    of = member(tmp_path, bert)
    audit, replies = AuditLog(of.state / "journal.jsonl"), ReplyStore(of.state / "replies")
    site, everything = load_site(of.site_file), _Everything()
    desk = Desk(site, seals=None, approvals=everything, replies=replies, audit=audit)
    _open.append(desk)
    question = write_letter(Hello(manifest=of.config.digest))
    answer = desk.answer(of.config.manifest(), question)
    assert answer.seal is None
    assert json.loads(answer.header)["kind"] == "Welcome"


def test_a_kit_of_another_site_opens_no_desk(tmp_path: Path, bert: Path) -> None:
    of = member(tmp_path, bert)
    of.site_file.write_text(of.site_file.read_text().replace('"mine"', '"theirs"'))
    with pytest.raises(TrustError, match=r"that of 'mine', site\.toml that of 'theirs'"):
        open_desk(of.site_file)


@pytest.mark.parametrize("sections", [{}, MEASURED], ids=["plain", "private"])
def test_no_record_s_text_is_told_whatever_breaks(
    tmp_path: Path,
    bert: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    sections: Json,
) -> None:
    caplog.set_level(logging.DEBUG)
    marked = [row | {"title": f"{CANARY} {row['title']}"} for row in rows()[:60]]
    of, desk = approved(tmp_path, bert, records=marked, **sections)
    whole = [asked(of, desk, question) for question in (of.hello(), of.train(), of.evaluation())]
    assert not any(isinstance(reply, Refusal) for reply in whole)

    def broken(self: SiteAgent, *_: Any) -> Any:
        raise RuntimeError(f"cannot take {self.splits().train[0].text}")

    assert CANARY in desk._agents[of.config.digest].splits().train[0].text
    answers = []
    for name, spoiled in (("tokens_of", broken), ("layout", property(broken))):
        question = of.train(2)
        monkeypatch.setattr(SiteAgent, name, spoiled)
        answers.append(desk.answer(of.envelope, question))
    reasons = [json.loads(answer.header)["body"]["reason"] for answer in answers]
    assert reasons == ["at-site" if sections else "internal"] * 2
    told = [caplog.text, repr(whole), repr(answers)]
    home = of.site_file.parent
    written = [path for path in home.rglob("*") if path.is_file() and path.name != "records.jsonl"]
    told += [path.read_bytes().decode("latin-1") for path in written]
    assert len(written) > 5
    assert CANARY.lower() not in "".join(told).lower()
