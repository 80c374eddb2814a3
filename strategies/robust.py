"""Robust: rules that bound the harm of a minority of hostile sites, with what goes before them."""

from collections.abc import Callable
from fractions import Fraction
from math import ceil
from typing import Literal, Protocol

import numpy as np

from intramural.core.errors import AggregationError, ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout, Vector, written
from intramural.core.messages import Update
from intramural.core.seeds import generator
from intramural.strategies.centred_clipping import CENTRE, CentredClipping
from intramural.strategies.exact_sum import largest
from intramural.strategies.kind import Kind, number_option, whole_option
from intramural.strategies.robust_coordinate import Median, TrimmedMean
from intramural.strategies.robust_distance import (
    GeometricMedian,
    Krum,
    MultiKrum,
    bucket_mix,
    nearest_mix,
)
from intramural.strategies.robust_rows import Rows
from intramural.strategies.rule import Fold, Rule, State, Traits
from intramural.strategies.spool import MEMORY_BYTES_MAX, Spool

Before = Literal["none", "nnm", "bucketing"]

MAGNITUDE_MAX = 2.0**100
"""An update with a larger value is refused, so that no square or sum overflows."""
BUCKET = 2
"""Sites in a bucket, where strategy.options.bucket does not say."""
TRAITS = Traits(sums_only=False, exact_for_lora=False, mixed_ranks=False, byzantine=True)


class Combiner(Protocol):
    """How a robust rule makes one step of the rows of a round."""

    def least(self, hostile: int) -> int:
        """Return the fewest rows with which so many hostile ones are borne."""
        ...

    def combine(self, rows: Rows, hostile: int, state: State, out: Vector) -> State:
        """Write the step into `out`, shape `(size,)`; return what to remember."""
        ...


class Robust:
    """next = current + combiner(before(delta_1, ..., delta_n)), the deltas in order of site names.

    Every site counts the same, whatever strategy.weights says: a weight is a site's own word, and
    a hostile one would say much. Updates are set aside until `finish`, in memory or a file (see
    `Spool`), and are never in memory together beyond its bound.

    `before` is 'nnm', where each update is first replaced by the mean of its n - f nearest, which
    keeps robust rules good where sites differ much; or 'bucketing', where random buckets are
    averaged, in an order drawn from the federation's seed and the round.

    What it bounds is how far the step lies from those of honest sites, when at most `hostile_max`
    are hostile. It does not tell a rare honest site from a hostile one, and where the updates are
    noised for privacy, the noise hides small attacks.

    Source: of the rules, see `Median`, `TrimmedMean`, `Krum`, `MultiKrum`, `GeometricMedian`,
    `CentredClipping`; of what goes before, `nearest_mix` and `bucket_mix`.
    """

    traits = TRAITS

    def __init__(
        self,
        name: str,
        combiner: Combiner,
        *,
        hostile_max: int,
        before: Before = "none",
        bucket: int = BUCKET,
        seed: int = 0,
        memory_bytes_max: int = MEMORY_BYTES_MAX,
    ) -> None:
        """Make the rule `name`.

        Args:
            name: Told in messages.
            combiner: Makes a step of the rows.
            hostile_max: So many hostile sites are borne.
            before: What goes before the combiner.
            bucket: Sites in a bucket, the last one may have fewer.
            seed: The federation's, for the order of bucketing.
            memory_bytes_max: A round's updates beyond it go to a file.
        """
        self.name = name
        self.combiner = combiner
        self.hostile_max = hostile_max
        self.before = before
        self.bucket = bucket
        self.seed = seed
        self.memory_bytes_max = memory_bytes_max

    @property
    def least(self) -> int:
        """Fewest updates of a round with which `hostile_max` hostile ones are borne."""
        rows = self.combiner.least(self.hostile_max)
        return (rows - 1) * self.bucket + 1 if self.before == "bucketing" else rows

    def begin(self, state: State, current: Vector, *, round: int) -> Fold:
        """Open a round."""
        spool = Spool(current.size, memory_bytes_max=self.memory_bytes_max)
        return Fold(round=round, current=current, state=state, work=spool)

    def add(self, fold: Fold, update: Update) -> None:
        """Set one update aside.

        Raises:
            AggregationError: A value is not finite or far too large, or the site is there already;
                the fold is as before.
            RoundError: There is no room to set it aside.
        """
        if update.site in fold.work:
            raise AggregationError("site is in this round already; it may count once")
        peak = largest(update.delta)
        if not peak < np.inf:
            raise AggregationError("update holds a value that is not finite; it was left out")
        if not peak < MAGNITUDE_MAX:
            raise AggregationError(
                f"update holds a value of magnitude {peak:.3g}, too large to compare; "
                "the site's training diverged"
            )
        fold.work.add(update.site, update.delta)
        fold.weight += 1
        fold.sites.append(update.site)

    def finish(self, fold: Fold) -> tuple[Vector, State]:
        """Return the next arrays, and the centre of centred clipping.

        Raises:
            AggregationError: There are too few updates to bear `hostile_max` hostile ones.
        """
        if len(fold.work) < self.least:
            raise AggregationError(
                f"{self.name} needs {self.least} updates to bear {self.hostile_max} hostile ones, "
                f"and there are {len(fold.work)}; lower strategy.hostile_max or raise sites.min"
            )
        rows = Rows(fold.work, centre=fold.state.get(CENTRE))
        if self.before == "nnm":
            rows.mix = nearest_mix(rows.products_of_sites, self.hostile_max)
        elif self.before == "bucketing":
            order = generator(self.seed, "bucketing", fold.round).permutation(len(fold.work))
            rows.mix = bucket_mix(order, self.bucket)
        state: State = {}

        def write(step: Vector) -> None:
            state.update(self.combiner.combine(rows, self.hostile_max, fold.state, step))
            step += fold.current

        return written(fold.current.size, write), state


