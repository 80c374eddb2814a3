"""Flower's entry point at a site: each message goes to the site's agent, its reply back."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from intramural.client.refusals import refusal_of
from intramural.core.config import check_config
from intramural.core.errors import Refused
from intramural.core.federation import FederationConfig
from intramural.core.messages import Reply
from intramural.core.site import load_site
from intramural.core.wire import VECTOR, decode_request, encode

if TYPE_CHECKING:
    from intramural.client.agent import SiteAgent

# A plain assignment: flwr finds `app` by reading the syntax tree, and an annotated one is missed.
app = ClientApp()

_agents: dict[tuple[Path, str], "SiteAgent"] = {}
"""Agents of this process: a process that lives on keeps model and tokens between rounds."""


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round."""
    return _respond(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate on one of the site's splits."""
    return _respond(message, context)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say who this is, and whether the site takes part."""
    return _respond(message, context)


def _respond(message: Message, context: Context) -> Message:
    try:
        reply = _answer(message, context)
    except Exception as error:  # noqa: BLE001 (flwr would send its text to the coordinator)
        reply = refusal_of(error, site="unknown")
    return Message(encode(reply), reply_to=message)


def _answer(message: Message, context: Context) -> Reply:
    agent = agent_for(_site_file(context), str(context.run_config.get("manifest", "")))
    # reading a vector needs the layout, and so the model; a greeting shall not wait for it
    layout = agent.layout if VECTOR in message.content else None
    return agent.answer(decode_request(message.content, layout=layout))


def agent_for(site_file: Path, manifest: str) -> "SiteAgent":
    """Return this process's agent for a site and a manifest, made at first use.

    Raises:
        ConfigError: site.toml or the manifest is wrong.
    """
    key = (site_file, manifest)
    if key not in _agents:
        from intramural.client.agent import SiteAgent  # here: it imports torch, which takes seconds

        try:
            table = json.loads(manifest)
        except ValueError:
            raise Refused("the run's manifest is not JSON; submit the run's bundle anew") from None
        federation = check_config(table, FederationConfig, source="manifest")
        _agents[key] = SiteAgent(load_site(site_file), federation)
    return _agents[key]


def _site_file(context: Context) -> Path:
    """Return where this node's site.toml lies.

    A deployed node names it in its own node configuration, which nobody else can set. Only a node
    of a simulation, which has none, takes it from the run.
    """
    own = context.node_config.get("site")
    if own is not None:
        return Path(str(own))
    folder = context.run_config.get("simulation-sites")
    if folder is None or "partition-id" not in context.node_config:
        raise Refused("the node names no site; start it with --node-config 'site=\"site.toml\"'")
    sites = sorted(Path(str(folder)).glob("*/site.toml"))
    return sites[int(context.node_config["partition-id"])]
