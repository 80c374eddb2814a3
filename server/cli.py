"""`intramural check`, `bundle`, `report` and `verify`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from intramural.core.config import load_config
from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.files import write_atomic
from intramural.core.journal import GENESIS, scan
from intramural.core.site import load_site
from intramural.server.report_html import render_html

JSON = typer.Option("--json", help="Print one JSON object.")


def check_command(
    file: Annotated[Path, typer.Argument(help="federation.toml or site.toml.")],
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Check a configuration file: every problem at once, each with its key and remedy."""
    if file.name.startswith("site"):
        name = load_site(file).site.name
        found = {"file": str(file), "kind": "site", "name": name}
    else:
        config = load_config(file, FederationConfig)
        name = config.federation.name
        found = {"file": str(file), "kind": "federation", "name": name, "manifest": config.digest}
    line = f"{file}: {found['kind']} {name!r} is well formed"
    typer.echo(json.dumps(found) if as_json else line)


def bundle_command(
    federation: Annotated[Path, typer.Argument(help="The federation's federation.toml.")],
    out: Annotated[Path, typer.Option(help="Folder to write the bundle to.")],
    run_folder: Annotated[Path, typer.Option(help="Where the coordinator leaves the run's files.")],
    sites: Annotated[
        Path | None, typer.Option(help="Simulation only: folder with one folder a site.")
    ] = None,
) -> None:
    """Write the code-free bundle that `flwr run` submits: configuration, and nothing else."""
    from intramural.server.bundle import write_bundle

    config = load_config(federation, FederationConfig)
    settings: dict[str, str | bool | float] = {
        "manifest": config.manifest(),
        "out": str(run_folder.resolve()),
        "resume": True,
    }
    if sites is not None:
        settings |= {"simulation-sites": str(sites.resolve()), "patience-s": 0.0}
    write_bundle(out, settings)
    typer.echo(f"{out}: run it with `flwr run {out} CONNECTION --stream`")


def report_command(
    folder: Annotated[Path, typer.Argument(help="A run's folder, with report.json.")],
) -> None:
    """Write report.html anew from report.json."""
    path = folder / "report.json"
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {type(error).__name__}; name a finished run's folder") from None
    write_atomic(folder / "report.html", render_html(report).encode())
    typer.echo(str(folder / "report.html"))


def verify_command(
    journal: Annotated[Path, typer.Argument(help="A journal.jsonl.")],
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Check a journal's hash chain; exit code 1 and the first bad entry when it is broken."""
    if not journal.is_file():
        raise ConfigError(f"{journal}: no such journal; name a run's journal.jsonl")
    entries = scan(journal).entries
    head = entries[-1].digest if entries else GENESIS
    found = {"journal": str(journal), "entries": len(entries), "head": head}
    typer.echo(json.dumps(found) if as_json else f"{len(entries)} entries, whole; head {head}")
