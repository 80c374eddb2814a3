"""Simulated sites: one file of records dealt to folders, each with the site.toml of a real site."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from intramural.core.canonical import digest_file
from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.files import write_atomic
from intramural.core.seeds import derive_seed, generator
from intramural.core.site import SiteConfig, simulated_name
from intramural.data.population import RECORDS, Draw, Rows, write_population
from intramural.data.readers import read_records
from intramural.data.records import Columns, Record
from intramural.simulations.partition import parse_spec, partition

POOLED = "pooled"
"""Name of the site that holds everybody's records, for comparison."""
FOLDERS_MAX = 200
"""More sites than this are a population in one file."""
_ROW = json.JSONEncoder(ensure_ascii=False)


@dataclass(frozen=True, kw_only=True)
class Deal:
    """How one file becomes several sites."""

    federation: FederationConfig
    template: SiteConfig
    """Data, limits and machine of every site; its `data.path` is dealt out."""
    sites: int
    partition: str
    """`iid`, `dirichlet:ALPHA`, `size:POWER`, `column:NAME` or `draw:RECORDS`."""
    folder: Path
    ledgers: Path | None = None
    """Folder of the sites' privacy ledgers, to go on with those of earlier runs; None: fresh."""
    ranks: tuple[int, ...] = ()
    """`compute.rank` of the sites, dealt in turn; empty: as the template has it."""

    def __post_init__(self) -> None:
        """Refuse ranks that no site of the deal could train.

        Raises:
            ConfigError: It names the option and the key.
        """
        exchange = self.federation.exchange
        for rank in self.ranks:
            if exchange.kind != "lora" or not (
                (exchange.rank_min or exchange.rank) <= rank <= exchange.rank
            ):
                raise ConfigError(
                    f"--ranks: {rank} is not from exchange.rank_min to exchange.rank = "
                    f"{exchange.rank} of an adapter; change it, or the key in federation.toml"
                )
        if self.ranks and self.is_crowd:
            raise ConfigError(
                f"--ranks deals ranks to folders of sites; deal to at most {FOLDERS_MAX} sites, "
                "by another --partition than draw"
            )

    @property
    def is_crowd(self) -> bool:
        """Whether the sites are one population, and not a folder each."""
        return self.sites > FOLDERS_MAX or parse_spec(self.partition).kind == "draw"

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
            **({"ledgers": str(self.ledgers.resolve())} if self.ledgers else {}),
            **({"ranks": list(self.ranks)} if self.ranks else {}),
        }


@dataclass(frozen=True, kw_only=True)
class Dealt:
    """The sites as they lie on disk."""

    files: list[Path]
    """site.toml of each, in the order of their names; none of a crowd."""
    pooled: Path
    """site.toml of the site that holds all records."""
    notes: list[str] = field(default_factory=list)
    is_crowd: bool = False
    """The sites are one population, and not a folder each."""


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
    if not done.is_file():
        notes = json.dumps(_deal(plan, sites, pooled))
        write_atomic(done, notes.encode(), sync=False)  # as all of it: a power cut ends the run
    return Dealt(
        files=[] if plan.is_crowd else sorted(sites.glob("*/site.toml")),
        pooled=pooled / "site.toml",
        notes=json.loads(done.read_text()),
        is_crowd=plan.is_crowd,
    )


def _deal(plan: Deal, sites: Path, pooled: Path) -> list[str]:
    """Write the sites and return what the report should say of it."""
    data = plan.template.data
    target = target_column(plan.federation, plan.template)
    columns = Columns(text=data.text, target=target, person=data.person, group=data.group)
    labels = plan.federation.task.labels or None
    found = read_records(data.path, columns, labels=labels, strict=data.strict)
    notes = [f"{count} rows were skipped: {why}" for why, count in sorted(found.skipped.items())]
    seed, scheme = plan.federation.federation.seed, parse_spec(plan.partition)
    if scheme.kind == "draw":
        draw = Draw(records=int(scheme.number), seed=derive_seed(seed, "partition"))
        _write_crowd(plan, sites, found.records, draw)
        _write_site(plan, pooled, POOLED, found.records)
        return notes
    parts = partition(
        found.records,
        plan.partition,
        sites=plan.sites,
        rng=generator(seed, "partition"),
        column_values=_column_values(plan, columns, len(found.records)),
    )
    if parts.rows_left_out:
        notes.append(f"{parts.rows_left_out} records are at no site: more values than sites")
    if plan.is_crowd:
        _write_crowd(plan, sites, found.records, parts.sites)
    else:
        for number, indices in enumerate(parts):
            name = simulated_name(number, plan.sites)
            rank = plan.ranks[number % len(plan.ranks)] if plan.ranks else None
            own = [found.records[i] for i in indices]
            _write_site(plan, sites / name, name, own, rank=rank)
    _write_site(plan, pooled, POOLED, [found.records[i] for part in parts for i in part])
    return notes


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


def _write_crowd(
    plan: Deal, folder: Path, records: Sequence[Record], dealt: Sequence[Rows] | Draw
) -> None:
    write_population(folder, records, dealt, sites=plan.sites)
    table = _site_table(plan, "crowd", data={"path": RECORDS})
    write_atomic(folder / "site.toml", tomli_w.dumps(table).encode(), sync=False)


def _write_site(
    plan: Deal, folder: Path, name: str, records: Sequence[Record], *, rank: int | None = None
) -> None:
    target = "label" if plan.federation.task.kind == "classification" else "response"
    lines = []
    for r in records:
        row = {"text": r.text, target: r.target, "group": r.group, "person": r.person}
        lines.append(_ROW.encode({k: v for k, v in row.items() if v is not None}))
    write_atomic(folder / "records.jsonl", ("\n".join(lines) + "\n").encode(), sync=False)
    data = {"path": "records.jsonl"}
    if plan.ledgers is not None:
        data["ledger"] = str((plan.ledgers / f"{name}.jsonl").resolve())
    table = _site_table(plan, name, data=data)
    if rank is not None:
        table["compute"]["rank"] = rank
    write_atomic(folder / "site.toml", tomli_w.dumps(table).encode(), sync=False)


def _site_table(plan: Deal, name: str, *, data: dict[str, Any]) -> dict[str, Any]:
    """Return a site.toml; columns have the names that a dealt file gives them."""
    template = plan.template
    target = "label" if plan.federation.task.kind == "classification" else "response"
    given = [c for c in ("person", "group") if getattr(template.data, c) is not None]
    columns = {column: column for column in ("text", target, *given)}
    return {
        "site": {"name": name},
        "data": {**data, **columns, "strict": True, "name": template.data_name},
        "model": template.model,
        "policy": template.policy.model_dump(mode="json", exclude_none=True),
        "compute": template.compute.model_dump(mode="json", exclude_none=True),
    }
