"""`intramural client up`, `log`, `verify` and `service`."""

import json
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from intramural.client.service import service_files
from intramural.client.up import site_up
from intramural.client.worker import state_folder
from intramural.core.errors import ConfigError
from intramural.core.files import write_atomic
from intramural.core.journal import Entry, scan
from intramural.core.site import load_site
from intramural.trust.asking import JSON

SITE = typer.Argument(metavar="SITE_TOML", help="The site's site.toml.")
JOURNAL = "journal.jsonl"


def up_command(site: Annotated[Path, SITE]) -> None:
    """Keep the site up: its worker, its gate, and Flower's SuperNode.

    SITE_TOML is that of a site that has joined a federation. Whatever dies is
    started again. Ends with Ctrl-C or SIGTERM; what was charged stays charged.

    Example: intramural client up site.toml
    """
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    typer.echo(f"{site}: up; logs are in {state_folder(site) / 'logs'}", err=True)
    site_up(site, stop=stop)


def log_command(
    site: Annotated[Path, SITE],
    kind: Annotated[str | None, typer.Option(help="Only entries of this kind.")] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Print the site's journal: what was asked, approved, trained, refused and sent, and when.

    The journal holds digests, rounds and sizes, and no record's content.

    Example: intramural client log site.toml --kind sent
    """
    entries = [e for e in scan(_journal(site)).entries if kind in (None, e.kind)]
    if as_json:
        typer.echo(json.dumps({"entries": [entry.model_dump() for entry in entries]}))
        return
    for entry in entries:
        typer.echo(_line(entry))


def _line(entry: Entry) -> str:
    short = {
        key: value[:19] if isinstance(value, str) and value.startswith("sha256:") else value
        for key, value in entry.body.items()
        if value is not None
    }
    told = " ".join(f"{key}={value}" for key, value in short.items())
    return f"{entry.seq:5d}  {entry.time}  {entry.kind:12s} {told}"


def verify_command(
    site: Annotated[Path, SITE],
    head: Annotated[
        str | None, typer.Option(help="A head that was written down earlier and must be in it.")
    ] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Prove the site's journal and its ledger, offline.

    Checks both hash chains, and that every round that was trained under
    [privacy] is in the ledger. Exit code 1 names the first thing that does not
    hold. A journal put back from an older copy looks whole: give a --head.

    Example: intramural client verify site.toml
    """
    from intramural.client.proof import prove  # here: the ledger loads the accountant

    found = prove(load_site(site), _journal(site), head=head)
    if as_json:
        typer.echo(json.dumps(found))
        return
    typer.echo(f"journal: {found['entries']} entries, whole; head {found['head']}")
    ledger = found["ledger"]
    if ledger is None:
        typer.echo("ledger: none yet")
    else:
        typer.echo(
            f"ledger: {ledger['entries']} entries, whole; {ledger['charges']} charges for "
            f"{ledger['rounds']} private rounds in the journal; head {ledger['head']}"
        )


def _journal(site: Path) -> Path:
    path = state_folder(site) / JOURNAL
    if not path.is_file():
        raise ConfigError(f"{path}: no journal yet; a site writes one when it is up")
    return path


def service_command(
    site: Annotated[Path, SITE],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    user: Annotated[str, typer.Option(help="Whom the agent runs as.")] = "intramural",
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Write a systemd unit and a container file that keep the site's agent up.

    Both let the agent read its records, write its own state, and nothing else.
    The container installs from a folder of wheels: no index is asked.

    Example: intramural client service site.toml --out service
    """
    config = load_site(site)
    files = service_files(
        site,
        site=config.site.name,
        data=config.data.path,
        ledger=config.ledger_file,
        user=user,
    )
    for name, content in files.items():
        write_atomic(out / name, content.encode())
    paths = [str(out / name) for name in files]
    typer.echo(json.dumps({"files": paths}) if as_json else "\n".join(paths))
