"""`intramural client approve`: a person reads a manifest, and lets it in or refuses it."""

import getpass
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from intramural.client.approval import Approvals
from intramural.client.foresight import Foresight, foresee
from intramural.client.harmless import Difference, differences
from intramural.client.policy_words import difference_words, manifest_words, violation_words
from intramural.client.proposal import Proposal
from intramural.core.errors import ConfigError, Refused
from intramural.core.site import SiteConfig, load_site

STATE = "state"
"""Folder beside site.toml that holds the store and the site's journal."""
DIGITS_SHOWN = 12


def approvals_of(site_file: Path, site: SiteConfig) -> Approvals:
    """Return a site's store of approvals, which lies beside its site.toml."""
    folder = site_file.resolve().parent / STATE
    return Approvals(folder, policy=site.policy, journal=folder / "journal.jsonl")


def approve_command(
    run: Annotated[
        str | None,
        typer.Argument(help="Name of the federation, or 8 or more digits of the digest."),
    ] = None,
    site: Annotated[Path, typer.Option(help="The site's site.toml.")] = Path("site.toml"),
    by: Annotated[
        str | None, typer.Option(help="Who decides; default: the name of the account.")
    ] = None,
    refuse: Annotated[
        bool, typer.Option("--refuse", help="Refuse it, or withdraw an approval.")
    ] = False,
    yes_name: Annotated[
        str | None, typer.Option(help="The federation's name, instead of typing it when asked.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a manifest that waits, in plain words, and approve or refuse it.

    Without RUN, lists what waits. Else shows what the run learns, what leaves,
    how often, its privacy cost and what changed since the last approval, and
    asks for the run's name to be typed; another name is exit code 3, and
    changes nothing. With --json nothing is asked: give --yes-name to decide.

    Example: intramural client approve icd-chapters --site site.toml
    """
    config = load_site(site)
    approvals = approvals_of(site, config)
    if run is None:
        _print_waiting(approvals, approvers=config.policy.approvers, as_json=as_json)
        return
    proposal = approvals.find(run, statuses=("pending", "approved") if refuse else ("pending",))
    name = proposal.federation.federation.name
    shown = _shown(proposal, approvals, config)
    if not as_json:
        _print(shown)
    typed = yes_name
    if typed is None and not as_json:
        verb = "refuse" if refuse else "approve"
        typed = typer.prompt(f"type the run's name to {verb} it", default="", show_default=False)
    status: str = proposal.status
    if typed is not None:
        if typed.strip() != name:
            raise Refused(f"another name than {name!r} was given; nothing was changed")
        status = _decide(approvals, proposal, by=_account() if by is None else by, refuse=refuse)
    if as_json:
        typer.echo(json.dumps(shown | {"status": status}))
    elif status == "pending":
        typer.echo(f"{name}: noted; it waits for a second approver")
    else:
        typer.echo(f"{name}: {status}")


def _account() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's account may have no name
        raise ConfigError("--by: this account has no name; give one") from None


def _decide(approvals: Approvals, proposal: Proposal, *, by: str, refuse: bool) -> str:
    if refuse:
        approvals.refuse(proposal.digest, by=by)
        return "refused"
    return "approved" if approvals.approve(proposal.digest, by=by) else "pending"


def _shown(proposal: Proposal, approvals: Approvals, site: SiteConfig) -> dict[str, Any]:
    """Return all that is shown of a manifest, as a JSON value."""
    federation = proposal.federation
    seen: Foresight = foresee(site, federation)
    last = approvals.last_approved(federation.federation.name)
    changed: tuple[Difference, ...] = ()
    if last is not None:
        changed = differences(last.federation, federation)
    return {
        "manifest": proposal.digest,
        "name": federation.federation.name,
        "first_seen": proposal.first_seen,
        "by": list(proposal.by),
        "words": dict(manifest_words(federation, seen)),
        "last_approved": None if last is None else last.digest,
        "differences": [asdict(difference) for difference in changed],
        "violations": [asdict(violation) for violation in seen.violations],
        "told": {
            "differences": [difference_words(difference) for difference in changed],
            "violations": [violation_words(violation) for violation in seen.violations],
        },
    }


def _print(shown: dict[str, Any]) -> None:
    typer.echo(f"manifest {shown['manifest']}, first seen {shown['first_seen']}")
    width = max(map(len, shown["words"]))
    for heading, sentence in shown["words"].items():
        typer.echo(f"  {heading:<{width}}  {sentence}")
    if shown["last_approved"] is None:
        typer.echo("no manifest of this name is approved: there is nothing to compare it with")
    elif shown["told"]["differences"]:
        typer.echo(f"changed since {shown['last_approved'][:19]}, the last one approved:")
        for line in shown["told"]["differences"]:
            typer.echo(f"  {line}")
    else:
        typer.echo("nothing changed since the last one approved")
    if shown["told"]["violations"]:
        typer.echo("the site's own limits refuse it, approved or not:")
        for line in shown["told"]["violations"]:
            typer.echo(f"  {line}")
    else:
        typer.echo("it keeps all of the site's own limits")
    if shown["by"]:
        typer.echo(f"approved so far by: {', '.join(shown['by'])}")


def _print_waiting(approvals: Approvals, *, approvers: int, as_json: bool) -> None:
    waiting = approvals.proposals("pending")
    if as_json:
        rows = [
            {
                "manifest": proposal.digest,
                "name": proposal.federation.federation.name,
                "first_seen": proposal.first_seen,
                "by": list(proposal.by),
                "approvers": approvers,
            }
            for proposal in waiting
        ]
        typer.echo(json.dumps({"waiting": rows}))
        return
    if not waiting:
        typer.echo("nothing waits for approval")
    for proposal in waiting:
        digits = proposal.digest[7 : 7 + DIGITS_SHOWN]
        name, count = proposal.federation.federation.name, len(proposal.by)
        typer.echo(
            f"{digits}  {name}  first seen {proposal.first_seen}, {count} of {approvers} approvals"
        )
