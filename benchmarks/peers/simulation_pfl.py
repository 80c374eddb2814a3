"""pfl's simulation in one process with one thread, without evaluation. Prints one JSON object.

Runs in an environment of its own, which `make bench-peers` makes.

    BENCHMARK_HANDED=FOLDER .venv-peers/bin/python -m benchmarks.peers.simulation_pfl --rounds 6
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import sys
import time
from importlib.metadata import version
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend  # type: ignore[import-not-found]
from pfl.aggregate.weighting import WeightByDatapoints  # type: ignore[import-not-found]
from pfl.algorithm.base import NNAlgorithmParams  # type: ignore[import-not-found]
from pfl.algorithm.federated_averaging import FederatedAveraging  # type: ignore[import-not-found]
from pfl.callback.base import TrainingProcessCallback  # type: ignore[import-not-found]
from pfl.data.dataset import Dataset  # type: ignore[import-not-found]
from pfl.data.federated_dataset import FederatedDataset  # type: ignore[import-not-found]
from pfl.data.sampling import get_user_sampler  # type: ignore[import-not-found]
from pfl.hyperparam.base import (  # type: ignore[import-not-found]
    NNEvalHyperParams,
    NNTrainHyperParams,
)
from pfl.metrics import Metrics  # type: ignore[import-not-found]
from pfl.model.pytorch import PyTorchModel  # type: ignore[import-not-found]
from torch import Tensor, nn

from benchmarks.peers.workload import Handed, build_model, load, loss_of, trained


class Trained(nn.Module):
    """The model with the two methods that pfl asks for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, ids: Tensor, classes: Tensor) -> Tensor:
        """Return a batch's mean loss."""
        self.train()
        return loss_of(self.model, ids, classes)

    def metrics(self, ids: Tensor, classes: Tensor) -> dict[str, Any]:
        """Return nothing: the benchmark does not evaluate."""
        del ids, classes
        return {}


class Unevaluated(FederatedAveraging):  # type: ignore[misc]
    """Federated averaging that evaluates at no round, not even the first."""

    def get_next_central_contexts(self, *args: Any, **kwargs: Any) -> Any:
        """Return the next round's contexts."""
        contexts, model, metrics = super().get_next_central_contexts(*args, **kwargs)
        if contexts is not None:
            contexts = tuple(dataclasses.replace(c, do_evaluation=False) for c in contexts)
        return contexts, model, metrics


class Clock(TrainingProcessCallback):  # type: ignore[misc]
    """Notes each round's seconds."""

    def __init__(self) -> None:
        self.rounds_s: list[float] = []
        self._since = 0.0

    def on_train_begin(self, *, model: Any) -> Any:
        """The first round begins."""
        del model
        self._since = time.perf_counter()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Any, model: Any, *, central_iteration: int
    ) -> tuple[bool, Any]:
        """A round is over."""
        del aggregate_metrics, model, central_iteration
        now = time.perf_counter()
        self.rounds_s.append(now - self._since)
        self._since = now
        return False, Metrics()


def run(handed: Handed) -> dict[str, Any]:
    """Run the simulation; return seconds of each round."""
    net = Trained(build_model(handed))
    parameters = list(trained(net).values())
    model = PyTorchModel(
        net,
        lambda _, lr: torch.optim.SGD(parameters, lr=lr),
        torch.optim.SGD(parameters, lr=1.0),
    )

    def records_of(client: int) -> Any:
        return Dataset([handed.ids[client], handed.classes[client]], user_id=str(client))

    sampler = get_user_sampler("random", list(range(handed.clients)))
    data = FederatedDataset(records_of, sampler)
    backend = SimulatedBackend(
        training_data=data, val_data=data, postprocessors=[WeightByDatapoints()]
    )
    clock = Clock()
    Unevaluated().run(
        NNAlgorithmParams(
            central_num_iterations=handed.rounds,
            evaluation_frequency=10**9,
            train_cohort_size=handed.per_round,
            val_cohort_size=None,
        ),
        backend,
        model,
        NNTrainHyperParams(
            local_batch_size=handed.batch,
            local_num_epochs=None,
            local_num_steps=handed.steps,
            local_learning_rate=handed.learning_rate,
            local_max_grad_norm=None,
        ),
        NNEvalHyperParams(local_batch_size=handed.batch),
        callbacks=[clock],
    )
    return {
        "rounds_s": clock.rounds_s,
        "parameters": sum(p.numel() for p in parameters),
        "threads": [torch.get_num_threads()],
        "versions": f"pfl {version('pfl')}, torch {version('torch')}",
    }


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.peers.simulation_pfl", description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    with contextlib.redirect_stdout(sys.stderr):  # it tells of its rounds there
        found = run(load(rounds=options.rounds))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
