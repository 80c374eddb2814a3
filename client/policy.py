"""Policy: what a site's own limits say of a federation. They win, and only tighten."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

from intramural.core.errors import ConfigError, DataRefused, Refused
from intramural.core.federation import FederationConfig
from intramural.core.site import SitePolicy
from intramural.privacy.told import told


@dataclass(frozen=True, kw_only=True)
class Violation:
    """One limit that a federation does not keep; it may travel, and tells of no record."""

    key: str
    """The key of site.toml that forbids it, such as 'policy.exchange'."""
    allowed: str
    asked: str
    remedy: str

    def __str__(self) -> str:
        return (
            f"{self.key} allows {self.allowed}, the federation asks for {self.asked}; {self.remedy}"
        )


@dataclass(frozen=True, kw_only=True)
class _Case:
    """What a limit is held against."""

    policy: SitePolicy
    federation: FederationConfig
    base_digest: str | None
    vector_bytes: int | None
    up_bytes: int | None
    now: datetime | None
    epsilon: float | None


def violations(
    policy: SitePolicy,
    federation: FederationConfig,
    *,
    base_digest: str | None = None,
    vector_bytes: int | None = None,
    up_bytes: int | None = None,
    now: datetime | None = None,
    epsilon: float | None = None,
) -> tuple[Violation, ...]:
    """Return every limit that a federation does not keep, in the order of the checks.

    Args:
        policy: The site's limits.
        federation: The manifest.
        base_digest: Of the base model on the site's disk. Without it policy.models is held against
            the digest that the federation names, and refuses a federation that names none.
        vector_bytes: Of the vector that comes; None leaves the byte limits out.
        up_bytes: Of the largest update that leaves; None: as many as come.
        now: With a time zone; None leaves policy.hours out.
        epsilon: What one run costs at policy.delta_lifetime; None leaves policy.epsilon_run out,
            which the guard checks before anything is charged.
    """
    case = _Case(
        policy=policy,
        federation=federation,
        base_digest=base_digest,
        vector_bytes=vector_bytes,
        up_bytes=up_bytes,
        now=now,
        epsilon=epsilon,
    )
    found = (limit(case) for limit in _LIMITS)
    return tuple(violation for violation in found if violation is not None)


def check_manifest(
    policy: SitePolicy,
    federation: FederationConfig,
    *,
    base_digest: str | None = None,
    vector_bytes: int | None = None,
    up_bytes: int | None = None,
    now: datetime | None = None,
) -> None:
    """Compare a federation with the site's limits; arguments as `violations`.

    Raises:
        Refused: The federation asks for what the site does not allow; names the first key that
            forbids it, and how many more do.
    """
    found = violations(
        policy,
        federation,
        base_digest=base_digest,
        vector_bytes=vector_bytes,
        up_bytes=up_bytes,
        now=now,
    )
    if found:
        more = f" ({len(found) - 1} more limits refuse it too)" if found[1:] else ""
        raise Refused(f"{found[0]}{more}")


def check_records(policy: SitePolicy, count: int) -> None:
    """Refuse to train on fewer records than the site allows; the count is not told."""
    if count < policy.records_min:
        raise DataRefused("the site holds fewer training records than its policy.records_min")


def is_open(hours: tuple[str, ...], now: datetime) -> bool:
    """Return whether a moment lies in one of the spans of local time; no span means always."""
    assert now.tzinfo is not None, "a naive time would be taken for local, whatever it was"
    if not hours:
        return True
    local = now.astimezone()
    minute = local.hour * 60 + local.minute
    return any(_holds(span, minute) for span in hours)


def bytes_a_round(
    federation: FederationConfig, vector_bytes: int, up_bytes: int | None = None
) -> int:
    """Return the bytes of parameters in a round at one site, both ways together.

    Training brings `vector_bytes` and sends `up_bytes` back, by default as many; an evaluation
    brings them once more.
    """
    up = vector_bytes if up_bytes is None else up_bytes
    return vector_bytes * (2 if federation.evaluations_every else 1) + up


def _holds(span: str, minute: int) -> bool:
    begin, end = (int(time[:2]) * 60 + int(time[3:]) for time in span.split("-"))
    if begin < end:
        return begin <= minute < end
    return minute >= begin or minute < end  # over midnight


def _require_privacy(case: _Case) -> Violation | None:
    if case.federation.privacy is not None or not case.policy.require_privacy:
        return None
    return Violation(
        key="policy.require_privacy",
        allowed="federations with [privacy] alone",
        asked="no [privacy]",
        remedy="require_privacy is true: add [privacy] to federation.toml, or set it to false in "
        "site.toml",
    )


def _tasks(case: _Case) -> Violation | None:
    kind = case.federation.task.kind
    if kind in case.policy.tasks:
        return None
    return Violation(
        key="policy.tasks",
        allowed=str(list(case.policy.tasks)),
        asked=f"task.kind = {kind!r}",
        remedy="add it to policy.tasks in site.toml",
    )


def _exchange(case: _Case) -> Violation | None:
    kind = case.federation.exchange.kind
    if kind in case.policy.exchange:
        return None
    return Violation(
        key="policy.exchange",
        allowed=str(list(case.policy.exchange)),
        asked=f"exchange.kind = {kind!r}",
        remedy="change it in federation.toml, or add it to policy.exchange in site.toml",
    )


def _trained_modules(case: _Case) -> Violation | None:
    """Hold each module that is named against the list; one within a listed one is on it as well.

    Without it an "adapter" could carry the whole encoder.
    """
    exchange, allowed = case.federation.exchange, case.policy.trained_modules
    named = () if exchange.kind == "full" else exchange.trained_modules or ()
    others = [end for end in named if not any(f".{one}." in f".{end}." for one in allowed)]
    if not others:
        return None
    return Violation(
        key="policy.trained_modules",
        allowed=f"{list(allowed)} to be trained whole",
        asked=f"exchange.trained_modules with {others}",
        remedy="leave them out in federation.toml, or add them to policy.trained_modules in "
        "site.toml",
    )


def _models(case: _Case) -> Violation | None:
    """Hold what the site has, and what the federation names, against the list; both must be on it.

    A federation that names a digest is refused at any site whose base has another.
    """
    allowed, named = case.policy.models, case.federation.model.digest
    given = [digest for digest in (named, case.base_digest) if digest is not None]
    if not allowed or (given and set(given) <= set(allowed)):
        return None
    other = next((digest for digest in given if digest not in allowed), None)
    return Violation(
        key="policy.models",
        allowed=f"{len(allowed)} listed base model" + "s" * (len(allowed) > 1),
        asked="a base model without a digest" if other is None else f"model {other}",
        remedy="set model.digest in federation.toml"
        if other is None
        else "change model.base and model.digest in federation.toml, or add it to policy.models",
    )


def _noise(case: _Case) -> Violation | None:
    least, privacy = case.policy.noise_min, case.federation.privacy
    if least is None:
        return None
    remedy = "spend less epsilon or train fewer steps, or lower policy.noise_min in site.toml"
    try:
        if privacy is None:
            noise = 0.0
        else:
            noise = privacy.noise_multiplier or _calibrated(case.federation.manifest())
        asked = f"noise_multiplier = {noise:g}" if privacy else "no [privacy]"
    except ConfigError as error:
        noise, asked, remedy = 0.0, "a plan that cannot be made", " ".join(str(error).split())
    if noise >= least:
        return None
    return Violation(
        key="policy.noise_min", allowed=f"{least:g} or more", asked=asked, remedy=remedy
    )


@lru_cache(maxsize=8)
def _calibrated(manifest: str) -> float:
    """Return the noise that a plan's epsilon needs; found once, for a request a round asks."""
    from intramural.privacy.plan import PrivacyPlan  # here: accounting takes seconds to load

    federation = FederationConfig.model_validate(json.loads(manifest))
    return PrivacyPlan.of(federation).noise_multiplier


