"""Keeping: what a site brings to a round of its own, and keeps of it: what personal rules need.

Personal parameters, SCAFFOLD's control variate of the site, and Ditto's own model lie in the site's
memory. None of it leaves: what is sent is a part of the coordinator's layout alone.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from intramural.client.memory import SiteMemory
from intramural.core.errors import DataRefused
from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout, Vector
from intramural.core.messages import EvaluateRequest, TrainRequest
from intramural.core.route import PERSONAL_B
from intramural.models.job import Job
from intramural.models.personal import fine_tune, own_plan, train_beside
from intramural.models.resident import Resident

OWN, CONTROL_OWN, MODEL, FINAL = "own", "control", "model", "final"
"""Names in a memory: personal parameters; the site's control variate; all that is trained of the
site's own model; the coordinator's vector as the last test brought it."""


def has_own_model(federation: FederationConfig) -> bool:
    """Return whether each site ends with a model of its own."""
    exchange, rule = federation.exchange, federation.strategy.rule
    return federation.personal is not None or bool(exchange.personal) or rule in PERSONAL_B


class Keeping:
    """One site's memory, put to use."""

    def __init__(self, federation: FederationConfig, memory: SiteMemory) -> None:
        """Take what the federation asks to be kept, and where."""
        self._federation = federation
        self._memory = memory

    def prepared(self, resident: Resident, job: Job, request: TrainRequest) -> Job:
        """Return the job with what earlier rounds left.

        SCAFFOLD: each step's gradient g becomes g - c_i + c. Karimireddy et al. 2020, algorithm 1,
        https://arxiv.org/abs/1910.06378.

        Raises:
            DataRefused: What was kept is of another shape, or cannot be read.
        """
        exchange = resident.loaded.exchange
        controls = exchange.controls(request.vector)
        if not controls and not exchange.own_layout.size:
            return job
        kept = self._memory.before(request.run, request.round)
        shift = None
        if controls:
            mine = job.up.unflatten(_of(kept, CONTROL_OWN, job.up))
            shift = {name: control - mine[name] for name, control in controls.items()}
        own = _of(kept, OWN, exchange.own_layout) if OWN in kept else None
        return replace(job, own=own, shift=shift)

    def keep(self, resident: Resident, job: Job, request: TrainRequest, delta: Vector) -> None:
        """Keep what a round left, on disk before its update leaves.

        Args:
            resident: The model, as `run_job` left it; with Ditto the site's own is trained on it.
            job: As `prepared`.
            request: The round's.
            delta: What training changed, shape `(job.up.size,)`.

        Raises:
            Refused: The disk does not take it.
            TrainingError: The site's own model cannot be trained.
        """
        exchange, personal = resident.loaded.exchange, self._federation.personal
        found: dict[str, Vector] = {}
        if exchange.own_layout.size:
            found[OWN] = exchange.read_own()
        if job.shift is not None:
            found[CONTROL_OWN] = _next_control(job, delta)
        if personal is not None and personal.kind == "ditto":
            kept = self._memory.before(request.run, request.round)
            own = _of(kept, MODEL, exchange.trained_layout) if MODEL in kept else None
            mine = replace(job, plan=own_plan(self._federation, job.plan))
            found[MODEL] = train_beside(resident, mine, request.vector, own)
        if found:
            self._memory.write(request.run, request.round, found)

    def write(self, resident: Resident, request: EvaluateRequest) -> None:
        """Set the model to what a request brings, with the site's own part of it.

        A test's vector is the final one: it is kept, so that the site can have its own model.
        """
        exchange, own = resident.loaded.exchange, None
        if has_own_model(self._federation):
            kept = self._memory.before(request.run, request.round + 1)
            own = _of(kept, OWN, exchange.own_layout) if OWN in kept else None
            if request.split == "test":
                final = {FINAL: np.asarray(request.vector)}
                self._memory.write(request.run, request.round, {**kept, **final})
        exchange.write(request.vector, own)

    def write_own_model(self, resident: Resident, run: str | None) -> str:
        """Set the model to the site's own one at the end of a run; return the run.

        Args:
            resident: The model.
            run: None: the last one.

        Raises:
            DataRefused: There is no such run, it is not over, or the site was not asked to test.
        """
        exchange, runs = resident.loaded.exchange, self._memory.runs()
        if not runs or run not in (None, *runs):
            known = ", ".join(runs) or "none"
            raise DataRefused(f"the site keeps nothing of such a run; it has: {known}")
        run = run or runs[-1]
        kept = self._memory.before(run, self._federation.federation.rounds + 1)
        if FINAL not in kept:
            raise DataRefused(
                "the site has not been sent the final arrays yet: a run's last test brings them, "
                "under [privacy] only with privacy.metrics_noise"
            )
        _write_kept(resident, kept, _of(kept, FINAL, exchange.layout))
        return run

    def write_personal(self, resident: Resident, job: Job, request: EvaluateRequest) -> None:
        """Set the model to the site's own one: as Ditto left it, or fine-tuned now.

        A site that took part in no round has none of Ditto's: its own is the federation's.

        Raises:
            TrainingError: It cannot be tuned.
            Refused: The disk does not take it.
        """
        personal = self._federation.personal
        assert personal is not None
        kept = self._memory.before(request.run, request.round + 1)
        if personal.kind == "fine-tune":
            mine = replace(job, plan=own_plan(self._federation, job.plan))
            found = fine_tune(resident, mine, request.vector)
            self._memory.write(request.run, request.round, {**kept, MODEL: found})
            return
        _write_kept(resident, kept, request.vector)


def _write_kept(resident: Resident, kept: Mapping[str, Vector], vector: Vector) -> None:
    """Set the model to the coordinator's vector, with all that the site keeps of its own."""
    exchange = resident.loaded.exchange
    exchange.write(vector, _of(kept, OWN, exchange.own_layout) if OWN in kept else None)
    if MODEL in kept:
        exchange.write_trained(_of(kept, MODEL, exchange.trained_layout))


def _next_control(job: Job, delta: Vector) -> Vector:
    """Return c_i - c - delta / (K * rate): option II, with the delta that is sent."""
    assert job.shift is not None
    training = job.plan.training
    way = np.float32(1 / (job.plan.steps(len(job.tokens)) * training.learning_rate))
    found = np.multiply(delta, -way, dtype=np.float32)
    for name, part in job.up.unflatten(found).items():
        np.subtract(part, job.shift[name], out=part)
    return found


def _of(kept: Mapping[str, Vector], name: str, layout: Layout) -> Vector:
    """Return one kept vector; zeros where nothing is.

    Raises:
        DataRefused: It is of another shape.
    """
    found = kept.get(name)
    if found is None:
        return np.zeros(layout.size, dtype=np.float32)
    if found.shape != (layout.size,) or found.dtype != np.float32:
        raise DataRefused(
            "what the site keeps of the run is of another shape than its model now; set "
            "compute.rank back, or remove the run's folder in the site's memory"
        )
    return found
