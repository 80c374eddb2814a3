"""A scenario: links, speeds, hours and faults of simulated sites, read from a TOML file."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from intramural.core.canonical import digest_json
from intramural.core.config import Section, load_config
from intramural.core.errors import ConfigError
from intramural.core.seeds import generator
from intramural.core.values import Name, Positive, Share, Text
from intramural.simulations.partition import parse_spec

FOLDER = Path(__file__).with_name("scenarios")
"""Where the scenarios lie that come with the package."""
SPREADING = frozenset({"alie", "min-max", "min-sum", "mimic"})
"""Attacks made of how the group's honest updates differ: one site alone would send its own."""
COLLUSIVE = SPREADING | {"ipm"}
"""Attacks made of the honest updates of all sites of the group; they know no others."""
FIXED = frozenset({"free-rider", "nan", "inf", "mimic"})
"""Attacks that have no strength."""
SHARED = frozenset({"min-max", "min-sum"})
"""Attacks whose strength is a share."""
SHARES_TOLERANCE = 1e-6

NotNegative = Annotated[float, Field(ge=0, strict=True)]
Probability = Annotated[float, Field(ge=0, le=1, strict=True)]
Hour = Annotated[float, Field(ge=0, le=24, strict=True)]
Offset = Annotated[float, Field(ge=-24, le=24, strict=True)]
Strength = Annotated[float, Field(gt=0, le=1e6, strict=True)]
Attack = Literal[
    "sign-flip",
    "scale",
    "noise",
    "constant",
    "free-rider",
    "nan",
    "inf",
    "alie",
    "ipm",
    "min-max",
    "min-sum",
    "mimic",
]


class Group(Section):
    """A table [[groups]]: sites that are alike."""

    name: Name
    """what the report calls them"""
    share: Share
    """share of the federation's sites; the shares of all groups add up to 1"""
    slowness: Positive = 1.0
    """their compute seconds, divided by those of `train_s` and `evaluate_s`"""
    jitter: NotNegative = 0.0
    """spread of compute and transfer times: standard deviation of their logarithm"""
    latency_s: NotNegative = 0.0
    """seconds a message is under way however small it is, one way"""
    down_mbps: Positive | None = None
    """megabits a second from the coordinator; absent: no limit"""
    up_mbps: Positive | None = None
    """megabits a second to the coordinator; absent: no limit"""
    drop_out: Probability = 0.0
    """share of training requests that are never answered"""
    crash: Probability = 0.0
    """share of training requests in the midst of which the site's app dies"""
    hours: tuple[Hour, Hour] | None = None
    """connected from the first hour of the day to the second, which may be the next morning's"""
    offset_hours: tuple[Offset, ...] = (0.0,)
    """how far their clocks are ahead of the coordinator's, given to the group's sites in turn"""
    on_hours: Positive | None = None
    """mean hours they stay connected, exponentially distributed; with `off_hours`"""
    off_hours: Positive | None = None
    """mean hours they stay away, exponentially distributed; with `on_hours`"""
    hostile: Attack | None = None
    """what they make of each update: 'sign-flip', 'scale', 'noise', 'constant', 'free-rider', 'nan'
    or 'inf'; or, of all the group's honest ones: 'ipm', or of two or more 'alie', 'min-max',
    'min-sum' or 'mimic'"""
    strength: Strength = 1.0
    """factor of 'sign-flip' and 'scale'; of 'noise' and 'constant', size / the update's own; of
    'alie' z, of 'ipm' epsilon, of 'min-max' and 'min-sum' share of the largest deviation"""

    @model_validator(mode="after")
    def _is_possible(self) -> "Group":
        if self.drop_out + self.crash > 1:
            raise ValueError("drop_out and crash together exceed 1; lower one")
        if self.hours is not None and (self.hours[0] - self.hours[1]) % 24 == 0:
            raise ValueError("hours begin and end at one time; leave them out for the whole day")
        if not self.offset_hours:
            raise ValueError("offset_hours is empty; leave it out")
        if self.hostile in FIXED and "strength" in self.model_fields_set:
            raise ValueError(f"{self.hostile!r} has no strength; leave it out")
        if self.hostile in SHARED and self.strength > 1:
            raise ValueError(f"strength of {self.hostile!r} is a share; set it to at most 1")
        if (self.on_hours is None) != (self.off_hours is None):
            raise ValueError("on_hours and off_hours belong together; set both or none")
        return self


