"""A simulation: deal the records, run the federation on an engine, compare, report."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from intramural.client.agent import SiteAgent
from intramural.client.policy import check_manifest
from intramural.client.simulated import LEDGERS, population_site
from intramural.core.canonical import canonical_json
from intramural.core.errors import ConfigError, DataError, IntramuralError
from intramural.core.federation import FederationConfig
from intramural.core.files import write_atomic, write_json
from intramural.core.journal import scan
from intramural.core.site import SiteConfig, load_site
from intramural.models.generation import Generation
from intramural.models.resident import resident_model
from intramural.server import machine
from intramural.server.checkpoint import load_checkpoint
from intramural.server.commits import JOURNAL
from intramural.server.export import beginning
from intramural.server.holdout import check_holdout
from intramural.server.planning import check_federation
from intramural.server.report_html import render_html
from intramural.server.run import CHECKPOINTS, REPORT, run_id
from intramural.server.watcher import Watcher
from intramural.simulations.baseline import linear_baseline
from intramural.simulations.comparison import (
    PRIVATE_NOTES,
    Comparison,
    before_training,
    compare,
    open_agent,
    open_form,
    plain_form,
    test_results,
)
from intramural.simulations.engines import Engine, Work, run_engine
from intramural.simulations.hostile import check_attacks
from intramural.simulations.scenario import Scenario, load_scenario
from intramural.simulations.sites import FOLDERS_MAX, Deal, Dealt, deal
from intramural.simulations.trace import TRACE, Tracer

MARK = "simulation.json"
"""What a folder's simulation is made of; the folder is for no other."""
COMPARISONS = frozenset({"local", "pooled", "baseline"})
COHORT_MAX = 10_000
"""Sites of a round: the machine looks at all of them with each answer."""
CROWD_NOTE = (
    "The {:,} sites are not listed one by one, and none was trained alone. What the report says of "
    "the test split was measured by the simulator on all test records together."
)


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What to simulate."""

    deal: Deal
    engine: Engine = "inprocess"
    resume: bool = False
    compare: frozenset[str] = COMPARISONS
    scenario: Scenario | None = None
    """Links, hours and faults, on a simulated clock; None: sites answer at once and always."""
    holdout: Path | None = None
    """holdout.toml of the coordinator's own records, where [gate] judges by them."""
    workers: int | None = None
    """Processes of the pool; None: as many as fit the machine."""
    trace: bool = False
    """Write trace.json, which shows where the time goes."""

    @property
    def federation(self) -> FederationConfig:
        """The federation to run."""
        return self.deal.federation

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return self.deal.folder


def simulate(plan: Simulation, *, watcher: Watcher) -> dict[str, Any]:
    """Run a simulation to its end, and return its report.

    Raises:
        ConfigError: There are fewer sites than `sites.min`, or the folder holds another run.
        DataError: A site's share of the records cannot be split.
        Refused: The sites' policy forbids the federation.
        IntramuralError: As `deal`, `run_federation` and `compare`.
    """
    plan = _on_a_clock(plan)
    _check(plan)
    try:
        dealt = deal(plan.deal)
    except IntramuralError:
        (plan.folder / MARK).unlink(missing_ok=True)  # no site is written: the folder stays free
        raise
    agents = _agents(plan, dealt)
    _run(plan, watcher)
    report = _add_comparison(plan, dealt, agents, watcher)
    write_json(plan.folder / REPORT, report)
    write_atomic(plan.folder / "report.html", render_html(report).encode())
    return report


def _on_a_clock(plan: Simulation) -> Simulation:
    """Return the plan; with [asynchrony] and no scenario it gets one of equal sites.

    Who answers first decides which update is in which round, so answers come by a simulated clock.

    Raises:
        ConfigError: The engine has none.
    """
    if plan.federation.asynchrony is None or plan.scenario is not None:
        return plan
    if plan.engine in ("batched", "ray"):
        raise ConfigError(
            "[asynchrony] is simulated on a clock of its own, by the engines inprocess and pool; "
            f"leave out --engine {plan.engine}"
        )
    return replace(plan, scenario=load_scenario("calm"))


