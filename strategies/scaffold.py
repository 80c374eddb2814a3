"""SCAFFOLD, the coordinator's side: a control variate that takes the drift out of local steps."""

import numpy as np

from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout, Vector, written
from intramural.core.messages import Update
from intramural.core.route import CONTROL, Part, uplink
from intramural.strategies.fedavg import FedAvg
from intramural.strategies.kind import Kind, whole_option
from intramural.strategies.rule import Fold, Rule, State, Traits

POPULATION = "population"


class Scaffold:
    """x <- x + lr_g mean(delta); c <- c + |S| / N (-c - mean(delta) / (K lr)).

    The sites step along `gradient - c_k + c`, and then set `c_k <- c_k - c - delta / (K lr)`. So
    what c_k gains follows from delta and what everybody knows, and nothing but delta is sent up,
    where the paper sends both. c comes down beside the arrays, under `control/NAME`. A site whose
    update is lost has moved its c_k all the same: c is no longer the mean of the c_k, nor is it
    later, and where the arrays end is then off by as much gradient.

    Source: Karimireddy et al. 2020, Algorithm 1 with option II, https://arxiv.org/abs/1910.06378.
    """

    name = "scaffold"
    traits = Traits(
        sums_only=True,
        exact_for_lora=False,
        mixed_ranks=False,
        byzantine=False,
        record_dp=False,  # a site's c_k is made of its own noised steps: not examined
        optimizer=False,
    )

    def __init__(self, federation: FederationConfig, layout: Layout, *, population: int) -> None:
        """Take a federation that `scaffold_of` has checked; N is `population`."""
        training = federation.training
        assert training.local_steps is not None, "checked"
        self._reach = training.local_steps * training.learning_rate
        """K lr: how far the sites' steps would go along a gradient of length 1."""
        self._population = population
        self._mean = FedAvg(weights="equal", learning_rate=1.0)
        self._rate = federation.strategy.learning_rate
        self._up = uplink(federation, layout, round=1)
        self._part = Part(layout, self._up)
        controls = tuple(e for e in layout.entries if e[0].startswith(CONTROL))
        self._control = Part(layout, Layout(controls))

    def begin(self, state: State, current: Vector, *, round: int) -> Fold:
        """Open a round."""
        nothing = np.zeros(self._up.size, dtype=np.float32)
        inner = self._mean.begin({}, nothing, round=round)
        return Fold.around(inner, current=current, state=state)

    def add(self, fold: Fold, update: Update) -> None:
        """Fold one update in, exactly."""
        self._mean.add(fold.work, update)
        fold.weight = fold.work.weight

    def finish(self, fold: Fold) -> tuple[Vector, State]:
        """Return the next arrays, with the next control variate.

        Raises:
            AggregationError: No update was added.
        """
        mean, _ = self._mean.finish(fold.work)
        share = np.float32(min(1.0, len(fold.sites) / self._population))

        def write(out: Vector) -> None:
            out[:] = fold.current
            arrays, control = self._part.gather(fold.current), self._control.gather(fold.current)
            arrays += np.float32(self._rate) * mean
            self._part.scatter(arrays, out)
            gained = -control - mean / np.float32(self._reach)
            control += share * gained
            self._control.scatter(control, out)

        return written(fold.current.size, write), {}


def scaffold_of(federation: FederationConfig, layout: Layout) -> Rule:
    """Return SCAFFOLD as the federation sets it.

    Raises:
        ConfigError: The sites do not make a fixed number of plain SGD steps of one length, or do
            not count the same; or the number of sites is not known; or a setting would have the
            coordinator's c lose track of the sites' c_k.
    """
    training, sites = federation.training, federation.sites
    for key, value, wanted in (
        ("training.optimizer", training.optimizer, "sgd"),
        ("training.momentum", training.momentum, 0.0),
        ("training.weight_decay", training.weight_decay, 0.0),
        ("training.schedule", training.schedule, "constant"),
        ("training.warmup", training.warmup, 0.0),
        ("training.gradient_clip", training.gradient_clip, None),
        ("training.proximal", training.proximal, 0.0),
        ("strategy.optimizer", federation.strategy.optimizer, "sgd"),
        ("strategy.momentum", federation.strategy.momentum, 0.0),
        ("strategy.weights", federation.strategy.weights, "equal"),
    ):
        if value != wanted:
            how = "leave it out" if wanted is None else f"set it to {wanted!r}"
            raise ConfigError(
                f"strategy.rule = 'scaffold' needs plain steps of one length, and {key} is "
                f"{value!r}; {how}, or use 'fedavg' with training.proximal"
            )
    if training.local_steps is None:
        raise ConfigError(
            "strategy.rule = 'scaffold' needs the same number of steps at every site; set "
            "training.local_steps instead of training.local_epochs"
        )
    if POPULATION not in federation.strategy.options and min(sites.share, sites.quorum) < 1:
        raise ConfigError(
            "strategy.rule = 'scaffold' must know how many sites there are when sites.share or "
            f"sites.quorum is below 1; set strategy.options.{POPULATION}"
        )
    for key, is_set in (
        ("strategy.norm_bound", federation.strategy.norm_bound is not None),
        ("[gate]", federation.gate is not None),
    ):
        if is_set:
            raise ConfigError(
                "strategy.rule = 'scaffold' takes each update as the site made it, for the site's "
                f"control variate has moved with it; remove {key}, or use 'fedavg' with "
                "training.proximal"
            )
    population = whole_option(federation, POPULATION, sites.min, least=sites.min)
    return Scaffold(federation, layout, population=population)


KINDS: dict[str, Kind] = {
    "scaffold": Kind(
        title="SCAFFOLD",
        paper="Karimireddy et al. 2020, https://arxiv.org/abs/1910.06378",
        traits=Scaffold.traits,
        make=scaffold_of,
        options=(POPULATION,),
        routed=False,
    )
}
