"""Preflight: what would keep a site from taking part, found before anybody waits for it."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from intramural.client.foresight import foresee, is_here, vector_bytes_of
from intramural.core.errors import IntramuralError
from intramural.core.federation import FederationConfig
from intramural.core.site import SiteConfig
from intramural.privacy.told import told

if TYPE_CHECKING:
    from intramural.models.base import Base
    from intramural.models.footprint import Footprint

State = Literal["ok", "warn", "fail"]

GIB = 1024**3
DISK_FAIL_BYTES, DISK_WARN_BYTES = 1 * GIB, 5 * GIB
VECTORS_ON_DISK = 10
"""Answers that are kept for a while, 2 rounds of 4 runs, and two on their way."""
MEMORY_WARN_SHARE = 0.7
"""Share of the free memory above which an estimate is told as tight."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing looked at. It may tell the site's own counts, and never a record's content."""

    name: str
    state: State
    """'fail': the site would refuse or stop; 'warn': people should look."""
    told: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What is checked."""

    site_file: Path
    site: SiteConfig
    federation: FederationConfig | None
    """None: only what holds for any federation is checked."""
    now: datetime
    """With a time zone."""
    passphrase: str | None = None
    """Of the site's keys, if they have one."""
    online: bool = False
    """True: the coordinator is dialled."""

    @property
    def folder(self) -> Path:
        """Where site.toml lies, with all that is the site's."""
        return self.site_file.resolve().parent


def run_checks(flight: Preflight) -> tuple[Check, ...]:
    """Return every check's result. Nothing is written, charged or downloaded.

    A check that cannot be made is a failed one, with the error's own words if they are ours.
    """
    from intramural.client.preflight_data import data_checks
    from intramural.client.preflight_trust import trust_checks

    groups: tuple[tuple[str, Callable[[Preflight], Iterator[Check]]], ...] = (
        ("data", data_checks),
        ("model", model_checks),
        ("ledger", ledger_checks),
        ("policy", policy_checks),
        ("disk", disk_checks),
        ("trust", trust_checks),
    )
    found: list[Check] = []
    for name, group in groups:
        try:
            found.extend(group(flight))
        except IntramuralError as error:
            found.append(failed(name, error))
        except Exception as error:  # noqa: BLE001 (its text could quote a record)
            kind = type(error).__name__
            found.append(Check(name=name, state="fail", told=kind, remedy="report it as a bug"))
    return tuple(found)


def failed(name: str, error: IntramuralError) -> Check:
    """Return one of our errors as a failed check; what follows its last semicolon is the remedy."""
    problem, mark, remedy = " ".join(str(error).split()).rpartition("; ")
    return Check(
        name=name, state="fail", told=problem if mark else remedy, remedy=remedy * bool(mark)
    )


def model_checks(flight: Preflight) -> Iterator[Check]:
    """Look for the base models, compare the digest, and estimate the memory."""
    from intramural.models.base import resolve_base

    site, federation = flight.site, flight.federation
    names = [federation.model.base] if federation is not None else list(site.model)
    if not names:
        remedy = "give --federation, or name a folder in [model] of site.toml"
        yield Check(name="model", state="warn", told="no base model is named", remedy=remedy)
    for name in names:
        if not is_here(name, site):
            yield Check(
                name="model",
                state="warn",
                told=f"{name!r} is no folder and no installed package: the Hugging Face hub would "
                "be asked for it in the first round",
                remedy="map it to a folder in [model] of site.toml",
            )
            continue
        base = resolve_base(name, places=site.model)
        wanted = None if federation is None else federation.model.digest
        if wanted not in (None, base.digest):
            yield Check(
                name="model",
                state="fail",
                told=f"{name!r} has digest {base.digest}, the federation wants {wanted}",
                remedy="install that version",
            )
        else:
            compared = "the federation names no digest" if wanted is None else "as wanted"
            line = f"{name!r} in {base.folder}, digest {base.digest} ({compared})"
            yield Check(name="model", state="ok", told=line)
        if federation is not None:
            yield from _memory(flight, federation, base)


def _memory(flight: Preflight, federation: FederationConfig, base: "Base") -> Iterator[Check]:
    """Compare the plan's estimated memory with what is free."""
    from intramural.models.footprint import footprint, free_bytes, free_host_bytes

    compute = flight.site.compute
    need = footprint(federation, base, micro_batch=compute.micro_batch)
    device, host = free_bytes(compute.device), free_host_bytes()
    if device is None or device == host:
        yield _fits("memory", need.device_bytes + need.host_bytes, host, need)
    else:
        yield _fits("GPU memory", need.device_bytes, device, need)
        yield _fits("memory", need.host_bytes, host, need)


