"""The Flower app of a site: whose site.toml it reads, and that nothing it meets is told."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from intramural.client import thin
from intramural.client.app import app
from intramural.core.federation import FederationConfig
from intramural.core.letter import Letter, write_letter
from intramural.core.messages import Hello, Refusal, Reply, Welcome
from intramural.core.wire import decode_reply, to_letter, to_records
from intramural.simulations.inprocess import InProcessGrid
from tests.client.workers import echoing
from tests.tiny import federation, rows, site

CANARY = "CANARY-7f3a9c"


def sent(content: RecordDict, node: dict[str, Any], run: dict[str, Any]) -> RecordDict:
    """Return what the app answers to a message's content."""
    InProcessGrid(app, 1, run_config={})  # takes the identity that messages carry
    context = Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config=run)
    message = Message(content, 1, "query")
    message.metadata.__dict__["_message_id"] = "m1"
    return app(message=message, context=context).content


def ask(config: FederationConfig, node: dict[str, Any], run: dict[str, Any]) -> Reply:
    """Return the app's answer to a greeting, which it names."""
    hello = write_letter(Hello(manifest=config.digest))
    return decode_reply(sent(to_records(hello), node, run), answers=hello.digest)


def test_a_simulated_node_takes_its_site_from_the_run(tmp_path: Path, bert: Path) -> None:
    config = federation(bert)
    for number in (1, 2):
        site(tmp_path, f"site-{number}", rows()[number:40:2])
    run = {"manifest": config.manifest(), "simulation-sites": str(tmp_path)}
    for number in (0, 1):
        reply = ask(config, {"partition-id": number, "num-partitions": 2}, run)
        assert isinstance(reply, Welcome)
        assert reply.site == f"site-{number + 1}"


def test_a_node_that_names_no_worker_refuses_whatever_the_run_says(
    tmp_path: Path, bert: Path
) -> None:
    config = federation(bert)
    own = site(tmp_path, "mine", rows()[:40])
    run = {"manifest": config.manifest(), "simulation-sites": str(tmp_path)}
    for node in ({}, {"site": str(own)}):
        reply = ask(config, node, run)
        assert isinstance(reply, Refusal)
        assert (reply.site, reply.reason) == ("unknown", "refused")
        assert "intramural client up" in reply.detail


@pytest.mark.parametrize("manifest", ["", "{", "[]", "{}", f'{{"federation": "{CANARY}"}}'])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, bert: Path, manifest: str) -> None:
    site(tmp_path, "site-1", rows()[:40])
    run = {"manifest": manifest, "simulation-sites": str(tmp_path)}
    reply = ask(federation(bert), {"partition-id": 0, "num-partitions": 1}, run)
    assert isinstance(reply, Refusal)
    assert reply.reason in ("refused", "config", "internal")


def test_a_partition_that_is_not_there_leaks_nothing(tmp_path: Path, bert: Path) -> None:
    config = federation(bert)
    site(tmp_path / CANARY, "site-1", rows()[:40])
    run = {"manifest": config.manifest(), "simulation-sites": str(tmp_path / CANARY)}
    reply = ask(config, {"partition-id": 7, "num-partitions": 8}, run)
    assert isinstance(reply, Refusal)
    assert reply.reason == "config"
    assert CANARY not in reply.detail


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"other": ConfigRecord({"header": "{}"})}),
        RecordDict({"intramural": ConfigRecord({"header": 1})}),
        RecordDict({"intramural": ConfigRecord({"header": "{}"}), "more": ArrayRecord()}),
    ],
)
@pytest.mark.parametrize("node", [{}, {"worker": "unix:/nobody"}])
def test_what_is_no_letter_is_refused_here(content: RecordDict, node: dict[str, Any]) -> None:
    answer = to_letter(sent(content, node, {}))
    assert json.loads(answer.header)["answers"] is None
    reply = decode_reply(to_records(answer))
    assert isinstance(reply, Refusal)
    assert reply.reason == "wire"


def test_a_node_with_a_worker_passes_letters_on_unread(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir(mode=0o700)
    with echoing(tmp_path / "s" / "w.sock", log=tmp_path / "log") as (_, address):
        node = {"worker": address, "site": str(tmp_path / "none.toml")}
        for letter in (
            Letter(header="no JSON", vector=bytes(range(16)), seal="no seal"),
            Letter(header="", vector=b""),
            Letter(header="{}"),
        ):
            # what comes back is what the echo got: also the run's manifest went along
            assert to_letter(sent(to_records(letter), node, {"manifest": "0.01"})) == letter
        answer = sent(to_records(letter), node, {"manifest": "break"})
    reply = decode_reply(answer, answers=letter.digest)
    assert isinstance(reply, Refusal)
    assert (reply.site, reply.reason) == ("unknown", "wire")


def test_a_worker_that_is_away_is_an_unsealed_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thin, "WAIT_S", 0.3)
    started = time.monotonic()
    node = {"worker": f"unix:{tmp_path}/w.sock"}
    answer = sent(to_records(Letter(header="{}")), node, {})
    assert time.monotonic() - started < 5.0
    assert to_letter(answer).seal is None
    reply = decode_reply(answer, answers=Letter(header="{}").digest)
    assert isinstance(reply, Refusal)
    assert reply.reason == "worker-away"


def test_a_worker_that_is_not_on_a_unix_socket_is_refused() -> None:
    reply = decode_reply(sent(to_records(Letter(header="{}")), {"worker": "localhost:80"}, {}))
    assert isinstance(reply, Refusal)
    assert reply.reason == "config"
