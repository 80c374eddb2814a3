"""Words: a manifest told to the people who approve it, and what they approved last beside it."""

import json
from fractions import Fraction
from math import ceil
from typing import Any

from intramural.client.foresight import Foresight
from intramural.client.harmless import Difference
from intramural.client.policy import Violation, bytes_a_round
from intramural.core.federation import FederationConfig
from intramural.core.route import COUNTED_RULES, PERSONAL_B

VALUE_CHARACTERS_MAX = 400


def manifest_words(federation: FederationConfig, foresight: Foresight) -> list[tuple[str, str]]:
    """Return a manifest in plain words, as headings and sentences.

    Texts in it are the coordinator's: they come back with whatever a terminal obeys made visible.
    """
    return [
        ("name", _safe(federation.federation.name)),
        ("learns", _learns(federation)),
        ("from", _model(federation)),
        ("leaves", _leaves(federation, foresight)),
        ("evaluation", _evaluation(federation)),
        ("how often", _how_often(federation)),
        ("privacy", _privacy(federation, foresight)),
        ("who sees it", _who_sees(federation)),
        ("who else", _who_else(federation)),
    ]


def difference_words(found: Difference) -> str:
    """Return one changed key: `training.learning_rate: 0.1 -> 0.2`."""
    return f"{found.key}: {value_words(found.old)} -> {value_words(found.new)}"


def violation_words(found: Violation) -> str:
    """Return what the site refuses, on one line."""
    return _safe(str(found))


def value_words(value: Any) -> str:
    """Return a manifest's value on one line; nothing in it moves a terminal's cursor."""
    if value is None:
        return "absent"
    text = _safe(json.dumps(value, ensure_ascii=False))
    if len(text) <= VALUE_CHARACTERS_MAX:
        return text
    return f"{text[:VALUE_CHARACTERS_MAX]}... ({len(text)} characters; --json shows all)"


def _safe(text: str) -> str:
    """Return text in which what is not printable is spelt out.

    A manifest could otherwise hide its own lines, or write over ours: by control characters, or by
    marks that turn the direction of writing.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _learns(federation: FederationConfig) -> str:
    task = federation.task
    if task.kind == "classification":
        return f"to choose one of {len(task.labels)} labels for a text: {value_words(task.labels)}"
    return f"to write a response to {value_words(task.instruction)}"


def _model(federation: FederationConfig) -> str:
    model = federation.model
    digest = "of any content: no digest is named" if model.digest is None else model.digest
    return f"base model {value_words(model.base)}, {digest}; texts cut at {model.max_length} tokens"


def _leaves(federation: FederationConfig, foresight: Foresight) -> str:
    exchange = federation.exchange
    named = exchange.trained_modules
    whole = "the head" if named is None else f"the whole of {value_words(named)}"
    what = {
        "lora": f"an adapter of rank {exchange.rank} and {whole}",
        "full": "every weight of the model",
        "head": f"{whole}, and nothing of the encoder",
    }[exchange.kind]
    told = f"once a round, how training changed {what}"
    if kept := _stays(federation):
        told += f", without {kept}, which stays at the site"
    comes, leaves = foresight.vector_bytes, foresight.up_bytes
    if comes is not None and leaves is not None:
        total = bytes_a_round(federation, comes, leaves)
        told += f": about {leaves:,} bytes, {total:,} a round both ways"
    if federation.privacy is not None:
        return f"{told}; noised, with no loss, time or record count; the ledger's length and head"
    training, strategy = federation.training, federation.strategy
    counts = ", the number of records" if strategy.weights == "examples" else ""
    if strategy.rule in COUNTED_RULES:
        counts += ", the number of steps"
        if training.local_epochs is not None and strategy.weights != "examples":
            counts += f" (and so of records, to within {training.batch_size})"
    return f"{told}; with the mean loss, the time{counts}"


def _stays(federation: FederationConfig) -> str:
    """Return which part of what is trained never leaves, or ''."""
    factor = ["the adapter's B factors"] if federation.strategy.rule in PERSONAL_B else []
    return " and ".join([*factor, *(value_words(end) for end in federation.exchange.personal)])


def _evaluation(federation: FederationConfig) -> str:
    every = federation.evaluations_every
    if not every:
        return "no evaluation leaves the site"
    records = federation.evaluation.records_max
    on = "all" if records is None else f"at most {records}"
    when = f"every {every} rounds and after the last, on {on} validation or test records"
    if federation.privacy is not None:
        return f"two noised counts, {when}; charged"
    confusion = ", who was taken for what" if federation.task.kind == "classification" else ""
    own = "; after the last those of the site's own model, too" if federation.personal else ""
    return f"exact sums (records, loss{confusion}), {when}{own}"


def _how_often(federation: FederationConfig) -> str:
    training = federation.training
    if training.local_steps is not None:
        steps = f"{training.local_steps} steps"
    else:
        steps = f"{training.local_epochs} passes over the records"
    rounds = federation.federation.rounds
    return f"{rounds} rounds of {steps} with {training.batch_size} records each"


def _privacy(federation: FederationConfig, foresight: Foresight) -> str:
    privacy, cost = federation.privacy, foresight.cost
    if privacy is None:
        return "NONE: whoever sees an update may learn texts, and who is in the records, from it"
    if cost is None:
        return "NONE: the plan cannot be kept"
    return (
        f"one run costs {cost.words()}; noise_multiplier {cost.noise_multiplier:g}, "
        f"clip_norm {privacy.clip_norm:g}, for sites of about {privacy.nominal_units} "
        f"{privacy.unit}s"
    )


def _who_sees(federation: FederationConfig) -> str:
    told = "the coordinator sees each update by itself: there is no secure aggregation"
    hidden = federation.site_privacy
    if hidden is None:
        return f"{told}; the other sites see the combined model"
    return (
        f"{told}; the other sites see the combined model, with noise {hidden.noise_multiplier:g} "
        "for a site as a whole"
    )


def _who_else(federation: FederationConfig) -> str:
    sites = federation.sites
    closing = max(1, ceil(Fraction(str(sites.quorum)) * sites.min))  # as the coordinator rounds
    rule = value_words(federation.strategy.rule)
    return (
        f"{sites.min} sites or more a round, combined by {rule}; after {sites.deadline_s:g} s a "
        f"round may close with {closing} of them"
    )
