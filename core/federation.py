"""federation.toml: what all sites agree on. Its canonical form is the manifest."""

import unicodedata
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from intramural.core.canonical import canonical_json, digest_json
from intramural.core.config import Section
from intramural.core.federation_privacy import Privacy, SitePrivacy
from intramural.core.federation_rounds import (
    Asynchrony,
    Evaluation,
    Gate,
    Personal,
    Sites,
    Strategy,
)
from intramural.core.values import Count, Fraction, Name, Natural, Positive, Text


class Federation(Section):
    """The table [federation]."""

    name: Name
    """lower-case name of the federation: letters, digits, dot, dash, underscore"""
    rounds: Count
    """number of rounds, at least 1"""
    seed: Natural = 0
    """seed of everything random that is not a privacy mechanism"""


class Model(Section):
    """The table [model]."""

    base: Text
    """a folder, an installed model package, or a hub id; resolved at each site"""
    digest: Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")] | None = None
    """sha256:... of the base's files; a site whose base differs refuses"""
    max_length: Annotated[int, Field(ge=4, strict=True)] = 128
    """longest text in tokens; longer ones are cut"""
    pooler: Literal["base", "identity"] = "base"
    """'identity': the first token's state goes to the head through tanh alone; good for sentence
    encoders, whose pooler was never trained"""


class Task(Section):
    """The table [task]."""

    kind: Literal["classification", "generation"]
    """'classification' or 'generation'"""
    labels: tuple[Text, ...] = ()
    """classification: every label, in the order of the model's outputs"""
    instruction: Text = "{text}"
    """generation: the user's turn, with {text} where the record's text goes"""
    new_tokens_max: Count = 64
    """generation: longest sample shown in the report, in tokens"""

    @model_validator(mode="after")
    def _labels_fit(self) -> "Task":
        if self.kind == "classification" and len(self.labels) < 2:
            raise ValueError("classification needs task.labels with at least two labels")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("task.labels names a label twice")
        for label in self.labels:
            if label != " ".join(unicodedata.normalize("NFC", label).split()):
                raise ValueError(
                    f"task.labels: {label!r} can match no record, whose labels are cleaned; "
                    "write it in Unicode NFC, with single spaces"
                )
        if "{text}" not in self.instruction:
            raise ValueError("task.instruction must hold {text}")
        return self


class Exchange(Section):
    """The table [exchange]."""

    kind: Literal["lora", "full", "head"]
    """'lora' (adapter and head travel), 'full' (every weight) or 'head' (the encoder is frozen)"""
    rank: Count = 8
    """lora: rank of the update"""
    rank_min: Count | None = None
    """lora: smallest rank that a site may train instead; absent: every site trains `rank`"""
    alpha: Positive = 16.0
    """lora: scale; the update is multiplied by alpha / rank"""
    dropout: Fraction = 0.0
    """lora: dropout in front of the adapter"""
    target_modules: tuple[Text, ...] = ("query", "value")
    """lora: ends of the names of the linear layers that get an adapter"""
    trained_modules: tuple[Text, ...] | None = None
    """lora, head: ends of the names of modules trained whole; by default the classification head"""
    personal: tuple[Text, ...] = ()
    """ends of the names of modules whose trained parameters stay at each site, such as a head"""

    @model_validator(mode="after")
    def _ranks_fit(self) -> "Exchange":
        if self.rank_min is not None and (self.kind != "lora" or self.rank_min > self.rank):
            raise ValueError("exchange.rank_min is for 'lora', and at most exchange.rank")
        return self


