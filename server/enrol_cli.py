"""`intramural server init`, `enrol`, `rotate`, `revoke`, `renew` and `roster`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from intramural.core.config import check_config
from intramural.core.errors import ConfigError
from intramural.server.enrol import Enrolled, enrol_site, revoke_site, rotate_site, write_kit
from intramural.server.folder import CoordinatorFolder
from intramural.server.founding import init_coordinator, renew_coordinator
from intramural.server.register import time_of, versions_behind
from intramural.server.settings import PORT_DEFAULT, SUPERLINK_PORT_DEFAULT, CoordinatorConfig
from intramural.trust.asking import (
    ASK_PASSPHRASE,
    FINGERPRINT,
    JSON,
    ask_passphrase,
    ask_to_type,
)
from intramural.trust.certificates import CERTIFICATE_DAYS, certificate_digest
from intramural.trust.keys import fingerprint, read_public
from intramural.trust.kit import SiteRequest, read_request
from intramural.trust.roster import RosterEntry

HERE = Path(".")
REQUEST = typer.Argument(help="The request.json that the site sent.")
DIR = typer.Option("--dir", help="The coordinator's folder.")
DAYS = typer.Option(min=1, max=3650, help="How long the site's certificate is valid.")
OUT = typer.Option(help="File to write the kit to; default: kits/NAME.json in the folder.")


def init_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.")],
    name: Annotated[str, typer.Option(help="Name of the federation.")],
    host: Annotated[str, typer.Option(help="What the sites dial: a DNS name or an IP address.")],
    port: Annotated[int, typer.Option(help="Port of the gate, open to the sites.")] = PORT_DEFAULT,
    listen: Annotated[str, typer.Option(help="Address the gate listens at.")] = "0.0.0.0",
    superlink_port: Annotated[
        int, typer.Option(help="Port of Flower's SuperLink, on loopback alone.")
    ] = SUPERLINK_PORT_DEFAULT,
    passphrase: Annotated[bool, ASK_PASSPHRASE] = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Make a coordinator: its keys, the federation's authority, and a federation.toml to edit.

    DIR holds everything of the coordinator from then on; keep a copy of it,
    closed to others. The fingerprint that is printed is what the sites compare
    by voice when they join.

    Example: intramural server init coordinator --name icd --host fl.example.org
    """
    table = {
        "name": name,
        "host": host,
        "listen": listen,
        "port": port,
        "superlink_port": superlink_port,
    }
    settings = check_config(
        {"coordinator": table}, CoordinatorConfig, source="server init"
    ).coordinator
    secret = ask_passphrase(passphrase, new=True)
    public = init_coordinator(folder, settings, passphrase=secret)
    found = {
        "folder": str(folder),
        "federation": settings.name,
        "host": settings.host,
        "port": settings.port,
        "encrypted": secret is not None,
        "fingerprint": fingerprint(public),
    }
    lines = [
        f"{folder}: coordinator of {settings.name!r}, at {settings.host}:{settings.port}",
        f"fingerprint: {found['fingerprint']}",
        f"next: edit {folder / 'federation.toml'}; enrol each site's request",
    ]
    _tell(found, lines, as_json)


