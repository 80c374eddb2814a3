"""federation.toml: what all sites agree on. Its canonical form is the manifest."""

import unicodedata
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from intramural.core.canonical import canonical_json, digest_json
from intramural.core.config import Section

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
# strict: `rounds = true` and `rounds = "10"` are mistakes, not one round and ten
Positive = Annotated[float, Field(gt=0, strict=True)]
Share = Annotated[float, Field(gt=0, le=1, strict=True)]
Count = Annotated[int, Field(ge=1, strict=True)]
Text = Annotated[str, StringConstraints(min_length=1)]


class Federation(Section):
    """The table [federation]."""

    name: Name
    """lower-case name of the federation: letters, digits, dot, dash, underscore"""
    rounds: Count
    """number of rounds, at least 1"""
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
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
    alpha: Positive = 16.0
    """lora: scale; the update is multiplied by alpha / rank"""
    dropout: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.0
    """lora: dropout in front of the adapter"""
    target_modules: tuple[Text, ...] = ("query", "value")
    """lora: ends of the names of the linear layers that get an adapter"""
    trained_modules: tuple[Text, ...] | None = None
    """lora, head: ends of the names of modules trained whole; by default the classification head"""


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
    momentum: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.0
    """sgd: momentum within a round"""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """learning rate over the whole federation: 'constant', 'linear' or 'cosine'"""
    warmup: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.0
    """share of the whole federation over which the learning rate rises from 0"""
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
    momentum: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.0
    """server momentum"""
    options: dict[str, float | int | str | bool] = Field(default_factory=dict)
    """arguments of a 'flwr:' strategy"""


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


class Evaluation(Section):
    """The table [evaluation]."""

    every: Annotated[int, Field(ge=0, strict=True)] = 1
    """evaluate on the sites' validation records every so many rounds; 0: never"""
    records_max: Count | None = None
    """most records a site evaluates on; absent: all"""
    batch_size: Count = 64
    """records a forward pass; changes no result"""


class Privacy(Section):
    """The table [privacy]; absent, nothing is claimed."""

    unit: Literal["record", "person"]
    """what one neighbour differs in: 'record' or 'person'"""
    epsilon: Positive | None = None
    """privacy spent over the whole federation, at delta; the noise is computed from it"""
    noise_multiplier: Positive | None = None
    """noise's standard deviation / clip_norm, instead of epsilon"""
    delta: Annotated[float, Field(gt=0, lt=1, strict=True)]
    """below 1 / nominal_records (person: nominal_persons)"""
    clip_norm: Positive
    """L2 bound of one unit's gradient"""
    nominal_records: Count
    """public constant from which sample rate and divisor follow; never the private count"""
    nominal_persons: Count | None = None
    """person: as nominal_records, in persons"""
    records_per_person: Count | None = None
    """person: most records of one person used in a step; the rest are left out"""
    relation: Literal["add-remove", "replace-one"] = "add-remove"
    """neighbouring data sets: a unit added or removed, or one replaced by another"""
    engine: Literal["bookkeeping", "opacus", "opacus-ghost"] = "bookkeeping"
    """'bookkeeping' (one forward, one backward), 'opacus' as it is, or its ghost clipping for
    records, 'opacus-ghost'"""
    metrics_noise: Positive | None = None
    """noise on each evaluation's two counts / how far one unit moves them, charged; absent: sites
    send no metrics"""

    @property
    def nominal_units(self) -> int:
        """Public number of units a site is taken to hold."""
        return self.nominal_persons or self.nominal_records

    @model_validator(mode="after")
    def _is_a_plan(self) -> "Privacy":
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("set exactly one of privacy.epsilon and privacy.noise_multiplier")
        person = (self.nominal_persons, self.records_per_person)
        if self.unit == "person" and None in person:
            raise ValueError(
                "unit = 'person' needs privacy.nominal_persons and privacy.records_per_person"
            )
        if self.unit == "record" and person != (None, None):
            raise ValueError(
                "privacy.nominal_persons and privacy.records_per_person are for unit = 'person'"
            )
        if self.unit == "person" and self.engine == "opacus-ghost":
            raise ValueError(
                "privacy.engine = 'opacus-ghost' has one norm a record, none for a person; set "
                "privacy.engine to 'bookkeeping' or 'opacus'"
            )
        if self.delta >= 1 / self.nominal_units:
            name = "nominal_records" if self.unit == "record" else "nominal_persons"
            raise ValueError(f"privacy.delta must be below 1 / privacy.{name}")
        return self


class SitePrivacy(Section):
    """The table [site_privacy]; absent, no site's whole update is hidden.

    Guarantees:
        None by itself: `strategies/site_dp.py` says what holds. Sound in combination with
        strategy.weights = "equal" alone, which the federation checks: with other weights one
        site's part of the sum exceeds clip_norm.
    """

    clip_norm: Annotated[float, Field(ge=1e-6, le=1e6, strict=True)]
    """L2 bound of a site's whole update in a round"""
    noise_multiplier: Annotated[float, Field(ge=0.01, le=1e4, strict=True)]
    """noise's standard deviation on the sum of the updates / clip_norm"""
    delta: Annotated[float, Field(gt=0, lt=1, strict=True)]
    """below 1 / sites.min, and better far below"""


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
