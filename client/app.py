"""Flower's entry point at a site: each message goes to the site's agent, its reply back.

A deployed node's configuration names its resident worker, which holds records and model; this
process passes the letters on. A simulation's nodes name none, and answer in this process.
"""

import json
from collections import OrderedDict
from functools import lru_cache
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
from intramural.core.wire import encode, to_letter, to_records

if TYPE_CHECKING:
    from intramural.client.agent import SiteAgent

# A plain assignment: flwr finds `app` by reading the syntax tree, and an annotated one is missed.
app = ClientApp()

AGENTS_MAX = 1024
"""Agents kept at once: a population has many more sites than a round has."""
_agents: OrderedDict[tuple[str, int, str], "SiteAgent"] = OrderedDict()
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
    agent = agent_for(context)
    # reading a vector needs the layout, and so the model; a greeting shall not wait for it
    layout = agent.layout if letter.vector is not None else None
    return agent.answer(read_request(letter, layout=layout))


def _manifest(context: Context) -> str:
    """Return the run's manifest: in its envelope where a worker opens it, else as it is."""
    return str(context.run_config.get("manifest", ""))


def agent_for(context: Context) -> "SiteAgent":
    """Return this process's agent for a simulated node, made at first use and kept a while.

    A deployed node names its worker instead, in its own configuration, which nobody else can set.
    It never comes here: no run can make it open a file.

    Raises:
        ConfigError: site.toml or the manifest is wrong.
        Refused: The node is neither simulated nor has a worker.
    """
    folder, manifest = context.run_config.get("simulation-sites"), _manifest(context)
    if not folder or "partition-id" not in context.node_config:
        raise Refused("the node names no worker; start the site with `intramural client up`")
    number, sites = (int(context.node_config[key]) for key in ("partition-id", "num-partitions"))
    key = (str(folder), number, manifest)
    agent = _agents.pop(key, None)  # and put in again: the last one is the last to go
    if agent is None:
        # here: it imports torch, which takes seconds
        from intramural.client.simulated import simulated_agent

        agent = simulated_agent(_path(str(folder)), number, sites, _federation(manifest))
    _agents[key] = agent
    while len(_agents) > AGENTS_MAX:
        _agents.popitem(last=False)
    return agent


def prepare(context: Context) -> None:
    """Make tokens of a simulated node's training records, which it will be asked to train on.

    For a thread beside the one that trains: another node has trained here, so that the federation's
    model and a population's tokens are there. A site with a rank of its own may want another model,
    which is not for two threads to build.

    Guarantees:
        Under [privacy] nothing is read: a round's cost is charged before its records are.
    """
    agent = agent_for(context)
    if agent.federation.privacy is None and agent.site.compute.rank is None:
        agent.tokens_of("train")


@lru_cache(maxsize=4)
def _path(folder: str) -> Path:
    """Return the same path each time: one keeps its hash, and others are looked up by it."""
    return Path(folder)


@lru_cache(maxsize=4)
def _federation(manifest: str) -> FederationConfig:
    """Return the federation of a manifest; the sites of a simulation share it."""
    try:
        table = json.loads(manifest)
    except ValueError:
        raise Refused("the run's manifest is not JSON; submit the run's bundle anew") from None
    return check_config(table, FederationConfig, source="manifest")
