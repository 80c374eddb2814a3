"""Planner: what a whole federation takes on given machines, from a probe of two rounds.

Nothing here runs anything: a probe's report, the machines and the estimate of memory go in; hours,
bytes, memory and epsilon come out, or every reason why the plan cannot fit.
"""

import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from intramural.client.policy import violations
from intramural.core.errors import ConfigError, Refused
from intramural.core.federation import FederationConfig
from intramural.core.site import SitePolicy
from intramural.models.footprint import Footprint
from intramural.privacy.told import told
from intramural.server.report_words import bytes_text, counted, seconds_text
from intramural.simulations.hardware import GB, Hardware, Machine
from intramural.simulations.plan_times import Phase, Timing, probe_of_report

PROBE_ROUNDS: Final = 2
RUNTIME_BYTES: Final = 500_000_000
"""Python with PyTorch, transformers and Flower loaded, before any model: 453 MB measured."""
HUB_VECTORS: Final = 8
"""Vectors that a coordinator holds at once: its own and its encoded copy, a reply as it came and as
it was read, the sum (of 8-byte numbers, so two), the rule's memory, and a checkpoint's copy."""
NAMED_MAX: Final = 3
"""So many sites are named in a reason; more are counted."""


@dataclass(frozen=True, kw_only=True)
class SitePlan:
    """What the whole federation takes of one site; of a site drawn now and then, on average."""

    name: str
    busy_s: float
    """Seconds of computing and transfer, without waiting for others."""
    down_bytes: float
    up_bytes: float
    memory_bytes: float
    """Of what trains: main memory, or the GPU's own."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the whole federation takes."""

    rounds: int
    evaluations: int
    """Of each site, the last test included; 0 where the probe's rounds have theirs inside."""
    hours: float
    start_s: float
    """Seconds before the first round is under way: models loaded, records read."""
    train_s: float
    """Seconds of one round's training, up to the last answer that is waited for."""
    evaluate_s: float
    """Seconds of one evaluation, likewise."""
    sites: tuple[SitePlan, ...]
    hub_down_bytes: float
    """From all sites to the coordinator."""
    hub_up_bytes: float
    """From the coordinator to all sites."""
    hub_memory_bytes: float
    privacy: dict[str, Any] | None
    """Epsilon of one run, without retries, with its terms; None without [privacy]."""
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the plan as a JSON value."""
        return asdict(self)


def probe_of(federation: FederationConfig) -> FederationConfig:
    """Return the federation of the probe: two rounds, evaluated after the second.

    So the first round tells what training alone sends, and the second what an evaluation adds.
    Under [privacy] it takes the whole plan's noise, and charges two rounds' share of its cost.
    With [asynchrony] it waits for its cohort all the same: what a plan says is then an upper bound.
    """
    rounds = federation.federation.model_copy(update={"rounds": PROBE_ROUNDS})
    evaluation, privacy = federation.evaluation, federation.privacy
    if evaluation.every:
        evaluation = evaluation.model_copy(update={"every": PROBE_ROUNDS})
    if privacy is not None:
        from intramural.privacy.plan import PrivacyPlan  # here: accounting takes a second to load

        noise = PrivacyPlan.of(federation).noise_multiplier
        privacy = privacy.model_copy(update={"epsilon": None, "noise_multiplier": noise})
    return federation.model_copy(
        update={
            "federation": rounds,
            "evaluation": evaluation,
            "privacy": privacy,
            "asynchrony": None,
        }
    )


def peak_rss_bytes() -> int:
    """Return the most main memory that this process ever held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def plan_run(
    federation: FederationConfig,
    report: Mapping[str, Any],
    hardware: Hardware,
    *,
    need: Footprint,
    policy: SitePolicy | None = None,
) -> Plan:
    """Return what the whole federation takes, from a probe's report.

    Rounds are synchronous: a phase ends with the slowest site of the slowest cohort that can be
    drawn, or at the deadline where a quorum is there by then.

    Args:
        federation: The whole one.
        report: `report.json` of a probe (see `probe_of`) whose sites ran one at a time; with
            `peak_rss_bytes` of its process if it trained in main memory.
        hardware: The machines.
        need: Estimated memory of a site's training.
        policy: The sites' limits; None: nothing is held against them.

    Raises:
        ConfigError: Something cannot fit; every reason is listed.
        Refused: Nothing but the sites' policy is against it.
    """
    probe, measured = probe_of_report(federation, report), report.get("peak_rss_bytes")
    machines = hardware.machines(max(probe.sites, len(report.get("sites") or ())))
    if len(machines) < federation.sites.min:
        raise ConfigError(
            f"hardware.toml: names {counted(len(machines), 'site')}, and sites.min = "
            f"{federation.sites.min}; add [[site]] or [default], or lower sites.min"
        )
    timing = Timing(hardware=hardware, machines=machines, federation=federation)
    train, evaluate = probe.train, probe.evaluate
    rounds, every = federation.federation.rounds, federation.evaluations_every
    asked = -(-rounds // every) + 1 if every and evaluate != Phase() else 0
    train_s, evaluate_s = timing.phase_s(train), timing.phase_s(evaluate)
    plan = Plan(
        rounds=rounds,
        evaluations=asked,
        hours=(probe.start_s + rounds * train_s + asked * evaluate_s) / 3600,
        start_s=probe.start_s,
        train_s=train_s,
        evaluate_s=evaluate_s,
        sites=tuple(
            _site(timing, name, ((rounds, train), (asked, evaluate)), _memory(one, need, measured))
            for name, one in machines.items()
        ),
        hub_down_bytes=timing.cohort * (rounds * train.up_bytes + asked * evaluate.up_bytes),
        hub_up_bytes=timing.cohort * (rounds * train.down_bytes + asked * evaluate.down_bytes),
        hub_memory_bytes=RUNTIME_BYTES + max(need.weights_bytes, HUB_VECTORS * need.vector_bytes),
        privacy=_privacy(federation),
        warnings=tuple(_warnings(timing, train, evaluate)),
    )
    reasons = [*_too_large(plan, hardware, machines), *_too_slow(timing, train, evaluate)]
    refused = [] if policy is None else _against(policy, federation, need)
    if reasons:
        raise ConfigError("\n".join(reasons + refused))
    if refused:
        raise Refused("\n".join(refused))
    return plan


def _site(
    timing: Timing, name: str, phases: Sequence[tuple[int, Phase]], memory_bytes: float
) -> SitePlan:
    """Return what so many of each phase take of one site, drawn as often as any."""
    drawn, machine = timing.cohort / len(timing.machines), timing.machines[name]
    return SitePlan(
        name=name,
        busy_s=drawn * sum(times * timing.site_s(phase, machine) for times, phase in phases),
        down_bytes=drawn * sum(times * phase.down_bytes for times, phase in phases),
        up_bytes=drawn * sum(times * phase.up_bytes for times, phase in phases),
        memory_bytes=memory_bytes,
    )


def plan_words(plan: Plan) -> list[str]:
    """Return the plan in sentences."""
    lines = [
        f"{counted(plan.rounds, 'round')} take {seconds_text(plan.hours * 3600)}: "
        f"{seconds_text(plan.train_s)} of training a round, "
        f"{seconds_text(plan.evaluate_s)} an evaluation.",
        f"The coordinator sends {bytes_text(plan.hub_up_bytes)}, receives "
        f"{bytes_text(plan.hub_down_bytes)}, and needs about {bytes_text(plan.hub_memory_bytes)} "
        "of memory.",
    ]
    if plan.privacy is not None:
        p = plan.privacy
        lines.append(
            f"One run costs epsilon {told(p['epsilon'])} at delta {p['delta']:g}, one {p['unit']}, "
            f"{p['relation']}, {p['sampler']} sampling; rounds tried again cost more. The probe "
            f"was a run of its own on these records and cost epsilon {told(p['epsilon_probe'])}."
        )
    return [*lines, *(f"warning: {warning}" for warning in plan.warnings)]


def _privacy(federation: FederationConfig) -> dict[str, Any] | None:
    if federation.privacy is None:
        return None
    from intramural.privacy.plan import SAMPLER, PrivacyPlan  # as in `probe_of`

    plan = PrivacyPlan.of(federation)
    return {
        "epsilon": plan.cost(),
        "epsilon_probe": PrivacyPlan.of(probe_of(federation)).cost(),
        "delta": plan.delta,
        "unit": plan.unit,
        "relation": plan.relation,
        "sampler": SAMPLER,
    }


def _memory(machine: Machine, need: Footprint, measured: int | None) -> float:
    """Return the bytes that training takes: what was measured, else what is estimated."""
    if machine.device == "gpu":
        return float(need.device_bytes)
    return float(measured or RUNTIME_BYTES + need.device_bytes + need.host_bytes)


def _too_large(plan: Plan, hardware: Hardware, machines: Mapping[str, Machine]) -> Iterator[str]:
    """Yield what has too little memory."""
    short: dict[tuple[str, float, float], list[str]] = {}
    for site in plan.sites:
        machine = machines[site.name]
        if site.memory_bytes > machine.memory_gb * GB:
            key = (machine.device, site.memory_bytes, machine.memory_gb)
            short.setdefault(key, []).append(site.name)
    for (device, wanted, has), names in short.items():
        what = "memory" if device == "cpu" else "GPU memory"
        yield (
            f"hardware.toml: memory_gb: {_named(names)} needs about {wanted / GB:.1f} GB of {what} "
            f"and has {has:g}; lower training.batch_size or model.max_length, or train less"
        )
    has_hub = hardware.coordinator.memory_gb
    if has_hub is not None and plan.hub_memory_bytes > has_hub * GB:
        yield (
            f"hardware.toml: coordinator.memory_gb: about {plan.hub_memory_bytes / GB:.1f} GB are "
            f"needed, and there are {has_hub:g}; use a larger machine, or an adapter"
        )


def _too_slow(timing: Timing, *phases: Phase) -> Iterator[str]:
    """Yield which phase finds no quorum before its deadline."""
    for name, phase in zip(("training", "evaluation"), phases, strict=True):
        if not timing.closes(phase):
            late = timing.late(phase)
            worst = max(late.values())
            yield (
                f"sites.deadline_s: {timing.federation.sites.deadline_s:g} s, and {_named(late)} "
                f"takes up to {worst:.0f} s for {name}, so that {timing.quorum} of "
                f"{timing.cohort} answers may not come in time; raise it, or lower local_steps, "
                "sites.quorum or what travels"
            )


def _warnings(timing: Timing, *phases: Phase) -> Iterator[str]:
    """Yield which sites' work is thrown away in every round."""
    late = {name for phase in phases for name in timing.late(phase)}
    if late:
        yield (
            f"{_named(sorted(late))} answers after sites.deadline_s: rounds close with their "
            "quorum, and that site's work is not used"
        )


def _against(policy: SitePolicy, federation: FederationConfig, need: Footprint) -> list[str]:
    """Return what the sites' own limits say of the federation, with its cost."""
    epsilon = None
    if federation.privacy is not None:
        from intramural.privacy.accountant import epsilon_pld
        from intramural.privacy.plan import PrivacyPlan

        plan = PrivacyPlan.of(federation)
        epsilon = epsilon_pld(plan.total(), delta=policy.delta_lifetime, relation=plan.relation)
    found = [
        str(v)
        for v in violations(
            policy,
            federation,
            vector_bytes=need.vector_bytes,
            up_bytes=need.up_bytes,
            epsilon=epsilon,
        )
    ]
    limit = policy.epsilon_lifetime
    if epsilon is not None and limit is not None and not epsilon <= limit:
        found.append(
            f"policy.epsilon_lifetime allows {limit:g}, the federation asks for {told(epsilon)}; "
            "add noise, or train fewer steps"
        )
    return found


def _named(names: Sequence[str] | Mapping[str, Any]) -> str:
    listed = list(names)
    more = f" and {len(listed) - NAMED_MAX} more" if len(listed) > NAMED_MAX else ""
    return ", ".join(listed[:NAMED_MAX]) + more
