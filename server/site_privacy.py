"""Site-level privacy at the coordinator: where noise comes from, what was released, what it cost.

Each aggregate is charged in the journal before it is made, so a crash can only count too many.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from intramural.core.errors import JournalError
from intramural.core.federation import FederationConfig
from intramural.core.journal import Entry, Journal
from intramural.privacy.random import SecureRandom
from intramural.privacy.told import told
from intramural.strategies.site_dp import Noise

CHARGED = "site-privacy-charged"
"""Kind of the journal's entry for one release."""

NOT_COVERED = (
    "Covered are the arrays that leave the coordinator, and so the model. Not covered: metrics and "
    "losses in this report, which are exact; that a site takes part, which the report tells; other "
    "runs with the same sites, whose cost comes on top. The coordinator sees each update and is "
    "trusted."
)


def secret_noise() -> Noise:
    """Return Gaussian noise from a cryptographic generator with a new secret key."""
    random = SecureRandom.secret()

    def draw(size: int, std: float) -> NDArray[np.float32]:
        return random.normal(size, std=std)

    return draw


def charge(journal: Journal, federation: FederationConfig, *, round_: int) -> None:
    """Write down, on disk, that an aggregate is about to be made; nothing without [site_privacy].

    Guarantees:
        No aggregate exists that is not in the journal. A round repeated after a crash draws new
        noise, and is a second entry.
    """
    plan = federation.site_privacy
    if plan is not None:
        journal.append(
            CHARGED,
            round=round_,
            noise_multiplier=plan.noise_multiplier,
            clip_norm=plan.clip_norm,
        )


def check_charges(
    federation: FederationConfig, entries: Sequence[Entry], *, committed: int
) -> None:
    """Refuse a journal with fewer releases than the rounds a checkpoint vouches for.

    Raises:
        JournalError: It was cut: each committed round was charged first.
    """
    charged = {entry.body["round"] for entry in entries if entry.kind == CHARGED}
    missing = set(range(1, committed + 1)) - charged
    if federation.site_privacy is not None and missing:
        raise JournalError(
            f"the journal charges no site privacy for round {min(missing)}, which is committed; "
            "restore the whole journal"
        )


def site_statement(federation: FederationConfig, entries: Sequence[Entry]) -> dict[str, Any] | None:
    """Return what a run may claim for a site as a whole, or None without [site_privacy].

    Args:
        federation: Of the run.
        entries: The run's whole journal, earlier attempts included.

    Guarantees:
        `epsilon` composes every release in the journal, as Gaussian mechanisms without sampling,
        for one site's updates present or absent. `NOT_COVERED` and `SiteDPFedAvg` say what it
        leaves out and what voids it.
    """
    plan = federation.site_privacy
    if plan is None:
        return None
    from intramural.privacy.accountant import Event, answered_by, epsilon_pld  # a second to load

    noises = [entry.body["noise_multiplier"] for entry in entries if entry.kind == CHARGED]
    events = [Event(sample_rate=1.0, noise_multiplier=noise, steps=1) for noise in noises]
    epsilon = epsilon_pld(events, delta=plan.delta, relation="add-remove")
    return {
        "epsilon": epsilon,
        "delta": plan.delta,
        "unit": "site",
        "relation": "add-remove",
        "sampler": "none",
        "noise_multiplier": plan.noise_multiplier,
        "clip_norm": plan.clip_norm,
        "releases": len(events),
        "accountant": answered_by(events, delta=plan.delta),
        "words": _words(federation, epsilon, len(events)),
    }


def _words(federation: FederationConfig, epsilon: float, releases: int) -> str:
    """Return the claim, its price and its limits in plain words."""
    plan, sites = federation.site_privacy, federation.sites.min
    assert plan is not None
    std = plan.noise_multiplier * plan.clip_norm / sites
    weak = " An epsilon above 10 promises little." if epsilon > 10 else ""
    return (
        f"({told(epsilon)}, {plan.delta:g})-differential privacy for one site's updates, all of "
        f"them present or absent, over {releases} releases: each aggregate made counts, also those "
        f"of rounds repeated after a crash.{weak} Nothing is gained by drawing cohorts: a site is "
        f"in (nearly) every round. The price: noise of standard deviation {std:.3g} on every "
        f"parameter of the mean of {sites} updates, a vector no longer than {plan.clip_norm:g}. "
        "The noise must hide a whole site, and only more sites make it smaller: with 3 to 50 it is "
        f"large. {NOT_COVERED}"
    )
