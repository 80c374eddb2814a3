"""`intramural client ledger show`, `verify` and `export`: a data set's privacy ledger, read."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intramural.core.errors import ConfigError
from intramural.core.files import write_json
from intramural.core.site import load_site
from intramural.privacy.told import told

if TYPE_CHECKING:  # the accountant takes a second to load: only commands that need it wait
    from intramural.privacy.book import Book
    from intramural.privacy.charges import Charge, Spent

DELTA_DEFAULT = 1e-5

PLACE = typer.Argument(metavar="SITE_TOML", help="The site's site.toml, or a ledger's file.")
JSON = typer.Option("--json", help="Print one JSON object.")
DELTA = typer.Option(help="Delta at which epsilon is read; default: site.toml's delta_lifetime.")

ledger_app = typer.Typer(
    help="Read the site's privacy ledger: what its data set has spent, over all runs.",
    no_args_is_help=True,
)


@dataclass(frozen=True, kw_only=True)
class Found:
    """A ledger that was named, and what the site says of it."""

    path: Path
    book: "Book"
    delta: float
    epsilon_lifetime: float | None
    """None: the site set no limit, or a ledger's file was named."""


@ledger_app.command("show")
def show_command(
    place: Annotated[Path, PLACE],
    delta: Annotated[float | None, DELTA] = None,
    cross_check: Annotated[
        bool, typer.Option("--cross-check", help="Print PRV's and RDP's epsilon beside PLD's.")
    ] = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Print each run's charges, and what all of them cost together.

    SITE_TOML is the site's site.toml, which says where its ledger is, or a
    ledger's file. Nothing is changed; a site may train meanwhile. Epsilon is
    that of PLD; with --cross-check, PRV (Opacus) and RDP stand beside it.

    Example: intramural client ledger show site.toml --delta 1e-6
    """
    found = _found(place, delta)
    spent = _spent(found, kept=True)
    checks = _checks(found) if cross_check and spent.charges else []
    if as_json:
        more = {"cross_check": checks} if cross_check else {}
        typer.echo(json.dumps(_told(found, spent) | {"runs": _runs(found.book)} | more))
        return
    opened = found.book.opened
    typer.echo(f"{found.path}: site {opened.site!r}, data set {opened.data!r}")
    for line in _table(_runs(found.book)):
        typer.echo(line)
    if not spent.charges:
        typer.echo("nothing was charged: epsilon 0")
        return
    limit = "" if found.epsilon_lifetime is None else f" of {found.epsilon_lifetime:g}"
    typer.echo(
        f"epsilon {told(spent.epsilon)}{limit} at delta {spent.delta:g}, all charges composed: "
        f"unit {spent.unit}, relation {spent.relation}, sampler {spent.sampler}, "
        f"accountant {spent.accountant}"
    )
    for check in checks:
        figure = "no answer" if check["epsilon"] is None else f"epsilon {told(check['epsilon'])}"
        typer.echo(
            f"cross-check: {figure} by {check['accountant']}, composed as {check['relation']}"
        )
    typer.echo(f"claim: {spent.claim}")


@ledger_app.command("verify")
def verify_command(
    place: Annotated[Path, PLACE],
    head: Annotated[
        str | None, typer.Option(help="A head that was written down earlier and must be in it.")
    ] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Check the ledger's hash chain; exit code 1 and the first bad entry when it is broken.

    SITE_TOML is the site's site.toml, or a ledger's file. A ledger restored from
    an older copy looks whole: give the --head that a report or a coordinator
    holds.

    Example: intramural client ledger verify site.toml
    """
    found = _found(place, None)
    if head is not None:
        found.book.check_head(head, path=found.path)
    told_ = {
        "ledger": str(found.path),
        "entries": len(found.book.entries),
        "charges": len(found.book.charges),
        "head": found.book.head,
    }
    line = f"{told_['entries']} entries, {told_['charges']} charges, whole; head {told_['head']}"
    typer.echo(json.dumps(told_) if as_json else line)


@ledger_app.command("export")
def export_command(
    place: Annotated[Path, PLACE],
    out: Annotated[
        Path | None, typer.Option(help="File to write; default: the standard output.")
    ] = None,
    delta: Annotated[float | None, DELTA] = None,
) -> None:
    """Write the ledger as one JSON object: every charge and outcome, what they cost, the head.

    SITE_TOML is the site's site.toml, or a ledger's file. Enough for an auditor
    to compose the charges with another accountant.

    Example: intramural client ledger export site.toml --out ledger.json
    """
    found = _found(place, delta)
    book = found.book
    events = [
        {"seq": seq, "time": book.entries[seq].time, "outcome": book.outcomes.get(seq)}
        | charge.model_dump(mode="json")
        for seq, charge in book.charges.items()
    ]
    content = _told(found, _spent(found, kept=False)) | {"events": events}
    if out is None:
        typer.echo(json.dumps(content, indent=2))
    else:
        write_json(out, content)
        typer.echo(str(out))


def _found(place: Path, delta: float | None) -> Found:
    """Return the ledger that `place`, a site.toml or a ledger, names."""
    from intramural.privacy.book import read_book

    if delta is not None and not 0 < delta < 1:
        raise ConfigError(f"--delta must be above 0 and below 1, got {delta!r}")
    path, own_delta, lifetime = place, DELTA_DEFAULT, None
    if place.suffix == ".toml":
        site = load_site(place)
        path = site.ledger_file
        own_delta, lifetime = site.policy.delta_lifetime, site.policy.epsilon_lifetime
    if not path.is_file():
        raise ConfigError(f"{path}: no such ledger; a site writes it in its first private round")
    return Found(
        path=path,
        book=read_book(path),
        delta=own_delta if delta is None else delta,
        epsilon_lifetime=lifetime,
    )


def _spent(found: Found, *, kept: bool) -> "Spent":
    """Return what was spent: by what is kept beside the ledger, or of the events alone."""
    from intramural.privacy.accountant import SCREEN_INTERVAL
    from intramural.privacy.charges import Spending
    from intramural.privacy.composer import Composer
    from intramural.privacy.kept import take_kept

    composer = Composer(guard=Composer(interval=SCREEN_INTERVAL))
    if kept:
        take_kept(composer, found.path, found.book)
    spending = Spending(told=composer)
    for charge in found.book.charges.values():
        spending.add(charge)
    return spending.spent(found.delta)


def _checks(found: Found) -> list[dict[str, Any]]:
    """Return what other accountants say of all charges; the claim rests on neither."""
    from intramural.privacy.accountant import BOUND, SECOND_OPINION, cross_check
    from intramural.privacy.charges import composed_as, events_of, steps_of, unit_of

    charges = list(found.book.charges.values())
    relation = composed_as(charges, unit_of(charges))
    checks = cross_check(events_of(steps_of(charges)), delta=found.delta, relation=relation)
    return [
        {"accountant": accountant, "epsilon": checks[name], "relation": relation}
        for name, accountant in (("prv", SECOND_OPINION), ("rdp", BOUND))
    ]


def _told(found: Found, spent: "Spent") -> dict[str, Any]:
    """Return what both JSON forms begin with; an infinite epsilon is null."""
    cost = {name: None if value == float("inf") else value for name, value in asdict(spent).items()}
    opened = found.book.opened
    return {
        "site": opened.site,
        "data": opened.data,
        "ledger": opened.ledger,
        "entries": len(found.book.entries),
        "head": found.book.head,
        "epsilon_lifetime": found.epsilon_lifetime,
        "spent": cost,
    }


def _runs(book: "Book") -> list[dict[str, Any]]:
    """Return what each run charged, in the order of their first charges."""
    by_run: dict[tuple[str, str], dict[int, Charge]] = {}
    for seq, charge in book.charges.items():
        by_run.setdefault((charge.manifest, charge.run_id), {})[seq] = charge
    return [
        {
            "run": next(iter(charges.values())).run,
            "manifest": manifest,
            "rounds": len({charge.round for charge in charges.values()}),
            "charges": len(charges),
            "steps": sum(charge.steps for charge in charges.values()),
            "sample_rate": _values(charges, "sample_rate"),
            "noise_multiplier": _values(charges, "noise_multiplier"),
            "clip_norm": _values(charges, "clip_norm"),
            "unit": _values(charges, "unit"),
            "relation": _values(charges, "relation"),
            "random": _values(charges, "random"),
            "done": sum(book.outcomes.get(seq) == "done" for seq in charges),
            "failed": sum(book.outcomes.get(seq) == "failed" for seq in charges),
        }
        for (manifest, _), charges in by_run.items()
    ]


def _values(charges: dict[int, "Charge"], field: str) -> list[Any]:
    return sorted({getattr(charge, field) for charge in charges.values()})


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a run a line, under headings, in columns."""
    names = ("run", "manifest", "rounds", "charges", "done", "failed", "steps")
    several = ("sample_rate", "noise_multiplier", "clip_norm", "unit", "relation", "random")
    lines = [[*names, *several]]
    for row in rows:
        short = row | {"manifest": row["manifest"][:19]}
        lines.append(
            [str(short[name]) for name in names]
            + [" ".join(f"{v:g}" if isinstance(v, float) else v for v in row[n]) for n in several]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = [[f"{c:<{w}}" for c, w in zip(line, widths, strict=True)] for line in lines]
    return ["  ".join(line).rstrip() for line in cells] if rows else []