def _check(plan: Simulation) -> None:
    """Refuse what cannot work before anything is written; note what the folder is for."""
    if plan.scenario is not None and plan.engine == "ray":
        raise ConfigError(
            "--scenario needs a clock of its own, and Ray's is real; leave out --engine ray"
        )
    if plan.scenario is not None and plan.engine == "batched":
        raise ConfigError("--scenario has sites answer one by one; leave out --engine batched")
    if plan.scenario is not None:
        check_attacks(plan.scenario, plan.federation)
        plan.scenario.groups_of(plan.deal.sites, seed=plan.federation.federation.seed)
    _check_sites(plan)
    check_manifest(plan.deal.template.policy, plan.federation)
    check_federation(plan.federation)
    check_holdout(plan.federation, plan.holdout)
    data = plan.deal.template.data.path
    if not data.is_file():
        raise DataError(f"{data}: no such file; name a file of records")
    played = {"scenario": plan.scenario.digest} if plan.scenario else {}
    facts = canonical_json(plan.deal.facts() | played)
    mark = plan.folder / MARK
    if mark.is_file() and mark.read_bytes() != facts:
        raise ConfigError(f"{plan.folder}: holds another simulation; use another --out")
    if (plan.folder / JOURNAL).exists() and not plan.resume:
        raise ConfigError(f"{plan.folder}: holds a run already; add --resume, or use another --out")
    write_atomic(mark, facts)


def _check_sites(plan: Simulation) -> None:
    """Refuse numbers of sites that no run could have."""
    if plan.deal.is_crowd and plan.deal.ledgers is not None:
        raise ConfigError("--ledgers are not for a crowd of sites; leave it out")
    if plan.deal.sites > FOLDERS_MAX and plan.federation.evaluations_every:
        raise ConfigError(
            f"after the last round all {plan.deal.sites} sites would be tested; set "
            "evaluation.every = 0, and the simulator tests on all records together"
        )
    cohort = machine.share_of(plan.federation.sites.share, plan.deal.sites)
    if cohort > COHORT_MAX:
        raise ConfigError(
            f"a round would ask {cohort:,} sites, and {COHORT_MAX:,} are the most; "
            "set sites.share lower"
        )
    wanted = plan.federation.sites.min
    if plan.deal.sites < wanted:
        raise ConfigError(
            f"--sites {plan.deal.sites} is below sites.min = {wanted} in federation.toml; "
            "raise --sites or lower sites.min"
        )


def _run(plan: Simulation, watcher: Watcher) -> None:
    """Run the rounds, unless they are all done."""
    work = Work(
        deal=plan.deal,
        engine=plan.engine,
        workers=plan.workers,
        scenario=plan.scenario,
        holdout=plan.holdout,
    )
    if not plan.trace:
        run_engine(work, watcher=watcher)
        return
    with Tracer(plan.folder / TRACE, watcher) as tracer:
        run_engine(replace(work, observe=tracer.delivered), watcher=tracer)


def _agents(plan: Simulation, dealt: Dealt) -> list[SiteAgent]:
    """Return the sites' agents once each can split its records: before the rounds, not after.

    A crowd's are too many; the one that holds everybody's records stands for them.
    """
    if dealt.is_crowd:
        return [open_agent(dealt.pooled, open_form(plan.federation))]
    agents = [SiteAgent(load_site(file), plan.federation) for file in dealt.files]
    for agent in agents:
        try:
            agent.splits()
        except DataError as error:
            raise DataError(f"{agent.name}: {error}; or deal to fewer sites") from None
    return agents


