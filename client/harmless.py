"""Harmless keys: what may differ from an approved manifest without asking the site's people anew.

A key is on the list only if no value of it, however chosen by a hostile coordinator, lets more of
one record out than the approved manifest does. What was approved stays true: model, task, exchange,
privacy, rounds, batch and steps are never on it, nor is the federation's name, which salts the
split: under another name test records would be trained on.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from intramural.core.canonical import canonical_json
from intramural.core.federation import FederationConfig

ALWAYS = frozenset(
    {
        # The mean of the updates is scaled by these after the updates have left. What comes back as
        # next arrays the coordinator chooses freely anyway, within the layout.
        "strategy.learning_rate",
        "strategy.momentum",
        # A cohort never has fewer than sites.min sites, whatever the share; sites.min is not here.
        "sites.share",
        # After it a round closes with its quorum, never with fewer. Rounds that fail for an early
        # deadline are tried again, charged again, and bounded by policy.retries_max.
        "sites.deadline_s",
        # Records a forward pass: changes no result but in its last bits.
        "evaluation.batch_size",
    }
)
UNDER_PRIVACY = frozenset(
    {
        # Secret draws, noise and dropout come from none of these seeds; the public one makes the
        # first head and the cohorts. Without [privacy] it also deals the batches, and two
        # federations whose batches differ in one record differ by its gradient.
        "federation.seed",
        # What the optimizer makes of noised gradients is post-processing, at any value: too high
        # a rate ruins the model, not the claim, for a record without a finite gradient counts
        # zero. Without [privacy] they say how bare an update shows a gradient: a rate near 0
        # leaves all steps at one point, and their sum is the gradient that published attacks want.
        "training.learning_rate",
        "training.schedule",
        "training.warmup",
        "training.weight_decay",
        "training.momentum",
        "training.gradient_clip",
        "training.proximal",
        # The claim holds against those who see one site's replies alone, so it rests on no number
        # of sites. Without [privacy], a quorum of one site shows the others its update.
        "sites.quorum",
        # Evaluations are not sent, or noised for one unit whatever their number. Without
        # [privacy] an evaluation on one record is that record's label and loss.
        "evaluation.records_max",
    }
)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One key of which two manifests say something else."""

    key: str
    old: Any
    """None where the key is absent."""
    new: Any


def harmless_keys(federation: FederationConfig) -> frozenset[str]:
    """Return the keys that may differ from an approved manifest of the same privacy.

    `evaluation.every` is among them only where the sites send no evaluation at all: noised ones are
    charged each, and bare ones say more the more there are.
    """
    if federation.privacy is None:
        return ALWAYS
    silent = federation.privacy.metrics_noise is None
    return ALWAYS | UNDER_PRIVACY | ({"evaluation.every"} if silent else frozenset())


def differences(old: FederationConfig, new: FederationConfig) -> tuple[Difference, ...]:
    """Return every key of which two manifests say something else, in the file's order."""
    before, after = dict(_leaves(old.to_json())), dict(_leaves(new.to_json()))
    keys = dict.fromkeys([*before, *after])
    return tuple(
        Difference(key=key, old=before.get(key), new=after.get(key))
        for key in keys
        if canonical_json(before.get(key)) != canonical_json(after.get(key))  # 1 is not true
    )


def same_shape(approved: FederationConfig, other: FederationConfig) -> bool:
    """Return whether two manifests differ in harmless keys alone.

    Guarantees:
        With an approved manifest, `other` lets out no more of one record a run: the same parameters
        as often, under the same privacy, to a coordinator that could do as much under the first.
        How many runs there are is not bounded by approval: policy.epsilon_lifetime does that.
    """
    allowed = harmless_keys(approved) & harmless_keys(other)
    return all(difference.key in allowed for difference in differences(approved, other))


def _leaves(table: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys with their values; lists are values, and an empty table is absent."""
    for name, value in table.items():
        key = f"{path}.{name}".lstrip(".")
        if isinstance(value, dict):
            yield from _leaves(value, key)
        else:
            yield key, value
