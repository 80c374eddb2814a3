"""`intramural client policy explain`: what the site would refuse of a manifest, and why."""

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from intramural.client.foresight import foresee
from intramural.client.policy_words import violation_words
from intramural.client.proposal import manifest_of, payload_of
from intramural.core.config import load_config
from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.site import load_site

JSON = typer.Option("--json", help="Print one JSON object.")
SITE = typer.Option(help="The site's site.toml.")
REFUSED = 3

policy_app = typer.Typer(
    help="Read a manifest with the site's own limits.\n\n"
    "Example: intramural client policy explain federation.toml",
    no_args_is_help=True,
)


@policy_app.callback()
def policy() -> None:
    """Read a manifest with the site's own limits.

    Example: intramural client policy explain federation.toml
    """  # this callback keeps `explain` a command of its own


@policy_app.command("explain")
def explain_command(
    manifest: Annotated[
        Path, typer.Argument(help="A federation.toml, a manifest, or an envelope that holds one.")
    ],
    site: Annotated[Path, SITE] = Path("site.toml"),
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Print all that the site would refuse of a manifest, with key and remedy.

    MANIFEST is a federation.toml, a manifest as JSON, a DSSE envelope of one, or
    a file of the site's state/pending. Exit code 3 when anything is refused.
    Nothing is charged, and no record is read.

    Example: intramural client policy explain federation.toml --site site.toml
    """
    federation = read_manifest(manifest)
    seen = foresee(load_site(site), federation, now=datetime.now().astimezone())
    if as_json:
        found: dict[str, Any] = {
            "manifest": federation.digest,
            "name": federation.federation.name,
            "violations": [asdict(violation) for violation in seen.violations],
            "cost": None if seen.cost is None else asdict(seen.cost),
            "vector_bytes": seen.vector_bytes,
        }
        typer.echo(json.dumps(found))
    else:
        name = federation.federation.name
        for violation in seen.violations:
            typer.echo(violation_words(violation))
        if not seen.violations:
            typer.echo(f"{name}: the site refuses nothing of it")
        if seen.cost is not None:
            typer.echo(f"a run would cost {seen.cost.words()}")
    if seen.violations:
        raise typer.Exit(REFUSED)


def read_manifest(path: Path) -> FederationConfig:
    """Read a manifest from a federation.toml, from JSON, or from an envelope, unverified.

    Raises:
        ConfigError: The file is none of them.
        TrustError: It is an envelope, and its payload no base64.
    """
    if path.suffix == ".toml":
        return load_config(path, FederationConfig)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read: {error.strerror}; check the path") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{path}: neither TOML nor JSON; name a federation.toml") from None
    if isinstance(content, dict) and isinstance(content.get("envelope"), str):
        text, content = content["envelope"], {"payload": None}
    if isinstance(content, dict) and "payload" in content:
        return manifest_of(payload_of(text), source=str(path))
    return manifest_of(text.encode(), source=str(path))
