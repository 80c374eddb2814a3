"""Flower's own simulation, on Ray with two actors of one processor and one thread each.

The model is built once an actor, and records lie in each actor's memory. Prints one JSON object.

    BENCHMARK_HANDED=FOLDER python -m benchmarks.peers.simulation_flower --rounds 6
"""

import argparse
import json
import logging
import os
import time
from collections.abc import Iterable
from functools import lru_cache
from importlib import import_module
from importlib.metadata import version
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn

from benchmarks.peers.workload import Handed, build_model, load, train, trained

ACTORS = 2
STORE_BYTES = 2 * 10**9
"""Of Ray's object store; it takes what it uses."""
client_app = ClientApp()


@lru_cache(maxsize=1)
def work_of_actor() -> tuple[Handed, nn.Module]:
    """Return records and model of this process."""
    torch.set_num_threads(1)
    handed = load()
    return handed, build_model(handed)


@client_app.train()
def train_client(message: Message, context: Context) -> Message:
    """Train one client's round."""
    handed, model = work_of_actor()
    arrays = cast(ArrayRecord, message.content["arrays"])
    model.load_state_dict(arrays.to_torch_state_dict(), strict=False)
    began_s = time.monotonic()
    client = int(context.node_config["partition-id"])
    loss = train(handed, model, trained(model).values(), client)
    metrics = MetricRecord(
        {
            "num-examples": len(handed.classes[client]),
            "loss": loss,
            "began_s": began_s,
            "threads": torch.get_num_threads(),
        }
    )
    arrays = ArrayRecord({n: p.detach() for n, p in trained(model).items()})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


class Timed(FedAvg):
    """FedAvg with a clock: from choosing the clients to the new arrays."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.rounds_s: list[float] = []
        self.first_s = 0.0
        self.threads: set[int] = set()
        self._since = 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Choose the round's clients."""
        self._since = time.perf_counter()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the round's replies."""
        held = list(replies)
        found = super().aggregate_train(server_round, held)
        self.rounds_s.append(time.perf_counter() - self._since)
        told: list[Any] = [reply.content["metrics"] for reply in held]
        self.threads |= {int(metrics["threads"]) for metrics in told}
        if server_round == 1:
            self.first_s = min(float(metrics["began_s"]) for metrics in told)
        return found


def run(rounds: int) -> dict[str, Any]:
    """Run the simulation; return seconds of each round, and when the first training began."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    handed = load(rounds=rounds)
    strategy = Timed(
        fraction_train=handed.per_round / handed.clients,
        fraction_evaluate=0.0,
        min_train_nodes=handed.per_round,
        min_available_nodes=handed.clients,
    )
    parameters = 0
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        nonlocal parameters
        model = build_model(handed)
        parameters = sum(p.numel() for p in trained(model).values())
        arrays = ArrayRecord({n: p.detach() for n, p in trained(model).items()})
        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=rounds)

    run_simulation(
        server_app,
        client_app,
        handed.clients,
        backend_config={
            "init_args": {
                "num_cpus": ACTORS,
                "log_to_driver": False,
                "object_store_memory": STORE_BYTES,
                "_temp_dir": os.environ["TMPDIR"],
            },
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    return {
        "rounds_s": strategy.rounds_s,
        "first_s": strategy.first_s,
        "parameters": parameters,
        "threads": sorted(strategy.threads),
        "versions": f"flwr {version('flwr')}, ray {version('ray')}",
    }


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.peers.simulation_flower", description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    # By its name: actors then import this module, and do not get a new copy with every message.
    found = import_module("benchmarks.peers.simulation_flower").run(options.rounds)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