def _add_comparison(
    plan: Simulation, dealt: Dealt, agents: list[SiteAgent], watcher: Watcher
) -> dict[str, Any]:
    """Return the run's report with sites, comparisons and samples filled in."""
    report: dict[str, Any] = json.loads((plan.folder / REPORT).read_text())
    report["privacy"] = None
    if plan.federation.privacy is not None:
        from intramural.simulations.statements import write_statements  # as above

        sites = _charged(plan, dealt)
        report["privacy"] = write_statements(plan.federation, sites, folder=plan.folder)
    plain = plain_form(plan.federation)
    first = beginning(plain, plan.deal.template.model)
    report["sites"] = [] if dealt.is_crowd else [_site_facts(agent) for agent in agents]
    report["notes"] = list(dealt.notes)
    final = report["final"]
    own = final["own_test"]
    others = Comparison(
        federation=plain,
        files=[dealt.pooled] if dealt.is_crowd else dealt.files,
        pooled=dealt.pooled,
        folder=plan.folder / "comparison",
    )
    if plan.federation.privacy is not None:
        report["notes"] += PRIVATE_NOTES
    if plan.federation.privacy is not None or dealt.is_crowd:
        checkpoint, _ = load_checkpoint(plan.folder / CHECKPOINTS)
        assert checkpoint is not None
        run = run_id(scan(plan.folder / JOURNAL).entries)
        found = test_results(plan.federation, others.files, checkpoint.vector, run=run)
        final["federated"] = found["all"]
        own |= {site: {"federated": result} for site, result in found["own"].items()}
    if dealt.is_crowd:
        report["notes"].append(CROWD_NOTE.format(plan.deal.sites))
    report["initial"] = before_training(others, first.vector)
    kinds = set(plan.compare) - ({"local"} if dealt.is_crowd else set())
    found = compare(others, first.vector, kinds=kinds, progress=watcher.progressed)
    if "baseline" in plan.compare and plan.federation.task.kind == "classification":
        found["baseline"] = linear_baseline(
            plan.federation,
            [record for agent in agents for record in agent.splits().train],
            {agent.name: agent.records_of("test") for agent in agents},
        )
    for kind in ("pooled", "baseline"):
        if kind in found:
            final[kind] = found[kind]["all"]
            for site, result in found[kind]["own"].items():
                own.setdefault(site, {})[kind] = result
    for site, result in found["local"].items():
        final["local"][site] = result["all"]
        own.setdefault(site, {})["local"] = result["own"].get(site)
    if dealt.is_crowd:
        own.clear()  # there is one site alone in it, which is nobody
    report["samples"] = _samples(plan, agents[0])
    return report


def _charged(plan: Simulation, dealt: Dealt) -> Iterator[SiteConfig]:
    """Yield the sites that may have a privacy ledger; of a crowd, those that took part."""
    if not dealt.is_crowd:
        yield from map(load_site, dealt.files)
    folder = plan.folder / "sites"
    for ledger in sorted((folder / LEDGERS).glob("*.jsonl")):
        yield population_site(folder, ledger.stem)


def _site_facts(agent: SiteAgent) -> dict[str, Any]:
    splits = agent.splits()
    sides = {side: getattr(splits, side) for side in ("train", "validation", "test")}
    facts: dict[str, Any] = {"name": agent.name} | {s: len(rows) for s, rows in sides.items()}
    facts["labels"] = {}
    if agent.federation.task.kind == "classification":
        counts = Counter(record.target for rows in sides.values() for record in rows)
        facts["labels"] = dict(sorted(counts.items()))
    return facts


def _samples(plan: Simulation, agent: SiteAgent) -> list[dict[str, str]]:
    """Return what the model writes for one test record, before and after the federation."""
    if plan.federation.task.kind != "generation":
        return []
    places = plan.deal.template.model
    start = beginning(plan.federation, places).vector
    resident = resident_model(plan.federation, places=places, device="auto")
    checkpoint, _ = load_checkpoint(plan.folder / CHECKPOINTS)
    if not isinstance(resident.task, Generation) or checkpoint is None:
        return []
    record = agent.splits().test[0]
    sample = {"prompt": record.text, "reference": record.target}
    for name, vector in (("before", start), ("after", checkpoint.vector)):
        resident.loaded.exchange.write(vector)
        resident.loaded.model.eval()
        sample[name] = resident.task.respond(
            resident.loaded.model, record.text, tokens_max=plan.federation.task.new_tokens_max
        )
    return [sample]
