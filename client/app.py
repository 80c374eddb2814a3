"""Flower's entry point at a site: each message goes to the site's agent, its reply back.

A deployed node's configuration names its resident worker, which holds records and model; this
process passes the letters on. A simulation's nodes name none, and answer in this process.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from intramural.client import thin
from intramural.client.refusals import refusal_of
from intramural.core.config import check_config
from intramural.core.errors import Refused
from intramural.core.federation import FederationConfig
from intramural.core.letter import Letter, read_request
from intramural.core.messages import Reply
from intramural.core.site import load_site
from intramural.core.wire import encode, to_letter, to_records

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
    answers = None
    try:
        letter = to_letter(message.content)
        answers = letter.digest
        worker = context.node_config.get("worker")
        if worker is not None:
            answer = thin.ask(str(worker), _manifest(context), letter, wait_s=thin.WAIT_S)
            return Message(to_records(answer), reply_to=message)
        reply = _answer(letter, context)
    except Exception as error:  # noqa: BLE001 (flwr would send its text to the coordinator)
        reply = refusal_of(error, site="unknown")
    return Message(encode(reply, answers=answers), reply_to=message)


def _answer(letter: Letter, context: Context) -> Reply:
    agent = agent_for(_site_file(context), _manifest(context))
    # reading a vector needs the layout, and so the model; a greeting shall not wait for it
    layout = agent.layout if letter.vector is not None else None
    return agent.answer(read_request(letter, layout=layout))


def _manifest(context: Context) -> str:
    """Return the run's manifest: in its envelope where a worker opens it, else as it is."""
    return str(context.run_config.get("manifest", ""))


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
    """Return where a simulated node's site.toml lies: in the run's configuration.

    A deployed node names its worker instead, in its own configuration, which nobody else can set.
    It never comes here: no run can make it open a file.
    """
    folder = context.run_config.get("simulation-sites")
    if not folder or "partition-id" not in context.node_config:
        raise Refused("the node names no worker; start the site with `intramural client up`")
    sites = sorted(Path(str(folder)).glob("*/site.toml"))
    return sites[int(context.node_config["partition-id"])]