def enrol_command(
    request: Annotated[Path, REQUEST],
    folder: Annotated[Path, DIR] = HERE,
    out: Annotated[Path | None, OUT] = None,
    told: Annotated[str | None, FINGERPRINT] = None,
    days: Annotated[int, DAYS] = CERTIFICATE_DAYS,
    passphrase: Annotated[bool, ASK_PASSPHRASE] = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Take a site into the federation and write the kit that it joins with.

    REQUEST is the file that `intramural client init` wrote at the site. Call
    the site and type what it reads aloud, or give all of it as --fingerprint.
    A member's request again gives it a new certificate. A kit holds no secret.

    Example: intramural server enrol request.json --dir coordinator
    """
    asked = _asked(request, told)
    done = enrol_site(folder, asked, passphrase=ask_passphrase(passphrase), days=days)
    _deliver(folder, done, out, as_json)


def rotate_command(
    request: Annotated[Path, REQUEST],
    folder: Annotated[Path, DIR] = HERE,
    out: Annotated[Path | None, OUT] = None,
    told: Annotated[str | None, FINGERPRINT] = None,
    days: Annotated[int, DAYS] = CERTIFICATE_DAYS,
    passphrase: Annotated[bool, ASK_PASSPHRASE] = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Give a known site new keys; its old ones count no more from now on.

    REQUEST is the file that `intramural client rotate` wrote at the site. Until
    the site has joined with the new kit it is shut out. Takes a revoked site
    back, too. Keys that were ever enrolled before are refused.

    Example: intramural server rotate request.json --dir coordinator
    """
    asked = _asked(request, told)
    done = rotate_site(folder, asked, passphrase=ask_passphrase(passphrase), days=days)
    _deliver(folder, done, out, as_json)


def revoke_command(
    name: Annotated[str, typer.Argument(help="The site's name.")],
    folder: Annotated[Path, DIR] = HERE,
    passphrase: Annotated[bool, ASK_PASSPHRASE] = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Shut a site out: its certificates and its signing key count no more.

    NAME is the site's. A running coordinator sees it at the site's next
    message. The name stays taken; `intramural server rotate` takes it back.

    Example: intramural server revoke st-elsewhere --dir coordinator
    """
    changed = revoke_site(folder, name, passphrase=ask_passphrase(passphrase))
    found = {"site": name, "state": "revoked", "changed": changed}
    _tell(found, [f"{name}: revoked" if changed else f"{name}: was revoked already"], as_json)


def renew_command(
    folder: Annotated[Path, DIR] = HERE,
    passphrase: Annotated[bool, ASK_PASSPHRASE] = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Issue the coordinator's own certificate anew, before it ends or for another host.

    Edit coordinator.toml first if the host changes, and send the sites new
    kits then: `intramural server enrol` with their old requests writes them.

    Example: intramural server renew --dir coordinator
    """
    certificate = renew_coordinator(folder, passphrase=ask_passphrase(passphrase))
    ends = time_of(certificate.not_valid_after_utc)
    found = {"certificate": certificate_digest(certificate), "ends": ends}
    _tell(found, [f"{CoordinatorFolder(root=folder).tls}: valid until {ends}"], as_json)


def roster_command(
    folder: Annotated[Path, DIR] = HERE,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """List the sites, each with its state and the fingerprint of its key.

    No passphrase is needed. Says so if a crash left roster.json behind the
    journal; the next change mends that, as does the command that was cut short.

    Example: intramural server roster --dir coordinator
    """
    roster, behind = versions_behind(folder)
    public = read_public(CoordinatorFolder(root=folder).signing_public)
    found = {
        "federation": roster.federation,
        "version": roster.version,
        "behind": behind,
        "fingerprint": fingerprint(public),
        "sites": [_row(site) for site in roster.sites],
    }
    lines = [
        f"{roster.federation}: version {roster.version}, {len(roster.sites)} sites",
        f"coordinator's fingerprint: {found['fingerprint']}",
    ]
    width = max((len(site.name) for site in roster.sites), default=0)
    lines += [
        f"{site.name:<{width}}  {site.state:<8}  {site.since}  {fingerprint(site.public)}"
        for site in roster.sites
    ]
    if behind:
        lines.append(f"roster.json lacks {behind} of the journal's changes; the next one mends it")
    _tell(found, lines, as_json)


def _asked(path: Path, told: str | None) -> SiteRequest:
    """Return a request whose fingerprint somebody compared with the site."""
    request = read_request(path)
    typer.echo(f"request of site {request.site!r}", err=True)
    ask_to_type(request.public, told=told, whose=f"site {request.site!r}")
    return request


def _deliver(folder: Path, done: Enrolled, out: Path | None, as_json: bool) -> None:
    kit = done.kit
    path = out or CoordinatorFolder(root=folder).kits / f"{kit.site}.json"
    try:
        write_kit(path, kit)
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; run `intramural server enrol` again with another --out"
        ) from error
    certificate = kit.site_certificate()
    found = {
        "site": kit.site,
        "kind": done.kind,
        "kit": str(path),
        "certificate": certificate_digest(certificate),
        "ends": time_of(certificate.not_valid_after_utc),
        "version": kit.open_roster().version,
        "fingerprint": kit.fingerprint,
    }
    lines = [
        f"{kit.site}: {done.kind}; certificate valid until {found['ends']}",
        f"send {path} to the site; when it joins, read aloud: {kit.fingerprint}",
    ]
    _tell(found, lines, as_json)


def _row(site: RosterEntry) -> dict[str, Any]:
    return {
        "name": site.name,
        "state": site.state,
        "since": site.since,
        "fingerprint": fingerprint(site.public),
        "certificates": list(site.certificates),
    }


def _tell(found: dict[str, Any], lines: list[str], as_json: bool) -> None:
    typer.echo(json.dumps(found) if as_json else "\n".join(lines))
