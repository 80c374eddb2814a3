"""`intramural server up`, `run`, `runs`, `status`, `show`, `stop`, `report` and `verify`."""

import json
import signal
import threading
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from intramural.core.errors import ConfigError, Interrupted
from intramural.server.cli import HOLDOUT_OPTION
from intramural.server.folder import CoordinatorFolder
from intramural.server.follow import follow
from intramural.server.orders import RUNS, Order, order_named, orders, place_order
from intramural.server.report_table import print_report
from intramural.server.screen import Screen
from intramural.server.standing import (
    coordinator_standing,
    federation_of,
    read_json,
    run_standing,
    verify_run,
)
from intramural.server.up import coordinator_up, is_up
from intramural.trust.asking import ASK_PASSPHRASE, JSON, ask_passphrase
from intramural.trust.keys import read_public

DIR = typer.Option("--dir", help="The coordinator's folder, as `server init` made it.")
ALERTS_SHOWN = 5
"""Of the gate's last alerts; `--json` has more."""
NAME = typer.Argument(metavar="RUN", help="The run's name; `intramural server runs` lists them.")


def up_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The coordinator's folder.")],
) -> None:
    """Keep the coordinator up: its gate, Flower's SuperLink, and every run that is wanted.

    DIR is a folder that `intramural server init` made. Whatever dies is started
    again; runs go on from their last committed round. Ends with Ctrl-C or
    SIGTERM, and nothing is lost.

    Example: intramural server up coordinator
    """
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    typer.echo(f"{folder}: up; `intramural server status --dir {folder}` tells more", err=True)
    coordinator_up(folder, stop=stop)


