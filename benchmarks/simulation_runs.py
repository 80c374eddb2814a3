"""One engine on one workload, in a process of its own: rounds timed beside the loop by hand.

After each of the engine's rounds the loop by hand makes the same round in this process, so that
both meet the same machine. The engine `hand` is that loop alone. Prints one JSON object.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.simulation_work import WORKS, Floor, Work, records_by_hand
from intramural.client.simulated import simulated_agent
from intramural.core.canonical import digest_vector
from intramural.core.seeds import generator
from intramural.core.site import simulated_name
from intramural.server.checkpoint import load_checkpoint
from intramural.server.run import CHECKPOINTS
from intramural.server.watcher import Watcher
from intramural.simulations.engines import ENGINES, Engine, run_engine
from intramural.simulations.engines import Work as EngineWork
from intramural.simulations.sites import Deal, deal

HAND = "hand"
"""As an engine: the loop by hand alone."""


@dataclass
class Beside(Watcher):
    """Times an engine's rounds; after each, the loop by hand runs the same one."""

    floor: Floor | None
    engine_s: list[float] = field(default_factory=list)
    floor_s: list[float] = field(default_factory=list)
    _since: float = field(default_factory=time.perf_counter)

    def opened(self, round_: int, sites: Sequence[str]) -> None:
        """A round begins."""
        self._since = time.perf_counter()

    def committed(self, record: dict[str, Any]) -> None:
        """A round is over."""
        now = time.perf_counter()
        self.engine_s.append(now - self._since)
        if self.floor is not None:
            began = time.perf_counter()
            self.floor.run_round(record["sites"])
            self.floor_s.append(time.perf_counter() - began)


def run(
    work: Work,
    engine: Engine,
    *,
    rounds: int,
    folder: Path,
    runs: Path,
    by_hand: bool,
    partition: str,
) -> dict[str, Any]:
    """Run an engine and return seconds of each round, and how far the two ends are apart."""
    torch.set_num_threads(1)
    federation = work.federation(rounds=rounds)
    template = work.template(folder)
    plan = Deal(
        federation=federation,
        template=template,
        sites=work.clients,
        partition=partition,
        folder=runs,
    )
    deal(plan)
    floor = Floor(work, federation, template) if by_hand else None
    if floor is not None:
        for number in range(work.clients):
            agent = simulated_agent(plan.folder / "sites", number, work.clients, federation)
            floor.hold(agent.name, agent.records_of("train"))
    watcher = Beside(floor)
    run_engine(EngineWork(deal=plan, engine=engine, workers=2), watcher=watcher)
    checkpoint, _ = load_checkpoint(plan.folder / CHECKPOINTS)
    assert checkpoint is not None
    apart = None
    if floor is not None:
        apart = float(np.max(np.abs(checkpoint.vector - floor.vector())))
    return {
        "engine_s": watcher.engine_s,
        "floor_s": watcher.floor_s,
        "apart": apart,
        "digest": digest_vector(checkpoint.vector),
    }


def run_by_hand(work: Work, *, rounds: int, folder: Path, out: Path | None) -> dict[str, Any]:
    """Run the loop by hand alone; return seconds of each round.

    Args:
        work: What to train.
        rounds: How many.
        folder: Of data and base model.
        out: Where to write the workload for other simulators; None: nowhere.
    """
    torch.set_num_threads(1)
    federation, template = work.federation(rounds=rounds), work.template(folder)
    floor = Floor(work, federation, template)
    records = list(records_by_hand(work, folder))
    names = [simulated_name(number, work.clients) for number in range(work.clients)]
    if out is not None:
        for name, held in zip(names, records, strict=True):
            floor.hold(name, held)
        floor.hand_out(out, folder / work.base)
    seconds: list[float] = []
    for round_ in range(1, rounds + 1):
        rng = generator(federation.federation.seed, "by hand", round_)
        cohort = sorted(rng.choice(work.clients, size=work.per_round, replace=False).tolist())
        for number in cohort:
            if names[number] not in floor.clients:
                floor.hold(names[number], records[number])
        began = time.perf_counter()
        floor.run_round([names[number] for number in cohort])
        seconds.append(time.perf_counter() - began)
    return {"floor_s": seconds, "parameters": floor.size}


def note_first_step() -> list[float]:
    """Return a list that will hold when a model was first trained here, by `time.monotonic`."""
    seen: list[float] = []

    def note(module: Any, inputs: Any) -> None:
        del inputs
        if module.training and torch.is_grad_enabled() and not seen:
            seen.append(time.monotonic())
            hook.remove()

    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    return seen


def main() -> None:
    """Run one engine on one workload, and print what was measured."""
    parser = argparse.ArgumentParser(prog="benchmarks.simulation_runs", description=__doc__)
    parser.add_argument("work", choices=sorted(WORKS))
    parser.add_argument("engine", choices=[*ENGINES, HAND])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--clients", type=int, help="of the population")
    parser.add_argument("--per-round", type=int)
    parser.add_argument("--draw", type=int, help="records of a client, drawn and not dealt")
    parser.add_argument("--alone", action="store_true", help="without the loop by hand")
    parser.add_argument("--folder", type=Path, help="keep data and base model here")
    parser.add_argument("--out", type=Path, help="hand: write the workload for others here")
    options = parser.parse_args()
    work = WORKS[options.work]
    changes = {"clients": options.clients, "per_round": options.per_round}
    work = replace(work, **{name: value for name, value in changes.items() if value})
    first = note_first_step()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if options.engine == HAND:
            found = run_by_hand(work, rounds=options.rounds, folder=folder, out=options.out)
        else:
            found = run(
                work,
                options.engine,
                rounds=options.rounds,
                folder=folder,
                runs=Path(temporary) / "run",
                by_hand=not options.alone,
                partition=f"draw:{options.draw}" if options.draw else "iid",
            )
    print(json.dumps(found | {"first_s": first[0] if first else None}))


if __name__ == "__main__":
    main()
