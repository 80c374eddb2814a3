"""SiteAgent: every request gets an answer, and no answer tells of a record."""

import logging
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intramural.client.agent import SiteAgent
from intramural.core.errors import TrainingError
from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout
from intramural.core.messages import (
    Evaluated,
    EvaluateRequest,
    Hello,
    Refusal,
    Reply,
    Request,
    TrainRequest,
    Update,
    Welcome,
)
from intramural.core.metrics import Sums
from intramural.core.site import load_site
from intramural.core.wire import decode_reply, encode
from intramural.models.classification import Classification
from tests.tiny import Json, Row, federation, rows, site

CANARY = "CANARY-7f3a9c"


def agent(
    folder: Path, config: FederationConfig, *, records: list[Row] | None = None, **sections: Any
) -> SiteAgent:
    written = site(folder, "a", rows()[:60] if records is None else records, **sections)
    return SiteAgent(load_site(written), config)


def hello(of: SiteAgent) -> Hello:
    return Hello(manifest=of.federation.digest)


def train(of: SiteAgent) -> TrainRequest:
    vector = np.zeros(of.layout.size, dtype=np.float32)
    return TrainRequest(
        manifest=of.federation.digest, round=1, layout=of.layout.digest, vector=vector
    )


def evaluation(of: SiteAgent, split: Any = "validation") -> EvaluateRequest:
    vector = np.zeros(of.layout.size, dtype=np.float32)
    return EvaluateRequest(
        manifest=of.federation.digest,
        round=1,
        layout=of.layout.digest,
        split=split,
        vector=vector,
    )


def everything(of: SiteAgent) -> list[Request]:
    return [hello(of), train(of), evaluation(of), evaluation(of, "test")]


def refusal(reply: Reply) -> Refusal:
    assert isinstance(reply, Refusal), reply
    return reply


def test_a_site_answers_what_it_is_asked(tmp_path: Path, bert: Path) -> None:
    of = agent(tmp_path, federation(bert))
    welcome, update, validation, test = (of.answer(request) for request in everything(of))
    assert isinstance(welcome, Welcome)
    assert (welcome.site, welcome.layout) == ("a", of.layout.digest)
    assert isinstance(update, Update)
    assert update.weight == len(of.splits().train)
    assert update.delta.shape == (of.layout.size,)
    assert np.abs(update.delta).max() > 0
    for reply, split in ((validation, "validation"), (test, "test")):
        assert isinstance(reply, Evaluated)
        assert reply.split == split
        assert reply.sums.counts["examples"] == [len(getattr(of.splits(), split))]


def test_the_delta_is_after_minus_before(tmp_path: Path, bert: Path) -> None:
    of = agent(tmp_path, federation(bert))
    update = of.answer(train(of))
    assert isinstance(update, Update)
    after = of.resident().loaded.exchange.read()
    np.testing.assert_array_equal(update.delta, after)  # the request's vector was all zeros


def test_another_manifest_is_refused(tmp_path: Path, bert: Path) -> None:
    of = agent(tmp_path, federation(bert))
    reply = refusal(of.answer(Hello(manifest="sha256:" + "0" * 64)))
    assert reply.reason == "refused"
    assert "another manifest" in reply.detail


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"policy": {"require_privacy": True}}, "require_privacy is true"),
        ({"policy": {"exchange": ["full"]}}, "policy.exchange allows ['full']"),
    ],
)
def test_a_policy_s_refusal_answers_every_request(
    tmp_path: Path, bert: Path, sections: Json, words: str
) -> None:
    of = agent(tmp_path, federation(bert), **sections)
    for request in everything(of):
        reply = refusal(of.answer(request))
        assert (reply.reason, reply.site) == ("refused", "a")
        assert words in reply.detail


def test_too_few_records_are_refused(tmp_path: Path, bert: Path) -> None:
    of = agent(tmp_path, federation(bert), policy={"records_min": 1000})
    assert "records_min" in refusal(of.answer(train(of))).detail


@pytest.mark.parametrize("key", ["payload_bytes_max", "bytes_per_round_max"])
def test_too_many_bytes_are_refused_before_anything_is_trained(
    tmp_path: Path, bert: Path, key: str
) -> None:
    of = agent(tmp_path, federation(bert), policy={key: 100})
    for request in everything(of):
        reply = refusal(of.answer(request))
        assert reply.reason == "refused"
        assert f"policy.{key}" in reply.detail
    assert of._splits is None  # no record was read


def test_a_base_that_is_not_on_the_list_is_refused(tmp_path: Path, bert: Path) -> None:
    other = "sha256:" + "0" * 64
    of = agent(tmp_path / "other", federation(bert), policy={"models": [other]})
    assert "policy.models" in refusal(of.answer(hello(of))).detail
    own = of.resident().base.digest
    of = agent(tmp_path / "own", federation(bert), policy={"models": [own]})
    assert isinstance(of.answer(hello(of)), Welcome)