def _fits(name: str, need: int, free: int | None, plan: "Footprint") -> Check:
    line = (
        f"about {need / GIB:.1f} GiB for {plan.parameters:,} parameters, {plan.trained:,} of them "
        "trained"
    )
    if free is None:
        remedy = "compare it with the machine's memory"
        return Check(name=name, state="warn", told=f"{line}; free: unknown", remedy=remedy)
    state: State = "ok"
    if need > MEMORY_WARN_SHARE * free:
        state = "fail" if need > free else "warn"
    remedy = "" if state == "ok" else "lower compute.micro_batch, or end other programs"
    return Check(name=name, state=state, told=f"{line}; free: {free / GIB:.1f} GiB", remedy=remedy)


def ledger_checks(flight: Preflight) -> Iterator[Check]:
    """Read the data set's ledger: whose it is, what it has spent, what is left."""
    from intramural.privacy.book import read_book
    from intramural.privacy.charges import Spending

    site, policy = flight.site, flight.site.policy
    path = site.ledger_file
    lock = path.with_name(f"{path.name}.lock")
    if not path.is_file():
        if lock.is_file() and lock.stat().st_size:
            told_ = f"{path.name} is gone, and {lock.name} knows that there was one"
            yield Check(name="ledger", state="fail", told=told_, remedy="restore its newest copy")
        else:
            line = f"none yet for data set {site.data_name!r}: the first private round begins it"
            yield Check(name="ledger", state="ok", told=line)
        return
    book = read_book(path)
    opened = (book.opened.site, book.opened.data)
    if opened != (site.site.name, site.data_name):
        yield Check(
            name="ledger",
            state="fail",
            told=f"{path.name} is of data set {opened[1]!r} at {opened[0]!r}, not of "
            f"{site.data_name!r} at {site.site.name!r}",
            remedy="name this data set's own ledger in data.ledger of site.toml",
        )
        return
    spending = Spending()
    for charge in book.charges.values():
        spending.add(charge)
    spent, limit = spending.spent(policy.delta_lifetime), policy.epsilon_lifetime
    line = f"{len(book.charges)} charges, epsilon {told(spent.epsilon)} at delta {spent.delta:g}"
    if limit is None:
        remedy = "set policy.epsilon_lifetime, or nothing bounds what all runs spend"
        yield Check(name="ledger", state="warn", told=f"{line}; no lifetime limit", remedy=remedy)
    else:
        line += f" of {limit:g}, for one {spent.unit} ({spent.relation}); head {book.head[:19]}"
        full = spent.epsilon >= limit
        remedy = "use other records: no further round is charged" if full else ""
        yield Check(name="ledger", state="fail" if full else "ok", told=line, remedy=remedy)


def policy_checks(flight: Preflight) -> Iterator[Check]:
    """Hold the federation against the site's own limits, columns and budget."""
    if flight.federation is None:
        return
    seen = foresee(flight.site, flight.federation, now=flight.now)
    for violation in seen.violations:
        yield Check(
            name="policy",
            state="fail",
            told=f"{violation.key} allows {violation.allowed}, the federation asks for "
            f"{violation.asked}",
            remedy=violation.remedy,
        )
    if not seen.violations:
        yield Check(name="policy", state="ok", told="the federation keeps all of the site's limits")
    if seen.cost is not None:
        yield Check(name="cost", state="ok", told=f"a run costs {seen.cost.words()}")


def disk_checks(flight: Preflight) -> Iterator[Check]:
    """Look at the free space where the site keeps journal, ledger and answers."""
    known = flight.federation and vector_bytes_of(flight.site, flight.federation)
    vectors = VECTORS_ON_DISK * (known or 0)
    free = shutil.disk_usage(flight.folder).free
    state: State = "ok"
    if free < DISK_WARN_BYTES + vectors:
        state = "fail" if free < DISK_FAIL_BYTES + vectors else "warn"
    need = f"{(DISK_FAIL_BYTES + vectors) / GIB:.1f} GiB are needed"
    remedy = "" if state == "ok" else "free space, or move the site's folder"
    line = f"{free / GIB:.1f} GiB free; {need}"
    yield Check(name="disk", state=state, told=line, remedy=remedy)
