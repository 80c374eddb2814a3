"""FedNova: averaging that does not favour the sites that make more steps."""

from math import expm1, fsum, log1p

import numpy as np

from intramural.core.errors import AggregationError, ConfigError
from intramural.core.federation import FederationConfig, Training
from intramural.core.layout import Layout, Vector, written_to_send
from intramural.core.messages import Update
from intramural.strategies.exact_sum import ExactSum
from intramural.strategies.fedavg import FRACTION_BITS, FedAvg
from intramural.strategies.kind import Kind, whole_option
from intramural.strategies.rule import Fold, Rule, State, Traits

STEPS, STEPS_MAX = "steps_max", 10_000
"""Key of strategy.options, and its default: most steps that a site can say, where nothing else
bounds them."""


def step_norm(training: Training, steps: int) -> float:
    """Return |a|_1: how far `steps` local steps go, in gradients, with the site's optimizer.

    SGD: the steps; with momentum r: `(t - r (1 - r**t) / (1 - r)) / (1 - r)`; with a proximal term
    of mu, whose a = learning_rate * mu: `(1 - (1 - a)**t) / a`. AdamW has no such number, for it
    scales each coordinate; its steps are taken. A learning rate that changes is taken for constant.

    Source: Wang et al. 2020, https://arxiv.org/abs/2007.07481.
    """
    if training.optimizer != "sgd":
        return float(steps)
    if training.momentum:
        r = training.momentum
        return float((steps - r * (1 - r**steps) / (1 - r)) / (1 - r))
    if training.proximal:
        a = training.learning_rate * training.proximal
        assert a < 1, "checked"
        return -expm1(steps * log1p(-a)) / a  # as the formula, but exact where a is tiny
    return float(steps)


class FedNova:
    """next = current + (sum_k p_k |a_k|) * sum_k p_k delta_k / |a_k|, p_k = w_k / sum_k w_k.

    |a_k| is `step_norm` of the steps that site k says it made; where all make the same, this is
    FedAvg. It corrects for unequal numbers of steps, not for sites whose records differ. A site's
    word for its steps is held against the manifest, and against its weight where records are
    counted. Where neither fixes them it is taken, up to `steps_max`: one that says too few pulls
    further, one that says too many has all pull further.

    Source: Wang et al. 2020, https://arxiv.org/abs/2007.07481.
    """

    name = "fednova"
    traits = Traits(
        sums_only=False,  # each update is scaled by its own steps before it is added
        exact_for_lora=False,
        mixed_ranks=False,
        byzantine=False,
        record_dp=False,  # the manifest fixes the steps, so that there is nothing to correct
    )

    def __init__(self, mean: FedAvg, training: Training, *, steps_max: int = STEPS_MAX) -> None:
        """Weigh sites as `mean` does."""
        self._mean = mean
        self._training = training
        self._steps_max = steps_max

    def begin(self, state: State, current: Vector, *, round: int) -> Fold:
        """Open a round; it holds two models of memory and an update."""
        total = ExactSum(current.size, fraction_bits=FRACTION_BITS[self._mean.weights])
        lengths: list[float] = []
        return Fold(round=round, current=current, state=state, work=(total, lengths))

    def add(self, fold: Fold, update: Update) -> None:
        """Fold one update in, exactly.

        Raises:
            AggregationError: It does not say its steps, or they cannot be so many; or as
                `FedAvg.add`.
        """
        if update.steps is None or update.steps < 1:
            raise AggregationError("update does not say how many steps are behind it")
        if (fixed := self._steps_of(update)) is not None and update.steps != fixed:
            raise AggregationError(f"update says {update.steps} steps, and they must be {fixed}")
        if update.steps > self._steps_max:
            raise AggregationError(
                f"update says {update.steps} steps; strategy.options.{STEPS} is {self._steps_max}"
            )
        weight, length = self._mean.weight_of(update), step_norm(self._training, update.steps)
        if weight < 1:
            raise AggregationError(f"update weighs {weight!r} records; it must be at least 1")
        total, lengths = fold.work
        total.add(update.delta, weight / length)
        lengths.append(weight * length)
        fold.weight += weight
        fold.sites.append(update.site)

    def _steps_of(self, update: Update) -> int | None:
        """Return how many steps must be behind an update, where that is known."""
        training = self._training
        if training.local_steps is not None:
            return training.local_steps
        if self._mean.weights != "examples":
            return None
        return (training.local_epochs or 0) * -(-update.weight // training.batch_size)

    def finish(self, fold: Fold) -> tuple[Vector, State]:
        """Return the next arrays.

        Raises:
            AggregationError: No update was added.
        """
        if not fold.sites:
            raise AggregationError("no update to aggregate; lower sites.min or wait for sites")
        total, lengths = fold.work

        def write(step: Vector) -> None:
            total.mean(fold.weight, out=step)
            step *= np.float32(fsum(lengths) / fold.weight)  # fsum: the order changes no bit
            step += fold.current

        return written_to_send(fold.current.size, write), {}


def fednova_of(federation: FederationConfig, layout: Layout) -> Rule:
    """Return FedNova as the federation sets it.

    Raises:
        ConfigError: The site's optimizer has a momentum and a proximal term at once, or one step
            along the proximal term leads past where it pulls to; or updates are cut.
    """
    del layout
    training, settings = federation.training, federation.strategy
    steps_max = whole_option(federation, STEPS, STEPS_MAX, least=1)
    if training.momentum and training.proximal:
        raise ConfigError(
            "strategy.rule = 'fednova' knows the length of steps with training.momentum or with "
            "training.proximal, not with both; set one of them to 0"
        )
    if training.optimizer == "sgd" and training.learning_rate * training.proximal >= 1:
        raise ConfigError(
            "training.learning_rate * training.proximal must be below 1 under 'fednova', or a step "
            f"leads past the round's start, and it is "
            f"{training.learning_rate * training.proximal:g}; lower one of them"
        )
    if settings.norm_bound is not None:
        raise ConfigError(
            "strategy.norm_bound bounds nothing under 'fednova', which scales updates by the steps "
            "that sites say; leave it out, or use 'fedavg'"
        )
    return FedNova(FedAvg.of(federation), training, steps_max=steps_max)


KINDS: dict[str, Kind] = {
    "fednova": Kind(
        title="FedNova",
        paper="Wang et al. 2020, https://arxiv.org/abs/2007.07481",
        traits=FedNova.traits,
        make=fednova_of,
        options=(STEPS,),
    )
}