class Scenario(Section):
    """What surrounds a simulated federation; nothing of it reaches the sites' training."""

    name: Name
    """what the report calls it"""
    about: Text
    """one sentence: who these sites are"""
    partition: Text | None = None
    """how records are dealt, unless --partition says: iid, dirichlet:ALPHA, size:POWER, column:NAME
    """
    train_s: Positive = 60.0
    """seconds of one round's training at a site of slowness 1"""
    evaluate_s: NotNegative = 5.0
    """seconds of one evaluation at a site of slowness 1"""
    measured: bool = False
    """true: take this machine's seconds of the last update instead of train_s, from the second on;
    simulated times then differ from run to run"""
    start_hour: Hour = 9.0
    """hour of the day at the coordinator when the federation begins"""
    coordinator_mbps: Positive | None = None
    """megabits a second of the coordinator's line, each way, shared by the sites of a request"""
    patience_days: Positive = 30.0
    """days the coordinator waits for enough sites before it gives up"""
    ask_again: bool = True
    """true: ask anew whom a crash or a broken line kept from answering, as when deployed"""
    groups: tuple[Group, ...]
    """the sites, at least one group"""

    @model_validator(mode="after")
    def _is_whole(self) -> "Scenario":
        if self.partition is not None:
            try:
                parse_spec(self.partition)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        if not self.groups:
            raise ValueError("a scenario needs at least one table [[groups]]")
        if len({group.name for group in self.groups}) < len(self.groups):
            raise ValueError("two [[groups]] have one name")
        total = sum(group.share for group in self.groups)
        if abs(total - 1) > SHARES_TOLERANCE:
            raise ValueError(f"the groups' shares add up to {total:g}, not to 1")
        return self

    @property
    def digest(self) -> str:
        """Digest of the scenario with every default written out."""
        return digest_json(self.model_dump(mode="json"))

    def groups_of(self, sites: int, *, seed: int) -> list[Group]:
        """Return each site's group, length `sites`; the seed decides who is in which.

        Each group has its share of the sites to within one, and none is lost to rounding.

        Raises:
            ConfigError: A group attacks by how its updates differ, and has fewer than two.
        """
        wanted = [group.share * sites for group in self.groups]
        counts = [int(number) for number in wanted]
        by_rest = sorted(range(len(wanted)), key=lambda g: counts[g] - wanted[g])
        for number in by_rest[: sites - sum(counts)]:
            counts[number] += 1
        for group, count in zip(self.groups, counts, strict=True):
            if group.hostile in SPREADING and count < 2:
                raise ConfigError(
                    f"scenario {self.name}: group {group.name!r} attacks by {group.hostile!r}, "
                    f"which takes two sites, and of {sites} it has {count}; raise its share"
                )
        listed = [g for g, n in zip(self.groups, counts, strict=True) for _ in range(n)]
        order = generator(seed, "scenario-groups").permutation(sites)
        return [listed[place] for place in order]


def shipped_scenarios() -> list[str]:
    """Return the names of the scenarios that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_scenario(name_or_file: str) -> Scenario:
    """Return a scenario by its name, or from a file.

    Raises:
        ConfigError: There is none, or the file breaks the rules; every problem has its line.
    """
    if name_or_file in shipped_scenarios():
        return load_config(FOLDER / f"{name_or_file}.toml", Scenario)
    if not Path(name_or_file).is_file():
        raise ConfigError(
            f"--scenario {name_or_file}: neither a file nor one of {', '.join(shipped_scenarios())}"
        )
    return load_config(Path(name_or_file), Scenario)
