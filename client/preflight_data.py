"""Preflight of a site's records: readable, with their columns, labels and splits.

Counts are the site's own, and told to its people alone; no value of any row is told to anybody.
"""

from collections.abc import Iterator, Sequence

from intramural.client.preflight import Check, Preflight, failed
from intramural.core.errors import DataError
from intramural.core.federation import FederationConfig
from intramural.core.site import SiteConfig
from intramural.data.judge import REMEDIES
from intramural.data.readers import SUFFIXES, read_records
from intramural.data.records import Columns, Record, Records
from intramural.data.rows import open_records
from intramural.data.split import split_records
from intramural.data.text import normalise


def data_checks(flight: Preflight) -> Iterator[Check]:
    """Read the records as a round would, and say what it would find."""
    site, federation = flight.site, flight.federation
    try:
        open_records(site.data.path).close()
    except DataError as error:
        yield failed("data file", error)
        return
    known = site.data.path.suffix.lower() in SUFFIXES
    yield Check(
        name="data file",
        state="ok" if known else "fail",
        told=str(site.data.path) + ("" if known else ": is of no known format"),
        remedy="" if known else f"use one of {', '.join(SUFFIXES)}",
    )
    if not known:
        return
    columns = _columns(site, federation)
    if columns is None:
        remedy = "name data.label or data.response in site.toml"
        yield Check(name="columns", state="fail", told="no column to learn is named", remedy=remedy)
        return
    try:
        found = read_records(site.data.path, columns)
    except DataError as error:
        yield failed("columns", error)
        return
    yield Check(name="columns", state="ok", told=f"{', '.join(map(repr, columns.names))} are there")
    yield _rows(site, found)
    if federation is not None:
        yield from _with(federation, site, found)


def _columns(site: SiteConfig, federation: FederationConfig | None) -> Columns | None:
    data = site.data
    kind = None if federation is None else federation.task.kind
    target = {"classification": data.label, "generation": data.response}.get(
        kind or "", data.label or data.response
    )
    if target is None:
        return None
    return Columns(text=data.text, target=target, person=data.person, group=data.group)


def _rows(site: SiteConfig, found: Records) -> Check:
    """Tell how many rows are of use, and why the others are not."""
    bad = sum(found.skipped.values())
    line = f"{len(found.records)} of {len(found.records) + bad} rows can be used"
    if not bad:
        return Check(name="rows", state="ok", told=line)
    reasons = sorted(found.skipped.items(), key=lambda item: -item[1])
    kinds = [reason.rpartition(": ")[2] for reason, _ in reasons]
    why = ", ".join(f"{count} with {reason}" for reason, count in reasons)
    return Check(
        name="rows",
        state="fail" if site.data.strict else "warn",
        told=f"{line}; left out: {why}",
        remedy=REMEDIES.get(kinds[0], "correct them"),
    )


def _with(federation: FederationConfig, site: SiteConfig, found: Records) -> Iterator[Check]:
    """Check what depends on the federation: its labels, its splits, its sizes."""
    records: Sequence[Record] = found.records
    if federation.task.labels:
        labels = {normalise(label) for label in federation.task.labels}
        records = [record for record in found.records if record.target in labels]
        yield _labels(site, found.records, labels)
    if not records:
        return
    try:
        splits = split_records(records, salt=federation.federation.name)
    except DataError as error:
        yield failed("splits", error)
        return
    counts = {side: len(getattr(splits, side)) for side in ("train", "validation", "test")}
    told = ", ".join(f"{side} {count}" for side, count in counts.items())
    if counts["validation"] or not federation.evaluations_every:
        yield Check(name="splits", state="ok", told=told)
    else:
        remedy = "add records, or name a finer group column"
        yield Check(name="splits", state="warn", told=f"{told}: not evaluated", remedy=remedy)
    yield from _sizes(federation, site, counts["train"])


def _labels(site: SiteConfig, records: Sequence[Record], labels: set[str]) -> Check:
    """Count the rows whose label the federation does not know; which label is not told."""
    unknown = [record.target for record in records if record.target not in labels]
    present = len(labels & {record.target for record in records})
    told = f"{present} of the federation's {len(labels)} labels occur"
    if not unknown:
        return Check(name="labels", state="ok", told=told)
    return Check(
        name="labels",
        state="fail" if site.data.strict or len(unknown) == len(records) else "warn",
        told=f"{told}; {len(unknown)} rows have one of {len(set(unknown))} unknown labels and are "
        "left out",
        remedy="correct them, or have the labels added to task.labels",
    )


def _sizes(federation: FederationConfig, site: SiteConfig, train: int) -> Iterator[Check]:
    """Compare the training records with the site's least, and with the public count."""
    least = site.policy.records_min
    if train < least:
        remedy = "add records, or lower policy.records_min in site.toml"
        told = f"{train} training records, and policy.records_min is {least}"
        yield Check(name="records", state="fail", told=told, remedy=remedy)
    if federation.privacy is None:
        return
    from intramural.client.guard import FAR_ABOVE  # here: accounting takes seconds to load

    nominal = federation.privacy.nominal_records
    if nominal > FAR_ABOVE * train:
        yield Check(
            name="records",
            state="warn",
            told=f"privacy.nominal_records = {nominal} is far above the {train} training records: "
            "the privacy holds, the model learns less from here than it could",
            remedy="ask the coordinator for a smaller public count",
        )