def run_command(
    federation: Annotated[
        Path | None, typer.Argument(help="The run's federation.toml; not with --resume.")
    ] = None,
    folder: Annotated[Path, DIR] = Path(),
    name: Annotated[str | None, typer.Option(help="The run's name; else the federation's.")] = None,
    resume: Annotated[
        str | None,
        typer.Option(help="Go on with the run of this name, which ended or was stopped."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER of a base model at the coordinator; several times."),
    ] = None,
    holdout: Annotated[Path | None, HOLDOUT_OPTION] = None,
    detach: Annotated[bool, typer.Option(help="Return at once; the run goes on.")] = False,
    passphrase: Annotated[bool, ASK_PASSPHRASE] = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Sign a federation as a run's manifest, have it run by all sites, and show how it goes.

    FEDERATION is a federation.toml. The run belongs to the coordinator that is
    up in --dir: Ctrl-C ends this view, and not the run.

    Example: intramural server run federation.toml --dir coordinator
    """
    if (federation is None) == (resume is None):
        raise ConfigError("name a federation.toml, or --resume RUN; one of them")
    if resume is not None:
        order = order_named(folder, resume)
        order.want(wanted=True)
    else:
        assert federation is not None
        places = dict(_pair(text) for text in model or [])
        secret = ask_passphrase(passphrase)
        order = place_order(
            folder, federation, name=name, models=places, holdout=holdout, passphrase=secret
        )
    if not is_up(folder):
        typer.echo(f"{order.name}: waits for `intramural server up {folder}`", err=True)
    if detach:
        typer.echo(json.dumps({"run": order.name}) if as_json else order.name)
        return
    console = Console(stderr=as_json)
    with Screen(console, rounds=federation_of(order).federation.rounds) as screen:
        try:
            follow(order, screen)
        except KeyboardInterrupt:
            raise Interrupted(
                f"{order.name}: this view ended and the run goes on; see `intramural server show`"
            ) from None
    report = read_json(order.folder / "report.json")
    if as_json:
        typer.echo(json.dumps(report))
        return
    print_report(report, console)
    console.print(f"report: {order.folder / 'report.html'}   model: {order.folder / 'model'}")


def _pair(text: str) -> tuple[str, str]:
    name, sign, place = text.partition("=")
    if not sign:
        raise ConfigError(f"--model {text!r} is not NAME=FOLDER")
    return name, place


def status_command(
    folder: Annotated[Path, DIR] = Path(), as_json: Annotated[bool, JSON] = False
) -> None:
    """Show what is up: processes, the gate's last alerts, what each run does or waits for.

    Example: intramural server status --dir coordinator
    """
    found = coordinator_standing(folder)
    if as_json:
        typer.echo(json.dumps(found))
        return
    console = Console()
    console.print(f"{folder}: {'up' if found['up'] else 'down'}", highlight=False)
    for process in found["processes"]:
        state = "ready" if process["ready"] else "not ready"
        console.print(
            f"  {process['name']}: {state}, pid {process['pid']}, died {process['deaths']} times",
            highlight=False,
        )
    for alert in (found["gate"] or {}).get("alerts", [])[-ALERTS_SHOWN:]:
        facts = {k: v for k, v in alert.items() if k not in ("time", "alert", "peer", "times")}
        told = " ".join(f"{key}={value}" for key, value in facts.items())
        console.print(
            f"  {alert['time'][:19]} {alert['alert']} {alert['peer']} {told}".rstrip(),
            highlight=False,
            markup=False,
        )
    console.print(_table(found["runs"]))


def runs_command(
    folder: Annotated[Path, DIR] = Path(), as_json: Annotated[bool, JSON] = False
) -> None:
    """List the coordinator's runs.

    Example: intramural server runs --dir coordinator
    """
    rows = [run_standing(order) for order in orders(folder)]
    if as_json:
        typer.echo(json.dumps({"runs": rows}))
    else:
        Console().print(_table(rows))


def show_command(
    run: Annotated[str, NAME],
    folder: Annotated[Path, DIR] = Path(),
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Show one run: rounds committed, metrics, what it waits for, how it ended.

    Example: intramural server show icd10-1 --dir coordinator
    """
    found = run_standing(order_named(folder, run))
    if as_json:
        typer.echo(json.dumps(found))
        return
    for key, value in found.items():
        if value not in (None, {}):
            typer.echo(f"{key}: {value if isinstance(value, str | int) else json.dumps(value)}")


def stop_command(
    run: Annotated[str, NAME],
    folder: Annotated[Path, DIR] = Path(),
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Stop a run after what it has committed; `server run --resume RUN` goes on from there.

    Example: intramural server stop icd10-1 --dir coordinator
    """
    order = order_named(folder, run)
    order.want(wanted=False)
    typer.echo(
        json.dumps({"run": run, "standing": order.standing}) if as_json else f"{run}: stopped"
    )


def report_command(
    run: Annotated[str, NAME],
    folder: Annotated[Path, DIR] = Path(),
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Print a finished run's report.

    Example: intramural server report icd10-1 --dir coordinator
    """
    order = order_named(folder, run)
    report = read_json(order.folder / "report.json")
    if report is None:
        raise ConfigError(f"{order.folder}: no report yet; see `intramural server show {run}`")
    if as_json:
        typer.echo(json.dumps(report))
        return
    print_report(report, Console())
    typer.echo(f"report: {order.folder / 'report.html'}   model: {order.folder / 'model'}")


def verify_command(
    run: Annotated[str | None, typer.Argument(help="A run's name; absent: every run.")] = None,
    folder: Annotated[Path, DIR] = Path(),
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Prove what runs' folders say: journal's chain, manifest's signature, rounds, checkpoint.

    Exit code 1 or 3 and the first thing that does not hold, when something does not.

    Example: intramural server verify --dir coordinator
    """
    key = read_public(CoordinatorFolder(root=folder).signing_public)
    chosen: list[Order] = orders(folder) if run is None else [order_named(folder, run)]
    if not chosen:
        raise ConfigError(f"{folder / RUNS}: no runs to verify")
    rows = [verify_run(order, key=key) for order in chosen]
    if as_json:
        typer.echo(json.dumps({"runs": rows}))
        return
    for row in rows:
        again = f"again after a harmed checkpoint: {row['repeated']}" if row["repeated"] else ""
        typer.echo(
            f"{row['run']}: {row['entries']} entries, whole; {row['rounds']} rounds committed, "
            f"{again or 'each once'}; manifest signed; checkpoint {row['checkpoint']}; "
            f"head {row['head']}"
        )


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("run", "standing", "rounds", "now")
    for row in rows:
        now = (row["now"] or {}).get("doing", "")
        if row["outcome"] and row["outcome"]["error"]:
            now = row["outcome"]["error"]
        table.add_row(row["name"], row["standing"], f"{row['committed']} of {row['rounds']}", now)
    return table
