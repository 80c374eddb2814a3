"""The tables of federation.toml that say how rounds go and how updates are combined."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from intramural.core.config import Section
from intramural.core.values import Count, Fraction, Name, Natural, Positive, Share, Text


class Strategy(Section):
    """The table [strategy]."""

    rule: Text = "fedavg"
    """a rule's name, or 'flwr:' and the name of one of Flower's strategies"""
    weights: Literal["examples", "equal"] = "examples"
    """a site's weight: its number of training records, or equal for all"""
    weight_cap: Count | None = None
    """largest weight a site can have, in records"""
    learning_rate: Positive = 1.0
    """server step size on the mean update; 1 is plain averaging"""
    momentum: Fraction = 0.0
    """server momentum"""
    optimizer: Literal["sgd", "adam", "yogi", "adagrad"] = "sgd"
    """server optimizer; 'sgd' takes learning_rate and momentum, the others are adaptive"""
    beta_1: Fraction = 0.9
    """adaptive: decay of the mean of the steps; 'adagrad' is best with 0"""
    beta_2: Fraction = 0.99
    """'adam', 'yogi': decay of the mean of their squares"""
    tau: Positive = 1e-3
    """adaptive: added to the root of that mean, so that small steps stay small"""
    hostile_max: Natural = 0
    """most sites of a cohort that may be hostile; a robust rule bounds the harm of so many"""
    before: Literal["none", "nnm", "bucketing"] = "none"
    """what a robust rule does first: mix each update with its nearest ones, or mean them in
    buckets"""
    norm_bound: Positive | None = None
    """L2 norm to which a longer update is cut; absent: none is"""
    options: dict[str, float | int | str | bool] = Field(default_factory=dict)
    """arguments of the rule, by name"""


class Sites(Section):
    """The table [sites]."""

    min: Count
    """a round waits until this many sites are connected"""
    share: Share = 1.0
    """share of the connected sites drawn for a round's cohort"""
    quorum: Share = 1.0
    """share of the cohort that closes a round after the deadline"""
    deadline_s: Positive = 3600.0
    """seconds after which a round closes with its quorum"""
    selection: Literal["uniform", "weighted", "round-robin"] = "uniform"
    """how a cohort is drawn: 'uniform', 'weighted' by sites.weights, or 'round-robin': those first
    who were drawn least often"""
    weights: dict[Name, Positive] = Field(default_factory=dict)
    """'weighted': public weight of each site by its name; a site that is not named has 1"""

    @model_validator(mode="after")
    def _weights_count(self) -> "Sites":
        if self.weights and self.selection != "weighted":
            raise ValueError("sites.weights are for sites.selection = 'weighted'; set it")
        return self


class Evaluation(Section):
    """The table [evaluation]."""

    every: Annotated[int, Field(ge=0, strict=True)] = 1
    """evaluate on the sites' validation records every so many rounds; 0: never"""
    records_max: Count | None = None
    """most records a site evaluates on; absent: all"""
    batch_size: Count = 64
    """records a forward pass; changes no result"""


class Gate(Section):
    """The table [gate]; absent, every round's arrays are kept.

    A round that makes the metric worse is committed with the arrays of the round before.
    """

    metric: Literal["loss", "perplexity", "accuracy", "macro_f1", "example_accuracy"] = "loss"
    """what must not get worse from the last arrays kept to the round's; where sites judge under
    [privacy], 'accuracy', or 'example_accuracy' of a generation"""
    judge: Literal["sites", "coordinator"] = "sites"
    """whose records it is measured on: the sites' validation records, or records of the
    coordinator's own (holdout.toml), which cost no site any privacy"""
    tolerance: Annotated[float, Field(ge=0, strict=True)] = 0.0
    """how much worse it may get, in the metric's own units"""


class Asynchrony(Section):
    """The table [asynchrony]; absent, a round waits for its cohort.

    Sites that have not answered when a round closes go on, and their updates count in a later one.
    sites.share is then the share of the sites that train at a time, and sites.deadline_s the time
    after which a site that has not answered is asked anew in the next round; a round is evaluated
    by the sites whose updates are in it.
    """

    buffer: Count
    """updates that close a round, whichever round's arrays they started from; at most sites.min"""
    staleness_max: Natural = 10
    """rounds that an update may be late; a later one is left out"""
    staleness_power: Annotated[float, Field(ge=0, strict=True)] = 0.5
    """an update that is s rounds late counts 1 / (1 + s) ** staleness_power"""


class Personal(Section):
    """The table [personal]; absent, the sites use the federation's model as it is."""

    kind: Literal["ditto", "fine-tune"]
    """'ditto': each site trains its own model beside, every round; 'fine-tune': after the last"""
    pull: Annotated[float, Field(ge=0, strict=True)] = 0.1
    """'ditto': how strongly its own model is pulled toward the federation's"""
    steps: Count
    """steps on its own model, in each round or after the last"""
