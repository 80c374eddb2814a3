"""`intramural check`, `bundle`, `report` and `verify`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from intramural.core.config import load_config, read_table
from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.files import write_atomic
from intramural.core.journal import GENESIS, scan
from intramural.core.records_file import load_holdout
from intramural.core.site import load_site
from intramural.server.holdout import check_holdout
from intramural.server.planning import check_federation
from intramural.server.report_html import render_html

HOLDOUT_OPTION = typer.Option(
    "--holdout",
    help="A holdout.toml, whose [data] names records of the coordinator's own; with gate.judge = "
    "'coordinator'.",
)
JSON = typer.Option("--json", help="Print one JSON object.")


def check_command(
    file: Annotated[Path, typer.Argument(help="A federation.toml, a site.toml or a holdout.toml.")],
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Check a configuration file: every problem at once, each with its key and remedy.

    FILE is a federation.toml; a site.toml, told by the table [site]; or a
    holdout.toml, which has [data] and nothing else. Reads the file alone:
    neither model nor records are opened. A plan of privacy that cannot be kept
    is refused; see `intramural privacy plan`.

    Example: intramural check federation.toml
    """
    table = read_table(file)
    if "site" in table:
        name = load_site(file).site.name
        found = {"file": str(file), "kind": "site", "name": name}
    elif set(table) == {"data"}:
        name = load_holdout(file).data.path.name
        found = {"file": str(file), "kind": "holdout", "name": name}
    else:
        config = load_config(file, FederationConfig)
        name = config.federation.name
        found = {"file": str(file), "kind": "federation", "name": name, "manifest": config.digest}
        check_federation(config)
    line = f"{file}: {found['kind']} {name!r} is well formed"
    typer.echo(json.dumps(found) if as_json else line)


def bundle_command(
    federation: Annotated[Path, typer.Argument(help="The federation's federation.toml.")],
    out: Annotated[Path, typer.Option(help="Folder to write the bundle to.")],
    run_folder: Annotated[Path, typer.Option(help="Where the coordinator leaves the run's files.")],
    holdout: Annotated[Path | None, HOLDOUT_OPTION] = None,
    sites: Annotated[
        Path | None,
        typer.Option(help="Simulation only: folder with one folder a site, each with a site.toml."),
    ] = None,
) -> None:
    """Write the code-free bundle that `flwr run` submits, and the run's configuration beside it.

    FEDERATION is a federation.toml. Submitted again, the run goes on from the
    last round committed in its folder.

    Example: intramural bundle federation.toml --out bundle --run-folder runs/1
    """
    from intramural.core.bundle import write_bundle
    from intramural.server.run import SITES_KEY, RunPlan

    config = load_config(federation, FederationConfig)
    check_federation(config)
    check_holdout(config, holdout)
    beside = federation.parent / config.model.base
    places = {config.model.base: str(beside.resolve())} if beside.is_dir() else {}
    plan = RunPlan(
        federation=config, folder=run_folder, places=places, holdout=holdout, resume=True
    )
    settings = plan.to_config()
    if sites is not None:
        settings |= {SITES_KEY: str(sites.resolve()), "patience-s": 0.0}
    app, run = write_bundle(out, settings)
    typer.echo(f"{out}: run it with `flwr run {app} CONNECTION --run-config {run} --stream`")


def report_command(
    folder: Annotated[Path, typer.Argument(help="A run's folder, with report.json.")],
) -> None:
    """Write report.html anew from report.json.

    FOLDER is the folder of a finished run.

    Example: intramural report runs/first
    """
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
    """Check a journal's hash chain; exit code 1 and the first bad entry when it is broken.

    JOURNAL is a run's journal.jsonl. A journal cut at the end of a line looks
    whole: compare the head with one that was written down elsewhere.

    Example: intramural verify runs/first/journal.jsonl
    """
    if not journal.is_file():
        raise ConfigError(f"{journal}: no such journal; name a run's journal.jsonl")
    entries = scan(journal).entries
    head = entries[-1].digest if entries else GENESIS
    found = {"journal": str(journal), "entries": len(entries), "head": head}
    typer.echo(json.dumps(found) if as_json else f"{len(entries)} entries, whole; head {head}")
