"""`intramural client init`, `rotate` and `join`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from intramural.client.enrol import SiteFolder, examine_kit, init_site, join, rotate_site
from intramural.core.journal import utc_now
from intramural.trust.asking import (
    ASK_PASSPHRASE,
    FINGERPRINT,
    JSON,
    ask_passphrase,
    ask_to_confirm,
)
from intramural.trust.kit import SiteRequest

HERE = Path(".")
DIR = typer.Option("--dir", help="The site's folder, where site.toml lies.")


def init_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The site's folder.")],
    name: Annotated[str, typer.Option(help="Name of the site.")],
    passphrase: Annotated[bool, ASK_PASSPHRASE] = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Make a site's keys, at the site, and the request to send to the coordinator.

    DIR gets trust/, closed to others, and a site.toml to edit if it has none.
    Private keys never leave it; the request holds none. Again: the keys stay.

    Example: intramural client init site --name st-elsewhere
    """
    secret = ask_passphrase(passphrase, new=True)
    made = init_site(folder, name=name, passphrase=secret)
    path = SiteFolder(root=folder).trust / "request.json"
    _tell_request(made, path, is_encrypted=secret is not None, as_json=as_json)


def rotate_command(
    folder: Annotated[Path, DIR] = HERE,
    passphrase: Annotated[bool, ASK_PASSPHRASE] = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Make new keys for a site, and a request for them; the old ones serve until it joins.

    After a key was lost or seen, and for a site that was revoked. The
    coordinator answers with `intramural server rotate`.

    Example: intramural client rotate --dir site
    """
    secret = ask_passphrase(passphrase, new=True)
    made = rotate_site(folder, passphrase=secret)
    path = SiteFolder(root=folder).next / "request.json"
    _tell_request(made, path, is_encrypted=secret is not None, as_json=as_json)


def join_command(
    kit: Annotated[Path, typer.Argument(help="The kit that the coordinator sent.")],
    folder: Annotated[Path, DIR] = HERE,
    told: Annotated[str | None, FINGERPRINT] = None,
    passphrase: Annotated[bool, ASK_PASSPHRASE] = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Become a member: check a kit, and put it in place.

    KIT is the file that `intramural server enrol` or `rotate` wrote for this
    site. Call the coordinator and compare what it reads aloud, or give that as
    --fingerprint; a coordinator that is known already is not asked for again.

    Example: intramural client join kit.json --dir site
    """
    secret = ask_passphrase(passphrase)
    joining = examine_kit(folder, kit, now=utc_now(), passphrase=secret)
    found = joining.kit
    whose = f"the coordinator of {found.federation!r}"
    typer.echo(f"kit of site {found.site!r}, for {found.host}:{found.port}", err=True)
    if joining.coordinator == "changed":
        typer.echo("The coordinator's key is ANOTHER one than before: ask why.", err=True)
    if told is not None or joining.coordinator != "known":
        ask_to_confirm(found.public, told=told, whose=whose)
    join(folder, joining)
    certificate = found.site_certificate()
    report = {
        "site": found.site,
        "federation": found.federation,
        "host": found.host,
        "port": found.port,
        "coordinator": joining.coordinator,
        "fingerprint": found.fingerprint,
        "ends": certificate.not_valid_after_utc.isoformat(timespec="seconds"),
    }
    lines = [
        f"{found.site}: member of {found.federation!r} at {found.host}:{found.port}",
        f"certificate valid until {report['ends']}",
    ]
    _tell(report, lines, as_json)


def _tell_request(made: SiteRequest, path: Path, *, is_encrypted: bool, as_json: bool) -> None:
    found = {
        "site": made.site,
        "request": str(path),
        "encrypted": is_encrypted,
        "fingerprint": made.fingerprint,
    }
    lines = [
        f"{made.site}: send {path} to the coordinator; it holds no secret",
        f"when it calls, read aloud: {made.fingerprint}",
    ]
    _tell(found, lines, as_json)


def _tell(found: dict[str, Any], lines: list[str], as_json: bool) -> None:
    typer.echo(json.dumps(found) if as_json else "\n".join(lines))