class Training(Section):
    """The table [training]."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """'adamw' or 'sgd'"""
    learning_rate: Positive
    """peak step size of the sites' optimizer; above 0"""
    batch_size: Count = 32
    """records a step"""
    local_steps: Count | None = None
    """steps a site makes each round"""
    local_epochs: Count | None = None
    """passes over a site's training records each round, instead of local_steps"""
    weight_decay: Annotated[float, Field(ge=0, strict=True)] = 0.0
    """decoupled weight decay, not applied to biases and norms"""
    momentum: Fraction = 0.0
    """sgd: momentum within a round"""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """learning rate over the whole federation: 'constant', 'linear' or 'cosine'"""
    warmup: Fraction = 0.0
    """share of the whole federation over which the learning rate rises from 0"""
    proximal: Annotated[float, Field(ge=0, strict=True)] = 0.0
    """FedProx: how strongly a site's steps are pulled back to the round's start; 0: not at all"""
    gradient_clip: Positive | None = None
    """largest norm of the batch gradient; absent: not clipped"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """'float32', or 'bfloat16' for autocast; weights stay float32"""
    gradient_checkpointing: bool = False
    """true: less memory, about a third more time"""

    @model_validator(mode="after")
    def _one_length(self) -> "Training":
        if (self.local_steps is None) == (self.local_epochs is None):
            raise ValueError("set exactly one of training.local_steps and training.local_epochs")
        return self


class FederationConfig(Section):
    """A federation: the shared configuration of coordinator and sites."""

    federation: Federation
    """name, rounds, seed"""
    model: Model
    """the base model"""
    task: Task
    """what is learnt"""
    exchange: Exchange
    """which parameters travel"""
    training: Training
    """how a site trains"""
    strategy: Strategy = Strategy()
    """how updates are combined"""
    sites: Sites
    """who takes part, and how long a round waits"""
    evaluation: Evaluation = Evaluation()
    """when and on how much the sites evaluate"""
    privacy: Privacy | None = None
    """absent: no privacy claim"""
    site_privacy: SitePrivacy | None = None
    """absent: no claim for a site as a whole; the sum is divided by sites.min, whoever answers"""
    gate: Gate | None = None
    """absent: every round's arrays are kept"""
    asynchrony: Asynchrony | None = None
    """absent: a round waits for its cohort"""
    personal: Personal | None = None
    """absent: the sites use the federation's model as it is"""

    @model_validator(mode="after")
    def _hides_sites(self) -> "FederationConfig":
        if self.site_privacy is None:
            return self
        if self.strategy.rule != "fedavg":
            raise ValueError(
                "site_privacy needs strategy.rule = 'fedavg', whose sum can be bounded and noised, "
                f"and it is {self.strategy.rule!r}; set it, or remove [site_privacy]"
            )
        if self.strategy.weights != "equal":
            raise ValueError(
                "site_privacy needs strategy.weights = 'equal', or one site weighs more than the "
                "noise hides; set it, or remove [site_privacy]"
            )
        if self.site_privacy.delta >= 1 / self.sites.min:
            raise ValueError("site_privacy.delta must be below 1 / sites.min; lower it")
        return self

    @model_validator(mode="after")
    def _gate_can_judge(self) -> "FederationConfig":
        if self.gate is None:
            return self
        by_sites = self.gate.judge == "sites"
        if by_sites and self.evaluations_every != 1:
            raise ValueError(
                "gate judges every round; set evaluation.every = 1, and under [privacy] "
                "privacy.metrics_noise, or gate.judge = 'coordinator', or remove [gate]"
            )
        if by_sites and self.site_privacy is not None:
            raise ValueError(
                "site_privacy covers the arrays, and [gate] chooses among them by the sites' "
                "metrics, which it does not cover; set gate.judge = 'coordinator', or remove one "
                "of the tables"
            )
        classifies = self.task.kind == "classification"
        private = by_sites and self.privacy is not None
        noised = "accuracy" if classifies else "example_accuracy"
        plain = ["loss", "accuracy", "macro_f1"] if classifies else ["loss", "perplexity", noised]
        if self.gate.metric not in (known := [noised] if private else plain):
            raise ValueError(
                f"gate.metric can be {known} here, not {self.gate.metric!r}; change it"
            )
        return self

    @model_validator(mode="after")
    def _buffer_can_fill(self) -> "FederationConfig":
        if self.asynchrony is None:
            return self
        if self.asynchrony.buffer > self.sites.min:
            raise ValueError(
                "asynchrony.buffer must be at most sites.min, or a round might wait for updates "
                "that nobody is there to send; lower it"
            )
        if self.site_privacy is not None:
            raise ValueError(
                "site_privacy bounds the sum of one round's updates, and [asynchrony] mixes those "
                "of several; remove one of the tables"
            )
        return self

    @property
    def evaluations_every(self) -> int:
        """Rounds between the sites' evaluations; 0: never, as under [privacy] without noise."""
        silent = self.privacy is not None and self.privacy.metrics_noise is None
        return 0 if silent else self.evaluation.every

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as a JSON value; every default is written out."""
        return self.model_dump(mode="json")

    def manifest(self) -> str:
        """Return the manifest: canonical JSON."""
        return canonical_json(self.to_json()).decode()

    @cached_property
    def digest(self) -> str:
        """Digest of the manifest; a site compares it with every request's."""
        return digest_json(self.to_json())

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy; a digest known already is that of the old content."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("digest", None)
        return copied
