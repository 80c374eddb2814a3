"""Simulated sites: one file of records dealt to folders, each with the site.toml of a real site."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from intramural.core.canonical import digest_file
from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.files import write_atomic
from intramural.core.seeds import generator
from intramural.core.site import SiteConfig
from intramural.data.readers import read_records
from intramural.data.records import Columns, Record
from intramural.simulations.partition import parse_spec, partition

POOLED = "pooled"
"""Name of the site that holds everybody's records, for comparison."""


@dataclass(frozen=True, kw_only=True)
class Deal:
    """How one file becomes several sites."""

    federation: FederationConfig
    template: SiteConfig
    """Data, limits and machine of every site; its `data.path` is dealt out."""
    sites: int
    partition: str
    """`iid`, `dirichlet:ALPHA`, `size:POWER` or `column:NAME`."""
    folder: Path
    ledgers: Path | None = None
    """Folder of the sites' privacy ledgers, to go on with those of earlier runs; None: fresh."""

    def facts(self) -> dict[str, Any]:
        """Return what decides the deal; equal facts give equal sites."""
        return {
            "manifest": self.federation.digest,
            "data": digest_file(self.template.data.path),
            "columns": self.template.data.model_dump(mode="json", exclude={"path"}),
            "compute": self.template.compute.model_dump(mode="json"),
            "policy": self.template.policy.model_dump(mode="json"),
            "sites": self.sites,
            "partition": self.partition,
        } | ({"ledgers": str(self.ledgers.resolve())} if self.ledgers else {})


@dataclass(frozen=True, kw_only=True)
class Dealt:
    """The sites as they lie on disk."""

    files: list[Path]
    """site.toml of each, in the order of their names."""
    pooled: Path
    """site.toml of the site that holds all records."""
    notes: list[str] = field(default_factory=list)


def target_column(federation: FederationConfig, template: SiteConfig) -> str:
    """Return the column that holds what the task should answer.

    Raises:
        ConfigError: The template names none for this kind of task.
    """
    data = template.data
    column = data.label if federation.task.kind == "classification" else data.response
    if column is None:
        key = "label" if federation.task.kind == "classification" else "response"
        raise ConfigError(f"data.{key}: {federation.task.kind} needs it; name the column")
    return column


def deal(plan: Deal) -> Dealt:
    """Write the sites' folders under `plan.folder`; a folder written before is left as it is.

    Raises:
        DataError, ConfigError: As `read_records` and `partition`.
    """
    sites, pooled = plan.folder / "sites", plan.folder / POOLED
    done = plan.folder / "deal.json"
    if done.is_file():
        written = json.loads(done.read_text())
        return Dealt(
            files=sorted(sites.glob("*/site.toml")), pooled=pooled / "site.toml", notes=written
        )
    data = plan.template.data
    target = target_column(plan.federation, plan.template)
    columns = Columns(text=data.text, target=target, person=data.person, group=data.group)
    labels = plan.federation.task.labels or None
    found = read_records(data.path, columns, labels=labels, strict=data.strict)
    notes = [f"{count} rows were skipped: {why}" for why, count in sorted(found.skipped.items())]
    rng = generator(plan.federation.federation.seed, "partition")
    values = _column_values(plan, columns, len(found.records))
    parts = partition(
        found.records, plan.partition, sites=plan.sites, rng=rng, column_values=values
    )
    if parts.rows_left_out:
        notes.append(f"{parts.rows_left_out} records are at no site: more values than sites")
    width = len(str(plan.sites))
    for number, indices in enumerate(parts, start=1):
        own = [found.records[i] for i in indices]
        name = f"site-{number:0{width}}"
        _write_site(plan, sites / name, name, own)
    _write_site(plan, pooled, POOLED, [found.records[i] for part in parts for i in part])
    write_atomic(done, json.dumps(notes).encode())
    return Dealt(files=sorted(sites.glob("*/site.toml")), pooled=pooled / "site.toml", notes=notes)


def _column_values(plan: Deal, columns: Columns, rows: int) -> list[str] | None:
    """Return each record's value of the column to partition by, or None for other partitions."""
    column = parse_spec(plan.partition).column
    if not column:
        return None
    path, labels = plan.template.data.path, plan.federation.task.labels or None
    by_column = Columns(text=columns.text, target=columns.target, person=column)
    values = [str(r.person) for r in read_records(path, by_column, labels=labels).records]
    if len(values) != rows:
        raise ConfigError(
            f"{path}: column {column!r} has missing values; fill them to partition by it"
        )
    return values


def _write_site(plan: Deal, folder: Path, name: str, records: list[Record]) -> None:
    target = "label" if plan.federation.task.kind == "classification" else "response"
    lines = []
    for r in records:
        row = {"text": r.text, target: r.target, "group": r.group, "person": r.person}
        lines.append(
            json.dumps({k: v for k, v in row.items() if v is not None}, ensure_ascii=False)
        )
    write_atomic(folder / "records.jsonl", ("\n".join(lines) + "\n").encode())
    data = {"path": "records.jsonl", "text": "text", target: target, "strict": True}
    data["name"] = plan.template.data_name
    if plan.ledgers is not None:
        data["ledger"] = str((plan.ledgers / f"{name}.jsonl").resolve())
    for column in ("person", "group"):
        if getattr(plan.template.data, column) is not None:
            data[column] = column
    compute = plan.template.compute.model_dump(mode="json", exclude_none=True)
    policy = plan.template.policy.model_dump(mode="json", exclude_none=True)
    table = {
        "site": {"name": name},
        "data": data,
        "model": plan.template.model,
        "policy": policy,
        "compute": compute,
    }
    write_atomic(folder / "site.toml", tomli_w.dumps(table).encode())