def _krum_left_out(federation: FederationConfig) -> int:
    left_out = whole_option(federation, "left_out", 2)
    if left_out > 2:
        raise ConfigError(f"strategy.options.left_out must be 1 or 2, got {left_out}")
    return left_out


def _geometric_median(federation: FederationConfig) -> Combiner:
    return GeometricMedian(
        smoothing=number_option(federation, "smoothing", GeometricMedian.smoothing),
        iterations=whole_option(federation, "iterations", GeometricMedian.iterations),
    )


def _centred_clipping(federation: FederationConfig) -> Combiner:
    has_radius = "radius" in federation.strategy.options
    return CentredClipping(
        radius=number_option(federation, "radius", 1.0) if has_radius else None,
        iterations=whole_option(federation, "iterations", CentredClipping.iterations),
    )


COMBINERS: dict[str, Callable[[FederationConfig], Combiner]] = {
    "median": lambda federation: Median(),
    "trimmed-mean": lambda federation: TrimmedMean(),
    "krum": lambda federation: Krum(left_out=_krum_left_out(federation)),
    "multi-krum": lambda federation: MultiKrum(left_out=_krum_left_out(federation)),
    "geometric-median": _geometric_median,
    "centred-clipping": _centred_clipping,
}


def robust_of(federation: FederationConfig, layout: Layout) -> Rule:
    """Return the robust rule that the federation names.

    Raises:
        ConfigError: A round may close with too few updates for strategy.hostile_max, the rule would
            be the mean, or an option does not fit.
    """
    del layout
    settings, sites = federation.strategy, federation.sites
    if "bucket" in settings.options and settings.before != "bucketing":
        raise ConfigError(
            "strategy.options.bucket is for strategy.before = 'bucketing'; set it, or remove bucket"
        )
    rule = Robust(
        settings.rule,
        COMBINERS[settings.rule](federation),
        hostile_max=settings.hostile_max,
        before=settings.before,
        bucket=whole_option(federation, "bucket", BUCKET, least=2),
        seed=federation.federation.seed,
    )
    for what, is_mean in (
        (f"strategy.rule = {settings.rule!r}", settings.rule in {"trimmed-mean", "multi-krum"}),
        ("strategy.before = 'nnm'", settings.before == "nnm"),
    ):
        if is_mean and settings.hostile_max == 0:
            raise ConfigError(
                f"{what} with strategy.hostile_max = 0 is the plain mean, which one hostile site "
                "moves at will; set strategy.hostile_max to at least 1"
            )
    fewest = max(1, ceil(Fraction(str(sites.quorum)) * sites.min))
    if fewest < rule.least:
        raise ConfigError(
            f"strategy.hostile_max = {rule.hostile_max} under {settings.rule!r} needs {rule.least} "
            f"updates a round, and sites.min = {sites.min} with sites.quorum = {sites.quorum:g} "
            f"may close one with {fewest}; raise sites.min or sites.quorum, or lower "
            "strategy.hostile_max"
        )
    return rule


def _kind(title: str, paper: str, *options: str) -> Kind:
    return Kind(
        title=title, paper=paper, traits=TRAITS, make=robust_of, options=(*options, "bucket")
    )


YIN = "Yin et al. 2018, https://arxiv.org/abs/1803.01498"
BLANCHARD = "Blanchard et al. 2017, https://arxiv.org/abs/1703.02757"
KINDS: dict[str, Kind] = {
    "median": _kind("coordinate-wise median", YIN),
    "trimmed-mean": _kind("coordinate-wise trimmed mean", YIN),
    "krum": _kind("Krum", BLANCHARD, "left_out"),
    "multi-krum": _kind("Multi-Krum", BLANCHARD, "left_out"),
    "geometric-median": _kind(
        "geometric median (RFA)",
        "Pillutla et al. 2022, https://arxiv.org/abs/1912.13445",
        "smoothing",
        "iterations",
    ),
    "centred-clipping": _kind(
        "centred clipping",
        "Karimireddy et al. 2021, https://arxiv.org/abs/2012.10333",
        "radius",
        "iterations",
    ),
}
