"""FedBuff or waiting for everybody? Simulated time to one accuracy, where some sites are slow.

Ten sites share the 11,982 ICD-10-CM titles of examples/icd10; two of them compute ten times as
slowly as the others, which take a minute for a round. MiniLM with LoRA of rank 8, as in
benchmarks/lora_rules.py; AdamW at 8e-3, 5 steps of 16 titles a round. The synchronous run waits for
all ten. The asynchronous one closes a round with five updates, whoever sends them. Accuracy is that
on the first 1,000 pooled validation titles, measured after every round beside the clock.

The target is what the synchronous run has after its last round. About 15 minutes a seed on 2 cores.

    python -m benchmarks.asynchrony [--json FILE.json] [--seeds 7 8] [--rounds 6]
"""

import argparse
import statistics
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, machine_facts, publish
from intramural.client.agent import SiteAgent
from intramural.core.config import check_config, read_table
from intramural.core.federation import FederationConfig
from intramural.core.messages import Evaluated, EvaluateRequest
from intramural.core.metrics import metrics_of
from intramural.core.site import load_site
from intramural.server.checkpoint import load_checkpoint
from intramural.server.run import CHECKPOINTS
from intramural.server.watcher import Watcher
from intramural.simulations.comparison import open_agent
from intramural.simulations.scenario import Scenario
from intramural.simulations.simulate import Simulation, simulate
from intramural.simulations.sites import POOLED, Deal

HERE = Path(__file__).parent.parent / "examples" / "icd10"
SITES, BUFFER, STALENESS_MAX = 10, 5, 20
RATIO_MAX = 0.6
"""What FedBuff may take of the synchronous run's simulated time."""
ROUNDS_MAX = 40
"""Asynchronous rounds for each synchronous one, at most."""
RECORDS = 1000
PARTITIONS = ("iid", "dirichlet:0.3")
SCENE: dict[str, Any] = {
    "name": "ten-times-slower",
    "about": "Two of ten sites compute ten times as slowly as the others.",
    "train_s": 60.0,
    "groups": [
        {"name": "fast", "share": 0.8, "jitter": 0.1, "latency_s": 0.02},
        {"name": "slow", "share": 0.2, "jitter": 0.1, "latency_s": 0.02, "slowness": 10.0},
    ],
}


class Reached(Exception):
    """The accuracy is there; the rest of the run is of no interest."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where a run was after a round."""

    at_s: float
    """Simulated seconds since its start."""
    accuracy: float


class Meter(Watcher):
    """Measures the arrays of each round, and stops the run at an accuracy."""

    def __init__(self, folder: Path, federation: FederationConfig, *, until: float) -> None:
        """Watch the run in `folder`."""
        self._folder = folder
        self._federation = federation
        self._until = until
        self._agent: SiteAgent | None = None
        self.points: list[Point] = []

    def committed(self, record: dict[str, Any]) -> None:
        """Evaluate on everybody's validation records."""
        checkpoint, _ = load_checkpoint(self._folder / CHECKPOINTS)
        assert checkpoint is not None
        if self._agent is None:
            self._agent = open_agent(self._folder / POOLED / "site.toml", self._federation)
        request = EvaluateRequest(
            manifest=self._federation.digest,
            round=record["round"],
            layout=self._agent.layout.digest,
            split="validation",
            vector=checkpoint.vector,
        )
        reply = self._agent.answer(request)
        assert isinstance(reply, Evaluated), reply
        accuracy = metrics_of("classification", reply.sums)["accuracy"]
        self.points.append(Point(at_s=record["scenario"]["at_s"], accuracy=accuracy))
        if accuracy >= self._until:
            raise Reached


def points_of(
    partition: str, seed: int, *, rounds: int, buffer: int | None, until: float, folder: Path
) -> list[Point]:
    """Run one federation and return what it had after each round."""
    table = read_table(HERE / "federation.toml")
    table["federation"] |= {"rounds": rounds, "seed": seed}
    table["training"] |= {"schedule": "constant"}  # both have it, however many rounds they take
    table["sites"] = {"min": SITES}
    table["evaluation"] = {"every": 0, "records_max": RECORDS}
    if buffer is not None:
        table["asynchrony"] = {"buffer": buffer, "staleness_max": STALENESS_MAX}
    federation = check_config(table, FederationConfig, source="benchmark")
    site = load_site(HERE / "site.toml")
    compute = site.compute.model_copy(update={"threads": 1, "device": "cpu"})
    deal = Deal(
        federation=federation,
        template=site.model_copy(update={"compute": compute}),
        sites=SITES,
        partition=partition,
        folder=folder,
    )
    meter = Meter(folder, federation, until=until)
    scene = check_config(SCENE, Scenario, source="benchmark")
    with suppress(Reached):
        simulate(Simulation(deal=deal, compare=frozenset(), scenario=scene), watcher=meter)
    return meter.points


def reached_s(points: list[Point], accuracy: float) -> float | None:
    """Return when an accuracy was first there, in simulated seconds."""
    return next((point.at_s for point in points if point.accuracy >= accuracy), None)


def rows_of(partition: str, seeds: list[int], *, rounds: int) -> list[Row]:
    """Return a partition's results."""
    ratios: list[float] = []
    told: list[str] = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            waits = points_of(
                partition, seed, rounds=rounds, buffer=None, until=2.0, folder=Path(folder) / "a"
            )
            target = waits[-1].accuracy
            buffered = points_of(
                partition,
                seed,
                rounds=ROUNDS_MAX * rounds,
                buffer=BUFFER,
                until=target,
                folder=Path(folder) / "b",
            )
        waited_s, took_s = reached_s(waits, target), reached_s(buffered, target)
        assert waited_s is not None
        ratios.append(float("inf") if took_s is None else took_s / waited_s)
        told.append(
            f"seed {seed}: accuracy {target:.3f} after {waited_s:.0f} s; FedBuff {took_s or 0:.0f} "
            f"s, {len(buffered)} rounds"
        )
        print(f"{partition} {told[-1]}", flush=True)
    ratio = statistics.median(ratios)
    return [
        Row(
            name=f"FedBuff's simulated time to the synchronous accuracy, {partition}",
            value=ratio,
            unit="of the synchronous run's",
            target=f"<= {RATIO_MAX}",
            ok=ratio <= RATIO_MAX,
            peer="; ".join(told),
            samples=ratios,
        )
    ]


def main() -> None:
    """Run, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8])
    parser.add_argument("--rounds", type=int, default=6, help="of the synchronous run")
    options = parser.parse_args()
    machine = machine_facts()
    rows = [row for p in PARTITIONS for row in rows_of(p, options.seeds, rounds=options.rounds)]
    publish("Asynchrony", rows, machine=machine, path=options.json)


if __name__ == "__main__":
    main()
