"""`intramural client check`: would this site take part, and if not, why not."""

import json
import os
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from intramural.client.policy_cli import read_manifest
from intramural.client.preflight import Preflight, run_checks
from intramural.core.site import load_site
from intramural.trust.keys import PASSPHRASE

FAILED = 1
MARKS = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL"}


def client_check_command(
    site: Annotated[Path, typer.Argument(help="The site's site.toml.")] = Path("site.toml"),
    federation: Annotated[
        Path | None,
        typer.Option(help="A federation.toml, manifest or envelope to check the site against."),
    ] = None,
    online: Annotated[
        bool, typer.Option("--online", help="Dial the coordinator, and compare clocks with it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check everything a site needs before it takes part; exit code 1 if a check fails.

    Reads records, model, ledger and keys as a round would, and tells the site's
    own counts, to you alone; no record's content is printed. Nothing is
    written, charged or sent, but for what --online dials.

    Example: intramural client check site.toml --federation federation.toml
    """
    flight = Preflight(
        site_file=site,
        site=load_site(site),
        federation=None if federation is None else read_manifest(federation),
        now=datetime.now().astimezone(),
        passphrase=os.environ.get(PASSPHRASE),
        online=online,
    )
    checks = run_checks(flight)
    has_failed = any(check.state == "fail" for check in checks)
    if as_json:
        rows = [asdict(check) for check in checks]
        name = flight.site.site.name
        typer.echo(json.dumps({"site": name, "ok": not has_failed, "checks": rows}))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            typer.echo(f"{MARKS[check.state]}  {check.name:<{width}}  {check.told}")
            if check.remedy:
                typer.echo(f"{'':<{width + 8}}{check.remedy}")
    if has_failed:
        raise typer.Exit(FAILED)
