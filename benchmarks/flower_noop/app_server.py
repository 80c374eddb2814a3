"""Flower's side of `benchmarks/round_floor.py`: stock FedAvg that notes when rounds begin."""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run rounds and leave the times at which they began, and the end."""
    config = context.run_config
    elements, rounds = int(config["elements"]), int(config["rounds"])
    times: list[float] = []

    class Timed(FedAvg):
        def configure_train(self, *args: Any, **rest: Any) -> Iterable[Message]:
            """Note the time."""
            times.append(time.perf_counter())
            return super().configure_train(*args, **rest)

    start = np.random.default_rng(0).random(elements, dtype=np.float32)
    Timed(fraction_evaluate=0.0).start(
        grid=grid, initial_arrays=ArrayRecord([start]), num_rounds=rounds
    )
    times.append(time.perf_counter())
    Path(str(config["out"])).write_text(json.dumps(times))