def test_outside_its_hours_a_site_refuses(tmp_path: Path, bert: Path) -> None:
    noon = datetime(2026, 11, 26, 12, 0).astimezone()
    of = agent(tmp_path, federation(bert), policy={"hours": ["22:00-06:00"]})
    of._now = lambda: noon
    assert "policy.hours" in refusal(of.answer(hello(of))).detail
    of._now = lambda: noon.replace(hour=23)
    assert isinstance(of.answer(hello(of)), Welcome)


def test_an_update_of_another_layout_does_not_leave(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = agent(tmp_path, federation(bert))
    other, honest = Layout((("imprint", (9,)),)), of.update

    def imprinted(*args: Any, **named: Any) -> Update:
        return replace(honest(*args, **named), layout=other.digest, delta=np.ones(9, np.float32))

    monkeypatch.setattr(of, "update", imprinted)
    assert refusal(of.answer(train(of))).reason == "egress-refused"


def test_an_unknown_sum_does_not_leave(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"examples": np.ones(1, dtype=np.int64), "texts": np.ones(3, dtype=np.int64)}
    of = agent(tmp_path, federation(bert))
    monkeypatch.setattr(Classification, "measure", lambda *_: Sums(counts=counts))
    reply = refusal(of.answer(evaluation(of)))
    assert (reply.reason, "texts" in reply.detail) == ("egress-refused", True)


@pytest.mark.parametrize("kind", [ValueError, KeyError, RuntimeError, MemoryError])
@pytest.mark.parametrize("place", ["tokenise", "losses", "measure"])
def test_the_text_of_an_exception_stays_at_the_site(
    tmp_path: Path,
    bert: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: type[Exception],
    place: str,
) -> None:
    def fail(*_: object) -> None:
        raise kind(CANARY)

    of = agent(tmp_path, federation(bert))
    requests = everything(of)
    monkeypatch.setattr(Classification, place, fail)
    with caplog.at_level(logging.DEBUG):
        replies = [of.answer(request) for request in requests]
    refused = [reply for reply in replies if isinstance(reply, Refusal)]
    assert len(refused) == {"tokenise": 3, "losses": 1, "measure": 2}[place]
    for reply in refused:
        assert reply.reason == "internal"
        assert reply.detail == f"{kind.__name__}; see the site's own log"
    assert CANARY not in caplog.text
    assert kind.__name__ in caplog.text  # the site's own log says what and where
    assert "test_agent.py" in caplog.text


def test_an_error_of_ours_goes_out_as_it_is(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise TrainingError("loss is not finite; lower it")

    of = agent(tmp_path, federation(bert))
    request = train(of)
    monkeypatch.setattr(Classification, "losses", fail)
    reply = refusal(of.answer(request))
    assert (reply.reason, reply.detail) == ("training", "loss is not finite; lower it")


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("spoilt", ["label", "nul", "surrogate", "number"])
def test_a_record_s_canary_is_in_no_reply_and_no_log(
    tmp_path: Path, bert: Path, caplog: pytest.LogCaptureFixture, strict: bool, spoilt: str
) -> None:
    title = f"{CANARY} dementia"
    bad: dict[str, dict[str, Any]] = {
        "label": {"title": title, "chapter": CANARY},
        "nul": {"title": title + "\0", "chapter": "mental"},
        "surrogate": {"title": title + "\ud800", "chapter": "mental"},
        "number": {"title": [title], "chapter": "mental"},
    }
    marked = [row | {"title": f"{CANARY} {row['title']}"} for row in rows()[:60]]
    of = agent(tmp_path, federation(bert), records=[*marked, bad[spoilt]], data={"strict": strict})
    with caplog.at_level(logging.DEBUG):
        replies = [of.answer(request) for request in everything(of)]
    assert any(isinstance(reply, Refusal) for reply in replies) == strict
    for reply in replies:
        content = encode(reply)
        sent = b"".join(
            array.data for record in content.array_records.values() for array in record.values()
        )
        headers = "".join(str(record) for record in content.config_records.values())
        for form in (CANARY, CANARY.lower(), "7f3a9c"):
            assert form not in headers
            assert form.encode() not in sent
        assert decode_reply(content, layout=of.layout) is not None
    assert "7f3a9c" not in caplog.text.lower()


def test_records_are_read_once(tmp_path: Path, bert: Path) -> None:
    of = agent(tmp_path, federation(bert))
    of.answer(train(of))
    (tmp_path / "a" / "records.jsonl").unlink()
    assert isinstance(of.answer(train(of)), Update)


def test_evaluation_takes_no_more_records_than_the_federation_says(
    tmp_path: Path, bert: Path
) -> None:
    of = agent(tmp_path, federation(bert, evaluation={"records_max": 3}))
    reply = of.answer(evaluation(of))
    assert isinstance(reply, Evaluated)
    assert reply.sums.counts["examples"] == [3]