def _clip(case: _Case) -> Violation | None:
    most, privacy = case.policy.clip_max, case.federation.privacy
    if most is None or (privacy is not None and privacy.clip_norm <= most):
        return None
    return Violation(
        key="policy.clip_max",
        allowed=f"{most:g} or less",
        asked=f"privacy.clip_norm = {privacy.clip_norm:g}" if privacy else "no [privacy]",
        remedy="lower privacy.clip_norm in federation.toml, or raise policy.clip_max in site.toml",
    )


def _epsilon(case: _Case) -> Violation | None:
    most, epsilon = case.policy.epsilon_run, case.epsilon
    if epsilon is None or epsilon <= most:  # a NaN refuses
        return None
    return Violation(
        key="policy.epsilon_run",
        allowed=f"{most:g} or less",
        asked=f"epsilon {told(epsilon)} at delta {case.policy.delta_lifetime:g}",
        remedy="add noise or train fewer steps, or raise policy.epsilon_run in site.toml",
    )


def _secure_aggregation(case: _Case) -> Violation | None:
    if not case.policy.require_secure_aggregation:
        return None
    return Violation(
        key="policy.require_secure_aggregation",
        allowed="secure aggregation alone",
        asked="updates that the coordinator sees one by one",
        remedy="this version has no secure aggregation: set the key to false in site.toml, or wait",
    )


def _cohort(case: _Case) -> Violation | None:
    least, sites = case.policy.cohort_min, case.federation.sites.min
    if sites >= least:
        return None
    return Violation(
        key="policy.cohort_min",
        allowed=f"cohorts of {least} sites or more",
        asked=f"sites.min = {sites}",
        remedy="raise sites.min in federation.toml, or lower policy.cohort_min in site.toml",
    )


def _payload(case: _Case) -> Violation | None:
    most, size = case.policy.payload_bytes_max, case.vector_bytes
    if size is None or size <= most:
        return None
    return Violation(
        key="policy.payload_bytes_max",
        allowed=f"{most} bytes a reply",
        asked=f"{size}",
        remedy="train an adapter or a head, or raise policy.payload_bytes_max in site.toml",
    )


def _round_bytes(case: _Case) -> Violation | None:
    most = case.policy.bytes_per_round_max
    if most is None or case.vector_bytes is None:
        return None
    total = bytes_a_round(case.federation, case.vector_bytes, case.up_bytes)
    if total <= most:
        return None
    return Violation(
        key="policy.bytes_per_round_max",
        allowed=f"{most} bytes a round",
        asked=f"{total}",
        remedy="train an adapter or a head, set evaluation.every = 0, or raise "
        "policy.bytes_per_round_max in site.toml",
    )


def _hours(case: _Case) -> Violation | None:
    if case.now is None or is_open(case.policy.hours, case.now):
        return None
    return Violation(
        key="policy.hours",
        allowed=f"work at {', '.join(case.policy.hours)}, local time",
        asked=f"work at {case.now.astimezone():%H:%M}",
        remedy="wait, or widen policy.hours in site.toml",
    )


_LIMITS: tuple[Callable[[_Case], Violation | None], ...] = (
    _require_privacy,
    _exchange,
    _trained_modules,
    _tasks,
    _models,
    _noise,
    _clip,
    _epsilon,
    _secure_aggregation,
    _cohort,
    _payload,
    _round_bytes,
    _hours,
)
