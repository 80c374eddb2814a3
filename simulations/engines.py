"""Engines: what carries a simulation's messages. The apps, the agent and the rounds are the same.

inprocess: one after the other in this process.
pool: on worker processes, which keep model and tokens.
batched: many small models in one step, where their shapes allow it.
ray: Flower's own simulation, for several machines.
auto: inprocess or pool, by the time of one site's round.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from flwr.serverapp import Grid

from intramural.core.errors import ConfigError
from intramural.core.layout import Vector, lent_by
from intramural.core.messages import Refusal, TrainRequest
from intramural.core.pages import keep_freed_memory
from intramural.server.export import beginning
from intramural.server.machine import share_of
from intramural.server.run import SITES_KEY, RunPlan, run_federation
from intramural.server.setting import Setting
from intramural.server.watcher import Watcher
from intramural.simulations.comparison import open_form, open_site
from intramural.simulations.processors import worker_count
from intramural.simulations.scenario import Scenario
from intramural.simulations.sites import Deal

if TYPE_CHECKING:
    from intramural.simulations.grid import Observe

Engine = Literal["auto", "inprocess", "pool", "batched", "ray"]
ENGINES: tuple[str, ...] = get_args(Engine)
POOL_START_S = 4.0
"""About what a worker takes to load torch and build a model."""
COPY_BYTES_S = 2e9
"""About how fast a vector goes to a worker and back."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """A dealt simulation, and what runs it."""

    deal: Deal
    engine: Engine
    workers: int | None = None
    """Processes of the pool; None: one for each GPU, or as many as fit the processors."""
    scenario: Scenario | None = None
    holdout: Path | None = None
    """holdout.toml of the coordinator's own records, where [gate] judges by them."""
    observe: "Observe | None" = None
    """Told of each delivery; no engine but Ray, which has its own, leaves one out."""

    @property
    def sites_folder(self) -> Path:
        """Where the sites lie."""
        return (self.deal.folder / "sites").resolve()


def run_engine(work: Work, *, watcher: Watcher) -> None:
    """Run the rounds, unless they are all done; the run's files are then in the deal's folder.

    Raises:
        ConfigError: The engine does not fit the simulation.
        IntramuralError: As `run_federation`.
    """
    if work.engine == "auto":
        engine, why = choose(work)
        watcher.noticed(f"--engine {engine}: {why}")
        work = replace(work, engine=engine)
    run = RunPlan(
        federation=work.deal.federation,
        folder=work.deal.folder,
        places=work.deal.template.model,
        holdout=work.holdout,
        resume=True,
        engine=work.engine,
        patience_s=0.0,
        durable=False,
    )
    settings = run.to_config() | {SITES_KEY: str(work.sites_folder)}
    if work.engine == "ray":
        _run_on_ray(work, settings, watcher)
        return
    with _grid(work, settings) as grid:
        if work.scenario is not None:
            from intramural.simulations.scenario_run import run_scenario

            run_scenario(run, grid, work.scenario, watcher=watcher)
        else:
            run_federation(run, grid, watcher=watcher, adapt=_adapt_to(work))


def _adapt_to(work: Work) -> Callable[[Setting], Setting]:
    """Return what fits the coordinator to the engine: sites that nobody greets, memory let go."""
    crowd = work.deal.sites if work.deal.is_crowd else None

    selection = work.deal.federation.sites.selection
    if crowd is not None and selection != "uniform":
        raise ConfigError(
            f"sites.selection = {selection!r} looks at every site, and {crowd} are too many; "
            "use 'uniform', or fewer sites"
        )

    def adapt(setting: Setting) -> Setting:
        if work.engine == "pool":  # its workers have models of their own; here one is in the way
            from intramural.models.resident import forget_models

            forget_models()
        return replace(setting, crowd=crowd)

    return adapt


@contextmanager
def _grid(work: Work, settings: dict[str, Any]) -> Iterator[Grid]:
    nodes = work.deal.sites
    if work.engine == "pool":
        from intramural.simulations.pool import PoolGrid
        from intramural.simulations.pool_nursery import LIBRARIES

        compute = work.deal.template.compute
        pool = PoolGrid(
            nodes,
            run_config=settings,
            workers=work.workers,
            threads=compute.threads or 1,
            device=compute.device,
            observe=work.observe,
            log=work.deal.folder / "workers.log",
            libraries=LIBRARIES,
        )
        with pool, lent_by(pool.lend):
            yield pool
        return
    from intramural.client.app import app, prepare
    from intramural.simulations.inprocess import InProcessGrid, lend

    keep_freed_memory()  # all: the pool's workers, which are several, keep a part

    grid: Grid
    if work.engine == "batched":
        from intramural.simulations.batched import BatchedGrid, check_batched

        template = work.deal.template
        check_batched(work.deal.federation, places=template.model, device=template.compute.device)
        grid = BatchedGrid(app, nodes, run_config=settings, observe=work.observe)
    else:
        grid = InProcessGrid(app, nodes, run_config=settings, observe=work.observe, prepare=prepare)
    with lent_by(lend):
        yield grid


def _run_on_ray(work: Work, settings: dict[str, Any], watcher: Watcher) -> None:
    if work.deal.is_crowd:
        raise ConfigError(
            f"--engine ray greets every site, and {work.deal.sites} are too many; use --engine pool"
        )
    from intramural.simulations.ray_engine import run_on_ray

    run_on_ray(
        settings,
        nodes=work.deal.sites,
        threads=work.deal.template.compute.threads or 1,
        folder=work.deal.folder,
        watcher=watcher,
    )


def choose(work: Work) -> tuple[Engine, str]:
    """Return the engine that should be faster, and why, from one site's round without privacy.

    The probe charges no ledger: it trains without [privacy], and forgets what came of it.
    """
    sites = work.deal.federation.sites
    cohort = max(sites.min, share_of(sites.share, work.deal.sites))
    compute = work.deal.template.compute
    room = worker_count(threads=compute.threads or 1, device=compute.device)
    processes = min(work.workers or room, cohort)
    if processes < 2:
        return "inprocess", "there is room for one worker, or one site a round"
    first = beginning(work.deal.federation, work.deal.template.model)
    round_s = _probe(work, first.vector)
    copies_s = 2 * first.layout.nbytes / COPY_BYTES_S
    updates = cohort * work.deal.federation.federation.rounds
    alone_s = updates * round_s
    pool_s = POOL_START_S + updates * (round_s / processes + copies_s)
    told = f"a site's round takes {1000 * round_s:.3g} ms"
    if pool_s < alone_s:
        return "pool", f"{told}, worth {processes} processes"
    return "inprocess", f"{told}, which {processes} processes would not make up for"


def _probe(work: Work, start: Vector) -> float:
    """Return seconds of a site's second round; the first one warms up."""
    from intramural.client.simulated import simulated_agent

    federation = open_form(work.deal.federation)
    agent = simulated_agent(work.sites_folder, 0, work.deal.sites, federation, change=open_site)
    request = TrainRequest(
        manifest=federation.digest, round=1, layout=agent.layout.digest, vector=start
    )
    for _ in range(2):
        began = time.perf_counter()
        reply = agent.answer(request)
        if isinstance(reply, Refusal):
            raise ConfigError(f"--engine auto: {agent.name}: {reply.detail}; name an engine")
    return time.perf_counter() - began
