"""Foresight: what a site would say of a manifest, and what a run would cost it, nothing charged."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from intramural.client.policy import Violation, violations
from intramural.client.rank import rank_violation
from intramural.core.errors import ConfigError, ModelError
from intramural.core.federation import FederationConfig
from intramural.core.site import SiteConfig
from intramural.privacy.told import told

if TYPE_CHECKING:  # accounting takes seconds to load: only a manifest with [privacy] waits
    from intramural.models.base import Base
    from intramural.models.footprint import Footprint
    from intramural.privacy.charges import Charge
    from intramural.privacy.plan import PrivacyPlan


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one run would spend of a data set's privacy, at the site's own delta."""

    epsilon_run: float
    delta: float
    unit: str
    relation: str
    noise_multiplier: float
    epsilon_spent: float
    """By all runs so far."""
    epsilon_after: float
    """By them and this one."""
    unit_after: str
    """Whom `epsilon_after` is about: charges for persons and for records mix to records."""
    epsilon_lifetime: float | None
    """The site's limit; None: it set none."""

    def words(self) -> str:
        """Return the cost in one sentence, with all that gives the numbers a meaning."""
        limit = self.epsilon_lifetime
        bound = "no lifetime limit is set" if limit is None else f"the limit is {limit:g}"
        return (
            f"epsilon {told(self.epsilon_run)} at delta {self.delta:g} for one {self.unit} "
            f"({self.relation}, Poisson sampling); the data set has spent "
            f"{told(self.epsilon_spent)}, and would have spent {told(self.epsilon_after)} for one "
            f"{self.unit_after}; {bound}"
        )


@dataclass(frozen=True, kw_only=True)
class Foresight:
    """A manifest, seen with a site's eyes."""

    violations: tuple[Violation, ...]
    """Everything that the site would refuse, in the order it would."""
    cost: Cost | None
    """None without [privacy], or without a plan."""
    vector_bytes: int | None
    """About how many bytes come; None: the base model is not on this disk."""
    up_bytes: int | None
    """About how many leave in the largest update."""


def foresee(
    site: SiteConfig, federation: FederationConfig, *, now: datetime | None = None
) -> Foresight:
    """Return what a site's policy, columns and budget say of a manifest.

    Reads the base model's files and the ledger; neither records nor the ledger are touched.

    Args:
        site: Whose rules.
        federation: The manifest.
        now: For policy.hours; None leaves them out.

    Raises:
        LedgerError: The ledger is broken.
    """
    base, need = _base_of(site, federation), _footprint(site, federation)
    vector_bytes = None if need is None else need.vector_bytes
    up_bytes = None if need is None else need.up_bytes
    asked = site.policy.models or federation.model.digest is not None
    digest = base.digest if base is not None and asked else None
    cost, problem = None, None
    if federation.privacy is not None:
        try:
            cost = cost_of(site, federation)
        except ConfigError as error:
            problem = Violation(
                key="privacy",
                allowed="plans that can be kept",
                asked="one that cannot",
                remedy=" ".join(str(error).split()),
            )
    found = [
        *violations(
            site.policy,
            federation,
            base_digest=digest,
            vector_bytes=vector_bytes,
            up_bytes=up_bytes,
            now=now,
            epsilon=None if cost is None else cost.epsilon_run,
        ),
        _other_base(federation, digest),
        problem,
        rank_violation(site, federation),
        _lifetime(cost),
        *_columns(site, federation),
    ]
    return Foresight(
        violations=tuple(violation for violation in found if violation is not None),
        cost=cost,
        vector_bytes=vector_bytes,
        up_bytes=up_bytes,
    )


def cost_of(site: SiteConfig, federation: FederationConfig) -> Cost:
    """Return what one run of a federation with [privacy] would cost; the ledger is only read.

    Raises:
        ConfigError: The plan is impossible.
        LedgerError: The ledger is broken.
    """
    from intramural.privacy.accountant import epsilon_pld
    from intramural.privacy.book import read_book
    from intramural.privacy.charges import Spending, unit_of
    from intramural.privacy.plan import PrivacyPlan

    plan, policy = PrivacyPlan.of(federation), site.policy
    spending = Spending()
    if site.ledger_file.is_file():
        for charge in read_book(site.ledger_file).charges.values():
            spending.add(charge)
    charges = _charges(plan, federation)
    delta = policy.delta_lifetime
    return Cost(
        epsilon_run=epsilon_pld(plan.total(), delta=delta, relation=plan.relation),
        delta=delta,
        unit=plan.unit,
        relation=plan.relation,
        noise_multiplier=plan.noise_multiplier,
        epsilon_spent=spending.epsilon(delta),
        epsilon_after=spending.epsilon(delta, after=charges),
        unit_after=unit_of([*spending.charges, *charges]),
        epsilon_lifetime=policy.epsilon_lifetime,
    )


