"""site.toml: what one site decides for itself. Its limits win, and only tighten."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints

from intramural.core.config import Section, load_config
from intramural.core.records_file import RecordsFile
from intramural.core.values import Count, Name, Positive, Text

_TIME = "([01][0-9]|2[0-3]):[0-5][0-9]"


def _has_length(hours: str) -> str:
    begin, _, end = hours.partition("-")
    if begin == end:
        raise ValueError("begins when it ends; write 00:00-24:00 for the whole day")
    return hours


Hours = Annotated[
    str, StringConstraints(pattern=f"^{_TIME}-({_TIME}|24:00)$"), AfterValidator(_has_length)
]
"""A span of local time, such as 22:00-06:00, which wraps midnight; its end is outside it."""
Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]


class SiteIdentity(Section):
    """The table [site]."""

    name: Name
    """lower-case name of the site: letters, digits, dot, dash, underscore"""


class SiteData(RecordsFile):
    """The table [data]."""

    person: Text | None = None
    """column that identifies the person a record is about; groups the splits"""
    group: Text | None = None
    """column whose equal values must stay on one side of the splits"""
    name: Name | None = None
    """name of the data set, for its privacy ledger; absent: the file's name"""
    ledger: Path | None = None
    """the data set's privacy ledger; absent: ledger-NAME.jsonl beside site.toml"""


class SitePolicy(Section):
    """The table [policy]. Its keys only tighten: none lets in what another refuses."""

    require_privacy: bool = True
    """refuse a federation without [privacy]"""
    epsilon_run: Positive = 10.0
    """[privacy]: most that one run may cost, by its plan; above 10 little is promised"""
    epsilon_lifetime: Positive | None = None
    """most privacy this data set ever spends, over all runs"""
    delta_lifetime: Annotated[float, Field(gt=0, lt=1, strict=True)] = 1e-5
    """delta at which epsilon_run and epsilon_lifetime are read; fixed for the data set's life"""
    noise_min: Positive | None = None
    """smallest noise_multiplier of a step; also refuses a federation without [privacy]"""
    clip_max: Positive | None = None
    """largest privacy.clip_norm; also refuses a federation without [privacy]"""
    require_secure_aggregation: bool = False
    """refuse a federation whose coordinator sees single updates; true refuses every federation,
    for this version has no secure aggregation"""
    tasks: Annotated[tuple[Literal["classification", "generation"], ...], Field(min_length=1)] = (
        "classification",
        "generation",
    )
    """kinds of task the site trains for"""
    models: tuple[Digest, ...] = ()
    """sha256:... of each base model the site trains; empty: any"""
    exchange: tuple[Literal["lora", "full", "head"], ...] = ("lora", "head")
    """exchange kinds the site lets out"""
    trained_modules: tuple[Text, ...] = ("classifier", "pooler", "pre_classifier", "score")
    """lora, head: modules that exchange.trained_modules may have trained whole, and what is in
    them; by default what stands behind the encoder"""
    cohort_min: Count = 1
    """fewest sites.min; a round may still close with sites.quorum of them"""
    retries_max: Annotated[int, Field(ge=0, strict=True)] = 3
    """[privacy]: charges of one run beyond its planned ones, after crashes and lost replies"""
    not_private_seed: Annotated[int, Field(ge=0, strict=True)] | None = None
    """for tests alone: draw samples and noise from this seed; every result is marked not private"""
    records_min: Count = 1
    """refuse to train on fewer records"""
    payload_bytes_max: Count = 4 * 1024**3
    """most bytes one reply may hold"""
    bytes_per_round_max: Count | None = None
    """most bytes of parameters in one round, both ways together"""
    hours: tuple[Hours, ...] = ()
    """local times at which the site answers, such as "22:00-06:00"; empty: any; what has begun is
    finished"""
    approve: Literal["ask", "same-shape"] = "ask"
    """who approves a new manifest: 'ask' people, or 'same-shape' without asking where it differs
    from the last one approved under its name in harmless keys only"""
    approvers: Annotated[int, Field(ge=1, le=2, strict=True)] = 1
    """different people who must approve a manifest: 1 or 2"""


class SiteCompute(Section):
    """The table [compute]."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    """'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'"""
    micro_batch: Count | None = None
    """records a forward pass; a memory knob: without dropout it changes
    results in their last bits only; absent: as many as pad little"""
    threads: Count | None = None
    """processor threads; absent: as PyTorch decides"""
    rank: Count | None = None
    """lora: rank this site trains, at least exchange.rank_min; absent: exchange.rank"""


class SiteConfig(Section):
    """One site: its records, models, limits and machine."""

    site: SiteIdentity
    """who this is"""
    data: SiteData
    """where the records are"""
    model: dict[str, str] = Field(default_factory=dict)
    """folder of each base model, by the name the federation uses"""
    policy: SitePolicy = SitePolicy()
    """the site's own limits"""
    compute: SiteCompute = SiteCompute()
    """the machine"""

    @property
    def data_name(self) -> str:
        """Name of the data set, as its ledger has it."""
        stem = re.sub(r"[^a-z0-9._-]", "-", self.data.path.stem.lower()).strip("._-")
        return self.data.name or stem or "records"

    @property
    def ledger_file(self) -> Path:
        """Where the data set's privacy ledger lies; `load_site` makes it absolute."""
        return self.data.ledger or Path(f"ledger-{self.data_name}.jsonl")


def load_site(path: Path) -> SiteConfig:
    """Read site.toml; relative paths in it are taken from its folder.

    Raises:
        ConfigError: As `load_config`.
    """
    config = load_config(path, SiteConfig)
    folder = path.resolve().parent
    places = {"path": folder / config.data.path, "ledger": folder / config.ledger_file}
    data = config.data.model_copy(update=places)
    model = {
        name: str(folder / place) if (folder / place).exists() else place
        for name, place in config.model.items()
    }
    return config.model_copy(update={"data": data, "model": model})


def simulated_name(number: int, sites: int) -> str:
    """Return the name of a simulated site, counted from 0: names sort as numbers do."""
    return f"site-{number + 1:0{len(str(sites))}}"
