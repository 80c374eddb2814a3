"""The Flower app of a site: whose site.toml it reads, and that nothing it meets is told."""

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict

from intramural.client.app import app
from intramural.core.federation import FederationConfig
from intramural.core.messages import Hello, Refusal, Reply, Welcome
from intramural.core.wire import decode_reply, encode
from intramural.simulations.inprocess import InProcessGrid
from tests.tiny import federation, rows, site

CANARY = "CANARY-7f3a9c"


def ask(config: FederationConfig, node: dict[str, Any], run: dict[str, Any]) -> Reply:
    """Return the app's answer to a greeting."""
    InProcessGrid(app, 1, run_config={})  # takes the identity that messages carry
    context = Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config=run)
    message = Message(encode(Hello(manifest=config.digest)), 1, "query")
    message.metadata.__dict__["_message_id"] = "m1"
    return decode_reply(app(message=message, context=context).content)


def test_a_deployed_node_names_its_own_site(tmp_path: Path, bert: Path) -> None:
    config = federation(bert)
    own = site(tmp_path / "own", "mine", rows()[:40])
    site(tmp_path / "others", "theirs", rows()[:40])
    run = {"manifest": config.manifest(), "simulation-sites": str(tmp_path / "others")}
    reply = ask(config, {"site": str(own), "partition-id": 0}, run)
    assert isinstance(reply, Welcome)
    assert reply.site == "mine"  # whatever the run says


def test_a_node_without_a_site_refuses(bert: Path) -> None:
    config = federation(bert)
    reply = ask(config, {}, {"manifest": config.manifest()})
    assert isinstance(reply, Refusal)
    assert (reply.site, reply.reason) == ("unknown", "refused")
    assert "the node names no site" in reply.detail


@pytest.mark.parametrize("manifest", ["", "{", "[]", "{}", f'{{"federation": "{CANARY}"}}'])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, bert: Path, manifest: str) -> None:
    own = site(tmp_path, "mine", rows()[:40])
    reply = ask(federation(bert), {"site": str(own)}, {"manifest": manifest})
    assert isinstance(reply, Refusal)
    assert reply.reason in ("refused", "config", "internal")


def test_a_partition_that_is_not_there_leaks_nothing(tmp_path: Path, bert: Path) -> None:
    config = federation(bert)
    site(tmp_path / CANARY, "mine", rows()[:40])
    run = {"manifest": config.manifest(), "simulation-sites": str(tmp_path / CANARY)}
    reply = ask(config, {"partition-id": 7}, run)
    assert isinstance(reply, Refusal)
    assert reply.detail == "IndexError; see the site's own log"