def _charges(plan: "PrivacyPlan", federation: FederationConfig) -> Sequence["Charge"]:
    """Return a run's charges: one for all rounds, one for all evaluations, as they compose alike.

    Written nowhere: what the guard writes has more to say of each.
    """
    from intramural.privacy.charges import Charge

    return [
        Charge(
            run=federation.federation.name,
            manifest=federation.digest,
            round=1,
            attempt=1,
            purpose="train" if number == 0 else "metrics",
            sample_rate=event.sample_rate,
            noise_multiplier=event.noise_multiplier,
            steps=event.steps,
            clip_norm=plan.clip_norm,
            unit=plan.unit,
            relation=plan.relation,
            records_per_person=plan.records_per_person,
            delta=plan.delta,
            sampler="poisson",
            random="none yet",
            is_private=True,
            engine=plan.engine,
            accountant="none yet",
            version="none yet",
        )
        for number, event in enumerate(plan.total())
    ]


def vector_bytes_of(site: SiteConfig, federation: FederationConfig) -> int | None:
    """Return about how many bytes come; None: the base model is not on this disk."""
    found = _footprint(site, federation)
    return None if found is None else found.vector_bytes


def _footprint(site: SiteConfig, federation: FederationConfig) -> "Footprint | None":
    from intramural.models.footprint import footprint

    base = _base_of(site, federation)
    try:
        return None if base is None else footprint(federation, base)
    except ModelError:
        return None  # `client check` says why


def _base_of(site: SiteConfig, federation: FederationConfig) -> "Base | None":
    from intramural.models.base import resolve_base

    name = federation.model.base
    try:
        return resolve_base(name, places=site.model) if is_here(name, site) else None
    except ModelError:
        return None


def is_here(name: str, site: SiteConfig) -> bool:
    """Return whether a base model is a folder or an installed package; the hub is not asked."""
    place = site.model.get(name, name)
    module = place.replace("-", "_")
    return Path(place).expanduser().is_dir() or (
        module.isidentifier() and find_spec(module) is not None
    )


def _other_base(federation: FederationConfig, digest: str | None) -> Violation | None:
    wanted = federation.model.digest
    if digest is None or wanted in (None, digest):
        return None
    return Violation(
        key="model",
        allowed=f"the base model on its disk, {digest}",
        asked=f"{wanted}",
        remedy="install that version",
    )


def _lifetime(cost: Cost | None) -> Violation | None:
    if cost is None or cost.epsilon_lifetime is None:
        return None
    if cost.epsilon_after <= cost.epsilon_lifetime:  # a NaN refuses
        return None
    return Violation(
        key="policy.epsilon_lifetime",
        allowed=f"{cost.epsilon_lifetime:g} at delta {cost.delta:g} over all runs",
        asked=f"{told(cost.epsilon_after)}, after {told(cost.epsilon_spent)} spent",
        remedy="add noise, train fewer steps, or use other records",
    )


def _columns(site: SiteConfig, federation: FederationConfig) -> list[Violation]:
    """Return the columns that site.toml lacks, or has too many of."""
    data, found = site.data, []
    key = "label" if federation.task.kind == "classification" else "response"
    if getattr(data, key) is None:
        found.append(_lacking(f"data.{key}", asked=f"{federation.task.kind}, which learns it"))
    if federation.privacy is None:
        return found
    if federation.privacy.unit == "person" and data.person is None:
        found.append(_lacking("data.person", asked="privacy.unit = 'person'"))
    if data.person is not None and data.group is not None:
        found.append(
            Violation(
                key="data.group",
                allowed="a group without [privacy]",
                asked="[privacy], under which a record that joins two groups would move others",
                remedy="name data.person or data.group in site.toml, not both",
            )
        )
    return found


def _lacking(key: str, *, asked: str) -> Violation:
    return Violation(
        key=key, allowed="nothing while absent", asked=asked, remedy="name the column in site.toml"
    )
