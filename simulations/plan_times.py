"""Times of a plan: from a probe's rounds to seconds and bytes on other machines and links."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.server.machine import share_of
from intramural.simulations.hardware import MEGABIT, Hardware, Machine

ROUNDS_MIN = 2
"""The first round of a probe loads the model and reads the records; the second tells its speed."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One request to every site: training, or evaluation. Zero throughout: it is never made."""

    down_bytes: float = 0.0
    """To one site."""
    up_bytes: float = 0.0
    """From one site."""
    compute_s: float = 0.0
    """At the slowest site, were it the machine of the probe."""

    def minus(self, other: "Phase") -> "Phase":
        """Return what this takes beyond another; never less than nothing."""
        return Phase(
            down_bytes=max(0.0, self.down_bytes - other.down_bytes),
            up_bytes=max(0.0, self.up_bytes - other.up_bytes),
            compute_s=max(0.0, self.compute_s - other.compute_s),
        )


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a probe told."""

    sites: int
    train: Phase
    evaluate: Phase
    """Beyond training. Zero where each round of the probe was evaluated: then `train` has both."""
    start_s: float
    """What its first round took beyond another one."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long a phase takes on given machines."""

    hardware: Hardware
    machines: Mapping[str, Machine]
    federation: FederationConfig

    @property
    def cohort(self) -> int:
        """Number of sites asked in a round, as the coordinator draws it."""
        sites = self.federation.sites
        return max(sites.min, share_of(sites.share, len(self.machines)))

    @property
    def quorum(self) -> int:
        """Number of answers that close a phase at its deadline."""
        return max(1, share_of(self.federation.sites.quorum, self.cohort))

    def site_s(self, phase: Phase, machine: Machine) -> float:
        """Return the seconds from the request's departure to the answer's arrival."""
        if phase == Phase():
            return 0.0
        hub = self.hardware.coordinator
        # the coordinator's link is shared: the last site of a cohort waits for all of it
        down_s = max(
            _transfer_s(phase.down_bytes, machine.down_mbit),
            _transfer_s(phase.down_bytes * self.cohort, hub.up_mbit),
        )
        up_s = max(
            _transfer_s(phase.up_bytes, machine.up_mbit),
            _transfer_s(phase.up_bytes * self.cohort, hub.down_mbit),
        )
        compute_s = phase.compute_s / machine.relative_speed
        return down_s + compute_s + up_s + machine.latency_ms / 1000

    def phase_s(self, phase: Phase) -> float:
        """Return the seconds of a phase with the slowest cohort: its last answer, or deadline."""
        deadline_s = self.federation.sites.deadline_s
        return min(max(self._slowest(phase).values()), deadline_s)

    def late(self, phase: Phase) -> dict[str, float]:
        """Return the sites whose answer comes after the deadline, with its seconds."""
        deadline_s = self.federation.sites.deadline_s
        times = {name: self.site_s(phase, machine) for name, machine in self.machines.items()}
        return {name: seconds for name, seconds in times.items() if seconds > deadline_s}

    def closes(self, phase: Phase) -> bool:
        """Return whether a quorum of the slowest cohort answers before the deadline."""
        deadline_s = self.federation.sites.deadline_s
        return sum(s <= deadline_s for s in self._slowest(phase).values()) >= self.quorum

    def _slowest(self, phase: Phase) -> dict[str, float]:
        """Return the cohort that takes longest, with each site's seconds."""
        times = {name: self.site_s(phase, machine) for name, machine in self.machines.items()}
        return dict(sorted(times.items(), key=lambda item: -item[1])[: self.cohort])


def probe_of_report(federation: FederationConfig, report: Mapping[str, Any]) -> Probe:
    """Return what a probe's report tells, per site.

    The sites of a probe run one after another in one process: a round's seconds are shared among
    them evenly, but that with `local_epochs` the site with most records takes its own share.

    Raises:
        ConfigError: The report is of too few rounds, or nobody trained in one.
    """
    rounds = report.get("rounds") or []
    if len(rounds) < ROUNDS_MIN or not all(entry["sites"] for entry in rounds):
        raise ConfigError(
            f"the probe has {len(rounds)} whole rounds and needs {ROUNDS_MIN}; run it again"
        )
    weight = _largest_share(federation, report)
    plain = [_phase(entry, weight) for entry in rounds if not entry["metrics"]]
    evaluated = [_phase(entry, weight) for entry in rounds if entry["metrics"]]
    steady = [_phase(entry, weight) for entry in rounds[1:]]
    seconds = min(phase.compute_s for phase in (*plain, *steady))  # training takes no more
    sent = (plain or evaluated)[-1]
    train = Phase(down_bytes=sent.down_bytes, up_bytes=sent.up_bytes, compute_s=seconds)
    if not plain:
        train = steady[-1]
    first = _phase(rounds[0], weight)
    count = len(rounds[0]["sites"])
    return Probe(
        sites=count,
        train=train,
        evaluate=evaluated[-1].minus(train) if plain and evaluated else Phase(),
        start_s=max(0.0, first.compute_s - train.compute_s) * count / weight,
    )


def _phase(entry: Mapping[str, Any], weight: float) -> Phase:
    count = len(entry["sites"])
    return Phase(
        down_bytes=entry["bytes_down"] / count,
        up_bytes=entry["bytes_up"] / count,
        compute_s=weight * entry["seconds"] / count,
    )


def _largest_share(federation: FederationConfig, report: Mapping[str, Any]) -> float:
    """Return the largest site's work over the mean: above 1 only where steps follow records."""
    train = [site["train"] for site in report.get("sites") or []]
    if federation.training.local_epochs is None or federation.privacy is not None or not train:
        return 1.0
    return float(max(train) * len(train) / sum(train))


def _transfer_s(size_bytes: float, mbit: float | None) -> float:
    return 0.0 if mbit is None else 8 * size_bytes / (mbit * MEGABIT)
