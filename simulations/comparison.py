"""Comparison: the same model trained alone at each site, and on everybody's records together.

Both go through the SiteAgent, as the federation does: a federation of one. So records, splits,
steps, learning rates and evaluation are the same, and only the sharing differs.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from intramural.client.agent import SiteAgent
from intramural.core.errors import TrainingError
from intramural.core.federation import FederationConfig
from intramural.core.federation_rounds import Strategy
from intramural.core.files import write_json
from intramural.core.layout import Vector
from intramural.core.messages import (
    Evaluated,
    EvaluateRequest,
    Refusal,
    Split,
    TrainRequest,
    Update,
)
from intramural.core.metrics import Sums, add_sums
from intramural.core.site import SiteConfig, load_site
from intramural.server.report import result_of


class Progress(Protocol):
    """Told how far some work is."""

    def __call__(self, what: str, done: int, total: int) -> None:
        """So much of `what` is done, of so much."""
        ...


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What to compare with, and where results are kept as they come."""

    federation: FederationConfig
    files: list[Path]
    """site.toml of each site."""
    pooled: Path
    folder: Path


PRIVATE_NOTES = [
    "Under [privacy] no site sends exact metrics: the final ones here were measured by the "
    "simulator, which holds all records. A deployment has none of them.",
    "Local-only, pooled and linear models were trained without privacy: they are upper bounds.",
]


def open_form(federation: FederationConfig) -> FederationConfig:
    """Return the federation without [privacy], as the simulator's own comparisons train it."""
    return federation.model_copy(update={"privacy": None})


def plain_form(federation: FederationConfig) -> FederationConfig:
    """Return the federation as its comparisons train it: one model, trained whole, by plain steps.

    What the rule has the sites train in turn, keep at home, or be pulled to, is about sharing.
    """
    exchange = federation.exchange.model_copy(update={"personal": (), "rank_min": None})
    training = federation.training.model_copy(update={"proximal": 0.0})
    changed = {"exchange": exchange, "training": training, "strategy": Strategy(), "personal": None}
    return open_form(federation).model_copy(update=changed)


def open_site(site: SiteConfig) -> SiteConfig:
    """Return a site whose demand for privacy is set aside, for the simulator's own measurements."""
    policy = site.policy.model_copy(update={"require_privacy": False})
    return site.model_copy(update={"policy": policy})


def open_agent(
    file: Path, federation: FederationConfig, *, memory_of: FederationConfig | None = None
) -> SiteAgent:
    """Return an agent that compares and measures; `memory_of`: as the SiteAgent has it."""
    site = open_site(load_site(file))
    if federation.exchange.rank_min is None:  # one rank for all
        compute = site.compute.model_copy(update={"rank": None})
        site = site.model_copy(update={"compute": compute})
    return SiteAgent(site, federation, memory_of=memory_of)


def test_results(
    federation: FederationConfig, files: list[Path], vector: Vector, *, run: str
) -> dict[str, Any]:
    """Return a run's final results on the test records: `{"all": R, "own": {site: R}}`."""
    form = open_form(federation)
    agents = [open_agent(file, form, memory_of=federation) for file in files]
    return _result(form, sums_by_site(agents, vector, "test", run=run))


def train_alone(
    agent: SiteAgent, start: Vector, rounds: int, progress: Callable[[int], None]
) -> Vector:
    """Return the parameters after all rounds at one site alone; shape as `start`.

    Raises:
        TrainingError: The site refused or failed; the reason is in the message.
    """
    vector = start.copy()
    for round_ in range(1, rounds + 1):
        request = TrainRequest(
            manifest=agent.federation.digest,
            round=round_,
            layout=agent.layout.digest,
            vector=vector,
        )
        reply = agent.answer(request)
        if isinstance(reply, Refusal):
            raise TrainingError(f"{agent.name} alone: {reply.detail}")
        assert isinstance(reply, Update)
        np.add(vector, reply.delta, out=vector)
        progress(round_)
    return vector


def sums_by_site(
    agents: list[SiteAgent], vector: Vector, split: Split, *, run: str = ""
) -> dict[str, Sums]:
    """Return the sums of the parameters on one split of each site's own records.

    `run`: of which the sites keep what stays with them.

    Raises:
        TrainingError: A site refused or failed; the reason is in the message.
    """
    sums: dict[str, Sums] = {}
    for agent in agents:
        if not agent.records_of(split):
            continue  # a small site may have no validation records
        request = EvaluateRequest(
            manifest=agent.federation.digest,
            round=agent.federation.federation.rounds,
            layout=agent.layout.digest,
            split=split,
            vector=vector,
            run=run,
        )
        reply = agent.answer(request)
        if isinstance(reply, Refusal):
            raise TrainingError(f"{agent.name}: {reply.detail}")
        assert isinstance(reply, Evaluated)
        sums[agent.name] = reply.sums
    return sums


def compare(
    plan: Comparison, start: Vector, *, kinds: set[str], progress: Progress
) -> dict[str, Any]:
    """Return results by trained model: `{"pooled": R, "local": {site: R}}`.

    Each R is `{"all": metrics on the pooled test split, "own": {site: metrics on its own}}`. A
    model's result is kept on disk once it is there, so that an interrupted comparison goes on.
    """
    agents = [open_agent(file, plan.federation) for file in plan.files]
    results: dict[str, Any] = {"local": {}}
    jobs: list[tuple[str, SiteAgent]] = []
    if "local" in kinds:
        jobs += [(agent.name, agent) for agent in agents]
    if "pooled" in kinds:
        jobs += [("pooled", open_agent(plan.pooled, plan.federation))]
    for name, agent in jobs:
        kept = plan.folder / f"{name}.json"
        if not kept.is_file():
            rounds = plan.federation.federation.rounds
            label = "pooled training" if name == "pooled" else f"{name} alone"
            vector = train_alone(agent, start, rounds, partial(progress, label, total=rounds))
            write_json(kept, _result(plan.federation, sums_by_site(agents, vector, "test")))
        found = json.loads(kept.read_text())
        if name == "pooled":
            results["pooled"] = found
        else:
            results["local"][name] = found
    return results


def before_training(plan: Comparison, start: Vector) -> dict[str, Any]:
    """Return the initial parameters' metrics: `{"validation": M, "test": M}`, kept on disk."""
    kept = plan.folder / "initial.json"
    if not kept.is_file():
        agents = [open_agent(file, plan.federation) for file in plan.files]
        splits: tuple[Split, ...] = ("validation", "test")
        found = {s: add_sums(list(sums_by_site(agents, start, s).values())) for s in splits}
        write_json(kept, {s: result_of(plan.federation, sums) for s, sums in found.items()})
    initial: dict[str, Any] = json.loads(kept.read_text())
    return initial


def _result(federation: FederationConfig, sums: dict[str, Sums]) -> dict[str, Any]:
    return {
        "all": result_of(federation, add_sums(list(sums.values()))),
        "own": {site: result_of(federation, own) for site, own in sums.items()},
    }
